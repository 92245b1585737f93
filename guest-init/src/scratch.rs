//! The scratch disk: a sparse ext4 without a journal, grown to the device's size at every start.

use std::{
    fs::File,
    io::{self, Seek as _, SeekFrom},
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use cofferdam_protocol::Step;
use nix::{
    mount::{MsFlags, mount},
    sys::statvfs::{Statvfs, statvfs},
};

use crate::{
    SCRATCH,
    error::{Context as _, SetupError},
    sys,
};

const DEVICE: &str = "/dev/vda";

/// How long the device may take to appear.
const DEVICE_WAIT: Duration = Duration::from_secs(10);

/// Nothing on the disk outlives the machine, so nothing has to reach it in any order or at any time.
const OPTIONS: &str = "nobarrier,noauto_da_alloc,nodiscard";

/// With less room than this the disk counts as full; ext4 keeps some blocks back for itself.
const FULL_BELOW_BYTES: u64 = 1024 * 1024;

/// The mounted disk.
#[derive(Debug)]
pub(crate) struct Scratch {
    used_at_start: u64,
    was_full: bool,
}

impl Scratch {
    /// Mounts the disk and grows its file system to the device's size.
    pub(crate) fn prepare() -> Result<Self, SetupError> {
        let size = wait_for_device().context(Step::Scratch, || format!("open the disk {DEVICE}"))?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
        mount(Some(DEVICE), SCRATCH, Some("ext4"), flags, Some(OPTIONS))
            .context(Step::Scratch, || format!("mount {DEVICE} as ext4"))?;
        grow(size).context(Step::Scratch, || format!("grow the file system on {DEVICE} to {size} bytes"))?;
        // Growing zeroes the new inode tables at once if the background must not, and the background would from here on.
        mount(None::<&str>, SCRATCH, None::<&str>, flags | MsFlags::MS_REMOUNT, Some("noinit_itable"))
            .context(Step::Scratch, || format!("remount {DEVICE}"))?;
        let used_at_start = statvfs(SCRATCH).map(|room| used(&room)).context(Step::Scratch, || "stat the disk")?;
        Ok(Self { used_at_start, was_full: false })
    }

    /// Looks whether there is room now, and remembers if there is not.
    pub(crate) fn look(&mut self) {
        if let Ok(room) = statvfs(SCRATCH) {
            self.was_full |= is_full(room.blocks_available() * room.fragment_size(), room.files(), room.files_free());
        }
    }

    /// The disk was seen without room.
    pub(crate) fn was_full(&self) -> bool {
        self.was_full
    }

    /// Bytes that the build has in use.
    pub(crate) fn used_bytes(&self) -> u64 {
        statvfs(SCRATCH).map_or(0, |room| used(&room).saturating_sub(self.used_at_start))
    }
}

fn used(room: &Statvfs) -> u64 {
    (room.blocks() - room.blocks_free()) * room.fragment_size()
}

fn is_full(free_bytes: u64, files: u64, free_files: u64) -> bool {
    free_bytes < FULL_BELOW_BYTES || (files > 0 && free_files == 0)
}

/// Waits until the disk is there; returns its size in bytes.
fn wait_for_device() -> io::Result<u64> {
    let start = Instant::now();
    loop {
        match File::open(DEVICE).and_then(|mut disk| disk.seek(SeekFrom::End(0))) {
            Err(error) if start.elapsed() > DEVICE_WAIT => return Err(error),
            Err(_) => sleep(Duration::from_millis(5)),
            Ok(size) => return Ok(size),
        }
    }
}

fn grow(device_bytes: u64) -> io::Result<()> {
    let room = statvfs(SCRATCH)?;
    let root = File::open(Path::new(SCRATCH))?;
    sys::resize_ext4(&root, device_bytes / room.block_size())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_full_without_bytes_or_without_inodes() {
        assert!(is_full(0, 100, 50));
        assert!(is_full(FULL_BELOW_BYTES - 1, 100, 50));
        assert!(is_full(1 << 30, 100, 0));
        assert!(!is_full(FULL_BELOW_BYTES, 100, 1));
    }

    #[test]
    fn a_file_system_that_counts_no_inodes_is_not_full() {
        assert!(!is_full(1 << 30, 0, 0));
    }
}
