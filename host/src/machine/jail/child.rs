//! One helper process that runs, or has ended.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::fork::Started;
use super::spawner::Machine;
use super::tail::Tail;

/// How long the end of a child's output is waited for once it has ended. Only something that it started and that
/// still holds the pipe uses this up.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_millis(200);

/// How long a killed process is waited for where that blocks a thread, in seconds.
const DROP_PATIENCE_S: i64 = 1;

/// Something for the spawner's thread to do.
pub(super) type Job = Box<dyn FnOnce() + Send>;

/// Held by each child: as long as a sender lives, so does the spawner's thread.
pub(super) type KeepSpawner = mpsc::Sender<Job>;

/// A helper process. Dropping it kills it and everything in its process group, and waits a moment until it is dead, so
/// that what is done next with its files happens without it.
#[derive(Debug)]
pub struct Child {
    name: String,
    pid: u32,
    /// Readable once the process has ended.
    process: AsyncFd<OwnedFd>,
    /// Once it is reaped.
    status: Option<ExitStatus>,
    tail: Tail,
    reader: Option<JoinHandle<()>>,
    /// The thread that forked it must not end before it does.
    _spawner: KeepSpawner,
    /// No other machine gets its ids, and its cgroup stays, before this has ended.
    machine: Option<Machine>,
}

impl Child {
    /// Must be called within a tokio runtime.
    pub(super) fn new(
        name: String,
        Started { pid, pidfd }: Started,
        (tail, reader): (Tail, JoinHandle<()>),
        spawner: KeepSpawner,
        machine: Option<Machine>,
    ) -> io::Result<Self> {
        // SAFETY: nobody else has the descriptor, and it stays open and the same until it is dropped with what this returns.
        let process = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
        Ok(Self { name, pid, process, status: None, tail, reader: Some(reader), _spawner: spawner, machine })
    }

    /// Its name in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id, which is also that of its session and process group.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits until it has ended. Cancel safe; once it has ended, every call returns the same at once.
    pub async fn wait(&mut self) -> ExitStatus {
        let status = loop {
            if let Some(status) = self.reap() {
                break status;
            }
            match self.process.readable().await {
                Ok(mut ready) => ready.clear_ready(),
                Err(_) => break self.block(),
            }
        };
        if let Some(reader) = &mut self.reader {
            if tokio::time::timeout(LAST_WORDS_TIMEOUT, &mut *reader).await.is_err() {
                reader.abort();
            }
            self.reader = None;
        }
        status
    }

    /// The tail of its stdout and stderr, at most 16 KiB, with control characters escaped. Complete once
    /// [`wait`](Self::wait) has returned.
    pub fn said(&self) -> String {
        self.tail.text()
    }

    /// Whether its machine's helpers together needed more memory than they may have, so that the kernel killed them.
    pub fn is_out_of_memory(&self) -> bool {
        self.machine.as_ref().is_some_and(Machine::is_out_of_memory)
    }

    /// Kills it with SIGKILL, if it still runs, and reaps it.
    pub async fn kill(&mut self) -> ExitStatus {
        self.kill_group();
        self.wait().await
    }

    /// How it ended, if it has.
    fn reap(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = reap(self.process.get_ref(), WaitIdOptions::NOHANG);
        }
        self.status
    }

    /// For a runtime that is shutting down.
    fn block(&mut self) -> ExitStatus {
        let status = reap(self.process.get_ref(), WaitIdOptions::empty());
        *self.status.get_or_insert(status.unwrap_or(ExitStatus::from_raw(Signal::SIGKILL as i32)))
    }

    /// Its group and not it alone, since a program may be a wrapper around the real one. As long as it isn't reaped
    /// its number can't belong to anyone else.
    fn kill_group(&mut self) {
        if self.reap().is_none() {
            // The one error is that it has just ended, which is what is wanted.
            let _ = killpg(Pid::from_raw(self.pid.cast_signed()), Signal::SIGKILL);
        }
    }
}

/// How a process ended: nothing as long as it runs.
fn reap(process: &OwnedFd, options: WaitIdOptions) -> Option<ExitStatus> {
    match waitid(WaitId::PidFd(process.as_fd()), WaitIdOptions::EXITED | options) {
        Ok(None) => None,
        Ok(Some(ended)) => {
            let code = ended.exit_status().map(|code| (code & 0xff) << 8);
            Some(ExitStatus::from_raw(code.or(ended.terminating_signal()).unwrap_or_default()))
        }
        Err(rustix::io::Errno::INTR) => None,
        // The status of a child of our own that nobody else reaps can always be read (see `Spawner::new`). If it
        // nevertheless can't, the child is gone, and the way it went isn't known to be a good one.
        Err(_) => Some(ExitStatus::from_raw(Signal::SIGKILL as i32)),
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill_group();
        if self.status.is_none() {
            let mut ended = [PollFd::new(self.process.get_ref(), PollFlags::IN)];
            let _ = poll(&mut ended, Some(&Timespec { tv_sec: DROP_PATIENCE_S, tv_nsec: 0 }));
        }
        if self.reap().is_none()
            && let Ok(process) = self.process.get_ref().try_clone()
        {
            // The kernel still takes it apart.
            thread::spawn(move || reap(&process, WaitIdOptions::empty()));
        }
        if let Some(reader) = &self.reader {
            reader.abort();
        }
    }
}
