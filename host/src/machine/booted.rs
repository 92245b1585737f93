//! A machine with everything that belongs to it: VMM, devices, run directory, and the guest's one connection.
//!
//! ```text
//!   run directory, devices ──start──▶ Machine ──connected──▶ stream
//!                                        │
//!                                        └── died / finish / kill
//! ```

use std::{io, os::unix::net, time::Duration};

use cofferdam_protocol::PORT;
use futures::future::{join_all, select_all};
use nix::sys::statvfs::statvfs;
use tokio::net::{UnixListener, UnixStream};

use super::{
    death::Death,
    device::Device,
    jail::Spawner,
    peer::accept_from,
    run_dir::{FileError, RunDir},
    vmm::{self, Vm, Vmm, VmmError},
};

/// How long the VMM's own end is waited for after one of its devices has ended.
const AFTERMATH: Duration = Duration::from_secs(2);

/// With less room than this, in bytes, a host's disk is as good as full: a write of a guest is as large at times.
const MIN_ROOM_BYTES: u64 = 1 << 20;

/// Why a machine did not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// A file or socket in its run directory.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its VMM.
    #[error(transparent)]
    Vmm(#[from] VmmError),
}

/// Why a guest did not connect.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// The socket in the run directory.
    #[error(transparent)]
    File(#[from] FileError),
    /// A process of the machine, or the guest's kernel, ended first.
    #[error("{0}")]
    Died(Death),
    /// The time is up.
    #[error("the guest did not connect within {} seconds", limit.as_secs())]
    Timeout {
        /// The time that it had.
        limit: Duration,
        /// The last lines of its console, escaped; may be empty.
        console: String,
    },
}

/// A running machine. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Machine {
    // Fields are dropped in this order: processes first, then what they hold open.
    vm: Vm,
    devices: Vec<Box<dyn Device>>,
    listener: Option<UnixListener>,
    run_dir: RunDir,
}

impl Machine {
    /// Starts a machine in a run directory that holds its scratch disk, beside devices that run there already; it gets
    /// these as its attachments.
    pub(crate) async fn start(
        (vmm, spawner): (&dyn Vmm, &Spawner),
        run_dir: RunDir,
        devices: Vec<Box<dyn Device>>,
        config: vmm::Config,
    ) -> Result<Self, StartError> {
        run_dir.directory(vmm::VSOCK_DIRECTORY)?;
        let attachments = devices.iter().map(|device| device.attachment()).collect();
        let config = vmm::Config { attachments, ..config };
        let mut vm = vmm.start(spawner, run_dir.path(), &config).await?;
        // Only now, so that no process that ended before can have the number of the one that may connect. The guest tries
        // until it is let in.
        match listen(&run_dir) {
            Ok(listener) => Ok(Self { vm, devices, listener: Some(listener), run_dir }),
            Err(error) => {
                vm.kill().await;
                Err(error.into())
            }
        }
    }

    /// Waits for the guest's one connection, and takes no other after it. Connections of processes that aren't this
    /// machine's are closed.
    pub(crate) async fn connected(&mut self, limit: Duration) -> Result<net::UnixStream, ConnectError> {
        let failed = |run_dir: &RunDir| {
            let path = run_dir.path().to_owned();
            move |source| FileError { action: "accept the guest's connection in", path, source }
        };
        let Some(listener) = self.listener.take() else {
            return Err(failed(&self.run_dir)(io::ErrorKind::NotConnected.into()).into());
        };
        let pid = self.vm.connecting_pid();
        tokio::select! {
            // The death first: the number of a process that is reaped proves nothing. The connections last, so that no
            // flood of them keeps the others from being looked at.
            biased;
            death = self.died() => Err(ConnectError::Died(death)),
            () = tokio::time::sleep(limit) => {
                Err(ConnectError::Timeout { limit, console: self.vm.console() })
            }
            accepted = accept_from(&listener, pid) => {
                let stream = accepted.and_then(UnixStream::into_std);
                let stream = stream.and_then(|stream| stream.set_nonblocking(false).map(|()| stream));
                Ok(stream.map_err(failed(&self.run_dir))?)
            }
        }
    }

    /// The first death of a process that the machine needs. Cancel safe, and can be called again.
    ///
    /// A VMM that ends hangs up on its devices, which then end with success and may be noticed first; the VMM's last
    /// words explain the end. A device that fails is no consequence of anything.
    pub(crate) async fn died(&mut self) -> Death {
        let Self { vm, devices, .. } = self;
        let first = async {
            if devices.is_empty() {
                return std::future::pending().await;
            }
            select_all(devices.iter_mut().map(|device| device.died())).await.0
        };
        let death = tokio::select! {
            biased;
            death = first => death,
            death = vm.died() => return death,
        };
        if !death.status.success() {
            return death;
        }
        tokio::time::timeout(AFTERMATH, vm.died()).await.unwrap_or(death)
    }

    /// Tells when the file system of the scratch disk has no room, so that the guest's writes to the disk may have failed.
    pub(crate) fn host_is_full(&self) -> Option<FileError> {
        let room = statvfs(self.run_dir.path()).ok()?;
        (room.blocks_available() * room.fragment_size() < MIN_ROOM_BYTES).then(|| FileError {
            action: "keep what the build writes in",
            path: self.run_dir.path().to_owned(),
            source: nix::Error::ENOSPC.into(),
        })
    }

    /// Ends a machine whose guest has nothing left to do.
    pub(crate) async fn finish(mut self) {
        self.vm.end_in_order().await;
        self.kill().await;
    }

    /// Kills all its processes and waits until they are gone.
    pub(crate) async fn kill(mut self) {
        let Self { vm, devices, .. } = &mut self;
        tokio::join!(vm.kill(), join_all(devices.iter_mut().map(|device| device.kill())));
    }
}

/// Listens for the guest.
fn listen(run_dir: &RunDir) -> Result<UnixListener, FileError> {
    let failed = |source| FileError { action: "listen for the guest in", path: run_dir.path().to_owned(), source };
    let listener = run_dir.bind(&format!("{}_{PORT}", vmm::VSOCK))?;
    listener.set_nonblocking(true).map_err(failed)?;
    UnixListener::from_std(listener).map_err(failed)
}
