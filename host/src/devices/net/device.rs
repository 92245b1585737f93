//! A VM's network device, from the outside: a process and the task that answers it.

use std::path::Path;

use async_trait::async_trait;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::backend::MAX_QUEUE_SIZE;
use super::server::{Server, Unbound};
use crate::devices::kind::{ENABLED_EARLY, Kind};
use crate::devices::process::{Process, StartCause, StartError};
use crate::machine::jail::Spawner;
use crate::machine::{self, Attachment, AttachmentKind, Death, vmm};

/// The socket in the run directory on which it listens.
const SOCKET: &str = "net.sock";

/// A running device.
#[derive(Debug)]
pub struct Device {
    process: Process,
    server: Server,
    /// Why this side closed the connection.
    failure: Option<String>,
}

impl Device {
    /// Starts the device of one VM of this kind, which has no connections yet: one that asks for any before they are
    /// bound is cut off.
    ///
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// See [`StartError`].
    pub async fn start((spawner, run_dir): (&Spawner, &Path), vmm: vmm::Kind) -> Result<(Self, Unbound), StartError> {
        let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
        let failed = |error| StartCause::Answer(error).of(Kind::Network);
        let (ours, theirs) = pair.map_err(|error| failed(error.into()))?;
        let (server, unbound) = Server::start(ours).map_err(failed)?;
        let arguments = match vmm {
            vmm::Kind::Qemu => &[ENABLED_EARLY][..],
            vmm::Kind::CloudHypervisor => &[],
        };
        let place = (spawner, run_dir);
        let process = Process::start_with(place, Kind::Network, arguments, SOCKET, vec![theirs]).await?;
        Ok((Self { process, server, failure: None }, unbound))
    }
}

#[async_trait]
impl machine::Device for Device {
    fn attachment(&self) -> Attachment {
        Attachment { kind: AttachmentKind::Net, socket: SOCKET, queue_size: MAX_QUEUE_SIZE as u32 }
    }

    /// Its process has ended, or had to be cut off.
    async fn died(&mut self) -> Death {
        let Self { process, server, failure } = self;
        process.died_or_cut_off(failure, async { server.failed().await.to_string() }).await
    }

    async fn kill(&mut self) {
        self.process.kill().await;
        self.server.finish().await;
    }
}
