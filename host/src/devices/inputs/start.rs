//! A VM's device as the build sees it: a process and the thread that answers it.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cofferdam_castore::Store;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use tokio::runtime::Handle;

use super::SUBCOMMAND;
use super::resolve::Tree;
use super::server::{ServeError, Server};
use crate::machine::jail::{Child, Program, SpawnError, Spawner};
use crate::machine::vmm::{Cause, Death, FS_SOCKET};

/// This very program, even if its file has been replaced since it was started.
pub(crate) const THIS_PROGRAM: &str = "/proc/self/exe";

/// How many blobs a guest can wait for at a time when they have to be fetched.
const CONNECTIONS_WHEN_REMOTE: usize = 16;

/// Why a device could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its vhost-user socket could not be bound.
    #[error("can't listen on {socket} in {}", .run_dir.display())]
    Listen {
        /// The socket.
        socket: &'static str,
        /// The run directory.
        run_dir: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The connection to it, or the thread that answers it.
    #[error("can't prepare to serve the inputs")]
    Serve(#[source] io::Error),
    /// Its process.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
}

/// A running device. Dropping it kills its process.
#[derive(Debug)]
pub struct Device {
    child: Child,
    server: Server,
    /// Why this side closed the connection.
    failure: Option<String>,
}

impl Device {
    /// Starts the device of one VM. When this returns, a VMM can connect to [`FS_SOCKET`] in the run directory.
    ///
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// See [`StartError`].
    pub async fn start(spawner: &Spawner, run_dir: &Path, tree: Arc<Tree>, store: &Store) -> Result<Self, StartError> {
        Self::start_program(spawner, run_dir, tree, store, (THIS_PROGRAM.as_ref(), vec![SUBCOMMAND.into()])).await
    }

    pub(super) async fn start_program(
        spawner: &Spawner,
        run_dir: &Path,
        tree: Arc<Tree>,
        store: &Store,
        (program, args): (&Path, Vec<OsString>),
    ) -> Result<Self, StartError> {
        let listener = listen(run_dir, FS_SOCKET)?;
        let mut program = Program::new("inputs' device", program, run_dir).args(args).descriptor(listener);
        let mut sockets = Vec::new();
        for _ in 0..if store.blobs.is_remote() { CONNECTIONS_WHEN_REMOTE } else { 1 } {
            let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(|error| StartError::Serve(error.into()))?;
            sockets.push(ours);
            program = program.descriptor(theirs);
        }
        let server = Server::start(sockets, &tree, store, &Handle::current()).map_err(StartError::Serve)?;
        Ok(Self { child: spawner.spawn(program).await?, server, failure: None })
    }

    /// Waits until the device can serve no longer: its process has ended, or it had to be cut off. Cancel safe, and can
    /// be called again.
    pub async fn died(&mut self) -> Death {
        if self.failure.is_none() {
            tokio::select! {
                biased;
                Err(error) = self.server.ended() => self.failure = Some(describe(&error)),
                _ = self.child.wait() => {}
            }
        }
        let status = if self.failure.is_some() { self.child.kill().await } else { self.child.wait().await };
        let said = self.failure.clone().unwrap_or_else(|| self.child.said());
        Death { program: self.child.name().to_owned(), status, said, cause: Cause::Process }
    }

    /// Kills the process, if it still runs, and waits until it has gone.
    pub async fn kill(&mut self) {
        self.child.kill().await;
    }
}

/// Binds a device's socket. The path's length doesn't matter: the kernel sees one of a few bytes.
pub(crate) fn listen(run_dir: &Path, socket: &'static str) -> Result<UnixListener, StartError> {
    let bind = |directory: File| UnixListener::bind(format!("/proc/self/fd/{}/{socket}", directory.as_raw_fd()));
    let failed = |source| StartError::Listen { socket, run_dir: run_dir.to_owned(), source };
    File::open(run_dir).and_then(bind).map_err(failed)
}

fn describe(error: &ServeError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::super::resolve::resolve;
    use super::super::testing::{file, inputs};
    use super::*;

    /// Starts a program that has been put in the device's place, as a guest that took the device over would.
    async fn replaced(run_dir: &Path, script: &str) -> Device {
        let store = Store::memory();
        let tree = resolve(&store, &inputs(&[("f", file(&store, b"f").await)])).await.unwrap();
        let spawner = Spawner::new(Handle::current()).unwrap();
        let program = ("/bin/sh".as_ref(), vec!["-c".into(), script.into()]);
        Device::start_program(&spawner, run_dir, Arc::new(tree), &store, program).await.unwrap()
    }

    #[tokio::test]
    async fn the_socket_is_there_when_the_device_has_started_however_long_the_path() {
        let base = tempfile::tempdir().unwrap();
        let run_dir = base.path().join("n".repeat(200));
        std::fs::create_dir(&run_dir).unwrap();
        let mut device = replaced(&run_dir, "sleep 100").await;
        let directory = File::open(&run_dir).unwrap();
        UnixStream::connect(format!("/proc/self/fd/{}/{FS_SOCKET}", directory.as_raw_fd())).unwrap();
        device.kill().await;
        assert!(!device.died().await.status.success());
    }

    #[tokio::test]
    async fn a_device_that_breaks_the_protocol_is_killed_and_the_reason_told() {
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
        let tree = Arc::new(resolve(&store, &inputs(&[])).await.unwrap());
        let spawner = Spawner::new(Handle::current()).unwrap();
        let error = Device::start(&spawner, "/nonexistent/run".as_ref(), tree, &store).await.unwrap_err();
        assert!(error.to_string().contains("/nonexistent/run"), "{error}");
    }
}
