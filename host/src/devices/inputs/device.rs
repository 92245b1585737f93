//! A VM's inputs device, from the outside: a process and the threads that answer it.

use std::path::Path;

use async_trait::async_trait;
use cofferdam_castore::Store;
use cofferdam_protocol::INPUTS_TAG;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use tokio::runtime::Handle;

use super::server::{ServeError, Server, Unbound};
use crate::devices::kind::{FS_QUEUE_SIZE, Kind};
use crate::devices::process::{Process, StartCause, StartError};
use crate::machine::jail::{Program, Spawner};
use crate::machine::{self, Attachment, AttachmentKind, Death};

/// The socket in the run directory on which it listens.
const SOCKET: &str = "fs.sock";

/// How many blobs a guest can wait for at a time when they have to be fetched.
const CONNECTIONS_WHEN_REMOTE: usize = 16;

/// A running device.
#[derive(Debug)]
pub struct Device {
    process: Process,
    server: Server,
    /// Why this side closed the connection.
    failure: Option<String>,
}

impl Device {
    /// Starts the device of one VM, which has no inputs yet: the guest's first look at them waits until they are
    /// [bound](Unbound::bind).
    ///
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// See [`StartError`].
    pub async fn start(spawner: &Spawner, run_dir: &Path, store: &Store) -> Result<(Self, Unbound), StartError> {
        Self::start_program((spawner, run_dir), store, None).await
    }

    async fn start_program(
        (spawner, run_dir): (&Spawner, &Path),
        store: &Store,
        instead: Option<Program>,
    ) -> Result<(Self, Unbound), StartError> {
        let failed = |error| StartCause::Answer(error).of(Kind::Inputs);
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..if store.blobs.is_remote() { CONNECTIONS_WHEN_REMOTE } else { 1 } {
            let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
            let (our, their) = pair.map_err(|error| failed(error.into()))?;
            ours.push(our);
            theirs.push(their);
        }
        let (server, unbound) = Server::start(ours, store, &Handle::current()).map_err(failed)?;
        let process = match instead {
            None => Process::start((spawner, run_dir), Kind::Inputs, SOCKET, theirs).await?,
            Some(program) => Process::start_program(spawner, program, (run_dir, SOCKET), theirs)
                .await
                .map_err(|cause| cause.of(Kind::Inputs))?,
        };
        Ok((Self { process, server, failure: None }, unbound))
    }
}

#[async_trait]
impl machine::Device for Device {
    fn attachment(&self) -> Attachment {
        let kind = AttachmentKind::Fs { tag: INPUTS_TAG };
        Attachment { kind, socket: SOCKET, queue_size: FS_QUEUE_SIZE }
    }

    /// Its process has ended, or had to be cut off.
    async fn died(&mut self) -> Death {
        let Self { process, server, failure } = self;
        let failed = async {
            match server.ended().await {
                Err(error) => describe(&error),
                // Only the device has closed it, whose end tells more.
                Ok(()) => std::future::pending().await,
            }
        };
        process.died_or_cut_off(failure, failed).await
    }

    async fn kill(&mut self) {
        self.process.kill().await;
    }
}

fn describe(error: &ServeError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd as _;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use super::super::testing::{file, inputs, resolve_all};
    use super::*;
    use crate::machine::Device as _;

    /// Starts a program that has been put in the device's place, as a guest that took the device over would.
    async fn replaced(run_dir: &Path, script: &str) -> Device {
        let store = Store::memory();
        let tree = resolve_all(&store, &inputs(&[("f", file(&store, b"f").await)])).await.unwrap();
        let spawner = Spawner::without_walls(Handle::current()).unwrap();
        let program = Program::new("inputs' device", "/bin/sh", run_dir).args(["-c", script]);
        let (device, inputs) = Device::start_program((&spawner, run_dir), &store, Some(program)).await.unwrap();
        inputs.bind(Arc::new(tree));
        device
    }

    #[tokio::test]
    async fn a_started_device_has_its_socket_at_a_path_of_any_length() {
        let base = tempfile::tempdir().unwrap();
        let run_dir = base.path().join("n".repeat(200));
        std::fs::create_dir(&run_dir).unwrap();
        let mut device = replaced(&run_dir, "sleep 100").await;
        let directory = File::open(&run_dir).unwrap();
        UnixStream::connect(format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd())).unwrap();
        device.kill().await;
        assert!(!device.died().await.status.success());
    }

    #[tokio::test]
    async fn a_device_that_breaks_the_protocol_is_killed_with_a_reason() {
        let run_dir = tempfile::tempdir().unwrap();
        let mut device = replaced(run_dir.path(), "printf garbage >&4; sleep 100").await;
        let death = device.died().await;
        assert!(death.said.contains("no request"), "{}", death.said);
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&death.status), Some(libc::SIGKILL));
        assert_eq!(device.died().await.said, death.said);
    }

    #[tokio::test]
    async fn the_last_words_of_a_device_that_ends_by_itself_are_kept() {
        let run_dir = tempfile::tempdir().unwrap();
        let mut device = replaced(run_dir.path(), "echo 'out of luck' >&2; exit 7").await;
        let death = device.died().await;
        assert_eq!((death.status.code(), death.said.trim()), (Some(7), "out of luck"));
    }

    #[tokio::test]
    async fn a_run_directory_that_is_not_there_is_named() {
        let store = Store::memory();
        let spawner = Spawner::without_walls(Handle::current()).unwrap();
        let error = Device::start(&spawner, "/nonexistent/run".as_ref(), &store).await.unwrap_err();
        assert_eq!(error.to_string(), "can't start the inputs' device");
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains("/nonexistent/run"), "{cause}");
    }
}
