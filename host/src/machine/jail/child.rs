//! One helper process that runs, or has ended.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::tail::Tail;

/// How long the end of a child's output is waited for once it has ended. Only something that it started and that
/// still holds the pipe uses this up.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_millis(200);

/// How long a killed process is waited for where that blocks a thread.
const DROP_PATIENCE: Duration = Duration::from_secs(1);

/// Something for the spawner's thread to do.
pub(super) type Job = Box<dyn FnOnce() + Send>;

/// Held by each child: as long as a sender lives, so does the spawner's thread.
pub(super) type KeepSpawner = mpsc::Sender<Job>;

/// A helper process. Dropping it kills it and whatever is in its process group, and waits a moment until it is dead, so
/// that what is done next with its files happens without it.
#[derive(Debug)]
pub struct Child {
    name: String,
    pid: u32,
    process: tokio::process::Child,
    tail: Tail,
    reader: Option<JoinHandle<()>>,
    /// The thread that forked it must not end before it does.
    _spawner: KeepSpawner,
}

impl Child {
    pub(super) fn new(
        name: String,
        pid: u32,
        process: tokio::process::Child,
        (tail, reader): (Tail, JoinHandle<()>),
        spawner: KeepSpawner,
    ) -> Self {
        Self { name, pid, process, tail, reader: Some(reader), _spawner: spawner }
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
        // The status of a child of our own that nobody else reaps can always be read (see `Spawner::new`). If it
        // nevertheless can't, the child is gone, and the way it went isn't known to be a good one.
        let status = self.process.wait().await.unwrap_or_else(|_| ExitStatus::from_raw(Signal::SIGKILL as i32));
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

    /// Kills it with SIGKILL, if it still runs, and reaps it.
    pub async fn kill(&mut self) -> ExitStatus {
        self.kill_group();
        self.wait().await
    }

    /// Its group and not it alone, since a program may be a wrapper around the real one. As long as it isn't reaped
    /// its number can't belong to anyone else.
    fn kill_group(&self) {
        if self.process.id().is_some() {
            // The one error is that it has just ended, which is what is wanted.
            let _ = killpg(Pid::from_raw(self.pid.cast_signed()), Signal::SIGKILL);
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill_group();
        let deadline = Instant::now() + DROP_PATIENCE;
        let runs = || {
            // Left unreaped, which is the runtime's task.
            let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
            matches!(waitid(Id::Pid(Pid::from_raw(self.pid.cast_signed())), flags), Ok(WaitStatus::StillAlive))
        };
        while self.process.id().is_some() && runs() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        if let Some(reader) = &self.reader {
            reader.abort();
        }
    }
}
