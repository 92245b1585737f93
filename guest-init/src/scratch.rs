//! The scratch disk: an ext4 file system without a journal, grown to the disk's size at every boot.

use std::{
    fs::{self, File},
    io::{self, Seek as _, SeekFrom},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    panic::resume_unwind,
    path::Path,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use cofferdam_protocol::Step;
use nix::{
    mount::{MsFlags, mount},
    poll::{PollFd, PollFlags},
    sys::{
        socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket},
        statvfs::{Statvfs, statvfs},
    },
};

use crate::{
    boot::Modules,
    error::{Context as _, SetupError},
    layout::{LAYERS, SCRATCH},
    sys,
};

const DEVICE: &str = "/dev/vda";

/// How long to wait for the device to appear.
const DEVICE_WAIT: Duration = Duration::from_secs(10);

/// The kernel's messages about devices, as a group of netlink.
const KERNEL_UEVENTS: u32 = 1;

/// The disk's contents are lost with the machine, so writes need no order and no flushes.
const OPTIONS: &str = "nobarrier,noauto_da_alloc,nodiscard";

/// With less free space than this, the disk counts as full. ext4 reserves some blocks for itself.
const FULL_BELOW_BYTES: u64 = 1024 * 1024;

/// The thread that prepares the disk.
#[derive(Debug)]
pub(crate) struct Preparation(JoinHandle<Result<Scratch, SetupError>>);

impl Preparation {
    /// Starts the thread.
    pub(crate) fn start() -> io::Result<Self> {
        thread::Builder::new().spawn(Scratch::prepare).map(Self)
    }

    /// Waits until the disk is mounted. Only a process with one thread can fork and go on.
    pub(crate) fn finish(self) -> Result<Scratch, SetupError> {
        // The hook of a panic doesn't return.
        self.0.join().unwrap_or_else(|panic| resume_unwind(panic))
    }
}

/// The mounted disk.
#[derive(Debug)]
pub(crate) struct Scratch {
    used_at_start: u64,
    was_full: bool,
}

impl Scratch {
    /// Loads the disk's modules, mounts it, and grows its file system to the disk's size.
    fn prepare() -> Result<Self, SetupError> {
        Modules::Scratch.load().context(Step::Scratch, || "load the disk's kernel modules")?;
        let size = wait_for_device().context(Step::Scratch, || format!("open the disk {DEVICE}"))?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
        mount(Some(DEVICE), SCRATCH, Some("ext4"), flags, Some(OPTIONS))
            .context(Step::Scratch, || format!("mount {DEVICE} as ext4"))?;
        grow(size).context(Step::Scratch, || format!("grow the file system on {DEVICE} to {size} bytes"))?;
        // Only now: with this option, growing would zero the new inode tables at once. Without it from now on, the
        // kernel would zero them in the background.
        mount(None::<&str>, SCRATCH, None::<&str>, flags | MsFlags::MS_REMOUNT, Some("noinit_itable"))
            .context(Step::Scratch, || format!("remount {DEVICE}"))?;
        fs::create_dir(LAYERS).context(Step::Scratch, || format!("make {LAYERS}"))?;
        let used_at_start = statvfs(SCRATCH).map(|stats| used(&stats)).context(Step::Scratch, || "stat the disk")?;
        Ok(Self { used_at_start, was_full: false })
    }

    /// Checks whether the disk is full now, and remembers it if so.
    pub(crate) fn check_full(&mut self) {
        if let Ok(stats) = statvfs(SCRATCH) {
            let free_bytes = stats.blocks_available() * stats.fragment_size();
            self.was_full |= is_full(free_bytes, stats.files(), stats.files_free());
        }
    }

    /// Whether any check found the disk full.
    pub(crate) fn was_full(&self) -> bool {
        self.was_full
    }

    /// Bytes that the build uses.
    pub(crate) fn used_bytes(&self) -> u64 {
        statvfs(SCRATCH).map_or(0, |stats| used(&stats).saturating_sub(self.used_at_start))
    }
}

fn used(stats: &Statvfs) -> u64 {
    (stats.blocks() - stats.blocks_free()) * stats.fragment_size()
}

fn is_full(free_bytes: u64, files: u64, free_files: u64) -> bool {
    free_bytes < FULL_BELOW_BYTES || (files > 0 && free_files == 0)
}

/// Waits for the disk, and returns its size in bytes.
fn wait_for_device() -> io::Result<u64> {
    let uevents = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::NetlinkKObjectUEvent,
    )?;
    bind(uevents.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_UEVENTS))?;
    let deadline = Instant::now() + DEVICE_WAIT;
    loop {
        match File::open(DEVICE).and_then(|mut disk| disk.seek(SeekFrom::End(0))) {
            Ok(size) => return Ok(size),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => next_message(&uevents, deadline)?,
        }
    }
}

/// Waits for messages, and drops them.
fn next_message(socket: &OwnedFd, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    sys::poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], left)?;
    // Even if some were lost, the device may be there.
    while recv(socket.as_raw_fd(), &mut [0], MsgFlags::empty()).is_ok() {}
    Ok(())
}

fn grow(device_bytes: u64) -> io::Result<()> {
    let block_bytes = statvfs(SCRATCH)?.block_size();
    let root = File::open(Path::new(SCRATCH))?;
    sys::resize_ext4(&root, device_bytes / block_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_without_free_bytes_or_free_inodes_is_full() {
        assert!(is_full(0, 100, 50));
        assert!(is_full(FULL_BELOW_BYTES - 1, 100, 50));
        assert!(is_full(1 << 30, 100, 0));
        assert!(!is_full(FULL_BELOW_BYTES, 100, 1));
    }

    #[test]
    fn a_file_system_without_a_count_of_inodes_is_not_full() {
        assert!(!is_full(1 << 30, 0, 0));
    }
}
