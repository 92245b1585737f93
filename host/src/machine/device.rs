//! What a process of its own serves to a machine, and how a VMM attaches it.

use std::fmt;

use async_trait::async_trait;
use cofferdam_protocol::network::GUEST_MAC;

use super::death::Death;

/// A running device. Dropping it kills its process.
#[async_trait]
pub trait Device: fmt::Debug + Send {
    /// How the VMM attaches it. Its socket listens already.
    fn attachment(&self) -> Attachment;

    /// Waits until the device can serve no longer. Cancel safe, and can be called again.
    async fn died(&mut self) -> Death;

    /// Kills its process, if it still runs, and waits until it is gone.
    async fn kill(&mut self);
}

/// A vhost-user device from the VMM's point of view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// What the guest sees.
    pub kind: AttachmentKind,
    /// The socket's name in the run directory.
    pub socket: &'static str,
    /// Length of each request queue, in descriptors.
    pub queue_size: u32,
}

/// The kinds of devices that a VMM can attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachmentKind {
    /// A virtiofs share, which the guest mounts by its tag.
    Fs {
        /// The tag.
        tag: &'static str,
    },
    /// A network interface, with the addresses in [`cofferdam_protocol::network`].
    Net,
}

impl AttachmentKind {
    /// The Ethernet address of the guest's network interface, as text.
    pub(crate) fn mac() -> String {
        GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":")
    }
}
