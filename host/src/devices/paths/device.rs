//! A VM's device for paths of the host, from the outside: a process that talks to the VM, and one that opens files for it.

use std::os::fd::OwnedFd;
use std::path::Path;

use async_trait::async_trait;
use cofferdam_protocol::PATHS_TAG;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::{Shown, wire};
use crate::devices::kind::{FS_QUEUE_SIZE, Kind};
use crate::devices::process::{Process, StartCause, StartError};
use crate::machine::jail::Spawner;
use crate::machine::{self, Attachment, AttachmentKind, Death};

/// The socket in the run directory on which it listens.
const SOCKET: &str = "paths.sock";

/// A running device.
#[derive(Debug)]
pub struct Device {
    process: Process,
    opener: Process,
}

/// The paths that a device still lacks. If it is dropped, there will be none.
#[derive(Debug)]
pub struct Unbound(OwnedFd);

impl Unbound {
    /// Shows the guest these, by their numbers. Answers its requests that wait for them.
    ///
    /// # Errors
    ///
    /// The opener didn't get them. It has ended, or the kernel refuses to pass them on.
    pub(crate) fn bind(self, shown: Vec<Shown>) -> Result<(), StartError> {
        let shown: Vec<OwnedFd> = shown.into_iter().map(|shown| shown.file.into()).collect();
        wire::send_shown(&self.0, &shown).map_err(failed)
    }
}

impl Device {
    /// Starts the device of one VM, which shows nothing yet: the guest's first look waits until the paths are
    /// bound.
    ///
    /// # Errors
    ///
    /// See [`StartError`].
    pub async fn start(spawner: &Spawner, run_dir: &Path) -> Result<(Self, Unbound), StartError> {
        let pair = || {
            let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
            pair.map_err(|error| failed(error.into()))
        };
        let ((ours, of_opener), (opener, device)) = (pair()?, pair()?);
        let place = (spawner, run_dir);
        let opener = Process::start_beside(place, Kind::PathsOpener, vec![of_opener, opener]).await?;
        let process = Process::start(place, Kind::Paths, SOCKET, vec![device]).await?;
        Ok((Self { process, opener }, Unbound(ours)))
    }
}

fn failed(error: std::io::Error) -> StartError {
    StartCause::Answer(error).of(Kind::Paths)
}

#[async_trait]
impl machine::Device for Device {
    fn attachment(&self) -> Attachment {
        let kind = AttachmentKind::Fs { tag: PATHS_TAG };
        Attachment { kind, socket: SOCKET, queue_size: FS_QUEUE_SIZE }
    }

    async fn died(&mut self) -> Death {
        let Self { process, opener } = self;
        let death = tokio::select! {
            biased;
            death = process.died() => return death,
            death = opener.died() => death,
        };
        // An opener whose device has hung up ends with success. The device's own end tells more.
        if death.status.success() { process.died().await } else { death }
    }

    async fn kill(&mut self) {
        self.process.kill().await;
        self.opener.kill().await;
    }
}
