//! Clients of one daemon, each with a user of its own.

use std::{io, path::PathBuf};

use anyhow::Result;
use nix::libc;
use rustix::process::{getpriority_process, setpriority_process};
use tokio::{
    runtime::{Builder, Runtime},
    task::JoinHandle,
};
use tonic::transport::{Channel, Endpoint};

/// What makes calls, and so how much of the machine that it shares with the daemon it may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Honest,
    /// It would have a machine of its own. So its own work has the lowest priority, and only what it has the daemon do counts.
    Hostile,
}

/// A user of the daemon's socket. Everything that it does is done by one thread, which has its user id.
#[derive(Debug)]
pub(super) struct Tenant {
    runtime: Option<Runtime>,
    pub(super) socket: PathBuf,
}

impl Tenant {
    pub(super) fn new(socket: PathBuf, user: u32, kind: Kind) -> Result<Self> {
        let become_user = move || {
            if kind == Kind::Hostile {
                give_way().expect("a thread may lower its own priority");
            }
            // SAFETY: it changes the user of this thread alone, and takes no pointer.
            let changed = unsafe { libc::syscall(libc::SYS_setresuid, -1, user, -1) };
            assert_eq!(changed, 0, "{}", io::Error::last_os_error());
        };
        let runtime =
            Builder::new_multi_thread().worker_threads(1).enable_all().on_thread_start(become_user).build()?;
        Ok(Self { runtime: Some(runtime), socket })
    }

    /// Has the tenant do something.
    pub(super) fn spawn<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.runtime().spawn(work)
    }

    /// A new connection, made when it is first used.
    pub(super) fn channel(&self) -> Result<Channel> {
        let _entered = self.runtime().enter();
        Ok(Endpoint::from_shared(format!("unix:{}", self.socket.display()))?.connect_lazy())
    }

    fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().expect("it is taken at the end")
    }
}

/// Lowers the calling thread's priority as far below that of the daemon as it can be.
fn give_way() -> io::Result<()> {
    let niceness = getpriority_process(None)?;
    Ok(setpriority_process(None, niceness + 19)?)
}

impl Drop for Tenant {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
