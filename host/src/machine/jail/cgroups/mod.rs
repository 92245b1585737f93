//! A cgroup for each machine, where a part of the host's tree is delegated to this process (systemd's `Delegate=`). It bounds
//! what the machine's helpers use together. See the kernel's `Documentation/admin-guide/cgroup-v2.rst`.
//!
//! ```text
//!   the delegated cgroup ─┬─ daemon          this process: a cgroup with limits for its children holds no process itself
//!                         ├─ machine-812-0   the helpers of one machine, from before they execute
//!                         └─ machine-812-1
//! ```

mod delegated;
mod limits;

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

pub(crate) use delegated::Delegated;
pub use limits::{DiskRates, Shares};

/// How long the processes of an ended machine are waited for, in seconds. They are dead by then; the kernel takes them apart.
const PATIENCE_S: i64 = 2;

/// The cgroups of this process's machines.
#[derive(Debug)]
pub(super) struct Cgroups {
    delegated: &'static Delegated,
    shares: Shares,
    /// The disk whose use `shares` bounds, as `MAJOR:MINOR`.
    disk: Option<String>,
}

/// Numbers the machines of this process.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// This process's cgroup, divided once.
static DIVIDED: LazyLock<Result<Delegated, String>> =
    LazyLock::new(|| Delegated::find().and_then(|delegated| delegated.divide().map(|()| delegated)));

impl Cgroups {
    /// Moves this process into a leaf of its cgroup, so that machines can have others.
    ///
    /// # Errors
    ///
    /// Why that can't be done.
    pub(super) fn new(shares: Shares) -> Result<Self, String> {
        let delegated = DIVIDED.as_ref().map_err(Clone::clone)?;
        let disk = delegated.disk(&shares)?;
        Ok(Self { delegated, shares, disk })
    }

    /// A cgroup for a machine of so much memory, in bytes, whose build has so many CPUs.
    ///
    /// # Errors
    ///
    /// It can't be made, or a limit of it can't be set.
    pub(super) fn machine(&self, memory_bytes: u64, cpus: u32) -> io::Result<Arc<Cgroup>> {
        let name = format!("machine-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let cgroup = Cgroup::make(self.delegated.path().join(name))?;
        for limit in self.shares.limits(memory_bytes, cpus, self.disk.as_deref()) {
            if self.delegated.has(limit.controller) {
                limit.set(&cgroup.path)?;
            }
        }
        Ok(Arc::new(cgroup))
    }
}

/// The cgroup of one machine. Dropping it kills what is left in it.
#[derive(Debug)]
pub(super) struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
    memory_events: Option<File>,
}

impl Cgroup {
    fn make(path: PathBuf) -> io::Result<Self> {
        fs::create_dir(&path).map_err(|error| named(&path, &error))?;
        let made = File::open(&path).map_err(|error| named(&path, &error));
        let directory = made.inspect_err(|_| drop(fs::remove_dir(&path)))?.into();
        Ok(Self { memory_events: File::open(path.join("memory.events")).ok(), path, directory })
    }

    /// How often the kernel has killed for memory in it.
    pub(super) fn is_out_of_memory(&self) -> bool {
        let Some(mut events) = self.memory_events.as_ref() else { return false };
        let mut text = String::new();
        let read = events.rewind().and_then(|()| events.read_to_string(&mut text));
        read.is_ok() && text.lines().any(|line| line.starts_with("oom_kill ") && line != "oom_kill 0")
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            tracing::warn!("a machine's cgroup stays behind: {error}");
        }
    }
}

/// Kills everything in a cgroup, and removes it.
fn remove(path: &Path) -> io::Result<()> {
    if fs::remove_dir(path).is_ok() {
        return Ok(());
    }
    let write = |file: &str, text: &str| fs::write(path.join(file), text).map_err(|error| named(path, &error));
    write("cgroup.kill", "1")?;
    let mut events = File::open(path.join("cgroup.events")).map_err(|error| named(path, &error))?;
    let mut text = String::new();
    // The kernel reports each change of the file as a priority event.
    while events.read_to_string(&mut text).is_ok() && text.contains("populated 1") {
        let mut changed = [PollFd::new(&events, PollFlags::PRI)];
        if poll(&mut changed, Some(&Timespec { tv_sec: PATIENCE_S, tv_nsec: 0 }))? == 0 {
            break;
        }
        text.clear();
        events.rewind()?;
    }
    fs::remove_dir(path).map_err(|error| named(path, &error))
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
