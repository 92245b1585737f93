//! A disk that runs full, for tests.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, fallocate},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::statvfs::statvfs,
};
use tempfile::TempDir;

/// Bytes by which the room grows from one attempt to the next: a page of the file system.
const STEP: u64 = 4096;

/// A file system of 32 MiB.
pub(crate) struct SmallDisk(TempDir);

impl SmallDisk {
    pub(crate) fn new() -> Self {
        let dir = TempDir::new().expect("a temporary directory can be made");
        mount(Some("small"), dir.path(), Some("tmpfs"), MsFlags::empty(), Some("size=32m")).expect("this needs root");
        Self(dir)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Fills it, but for so many bytes.
    pub(crate) fn fill(&self, but_bytes: u64) {
        let filler = fs::File::create(self.filler()).expect("there is room for a name");
        // Threads of the test may write meanwhile.
        loop {
            let found = statvfs(self.path()).expect("it is mounted");
            let free = found.blocks_available() * found.fragment_size();
            let bytes = free.saturating_sub(but_bytes).cast_signed();
            match if bytes > 0 { fallocate(&filler, FallocateFlags::empty(), 0, bytes) } else { Ok(()) } {
                Err(Errno::ENOSPC) => {}
                filled => return filled.expect("the file system can do this"),
            }
        }
    }

    pub(crate) fn make_room(&self) {
        fs::remove_file(self.filler()).expect("it was filled");
    }

    /// Has an operation end for want of space at each point where it writes, with more and more room until it succeeds. Each
    /// attempt gets its number. `check` is called after each, while there is no more room and again when there is. What fits
    /// into the operation's own files is tried again, so each attempt must need some room.
    pub(crate) fn at_each_point<T, E>(
        &self,
        attempt: impl Fn(usize) -> Result<T, E>,
        check: impl Fn(usize, &Result<T, E>),
    ) {
        let mut room = 0;
        for number in 0.. {
            self.fill(room);
            let done = attempt(number);
            check(number, &done);
            self.make_room();
            check(number, &done);
            match (done, room) {
                (Ok(_), 0) => {}
                (Ok(_), _) => return,
                (Err(_), _) => room += STEP,
            }
        }
    }

    fn filler(&self) -> PathBuf {
        self.path().join("filler")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        umount2(self.path(), MntFlags::MNT_DETACH).expect("it is mounted");
    }
}

/// Whether an error, or one that it is because of, is that the disk is full.
pub(crate) fn is_full(error: &(dyn std::error::Error + 'static)) -> bool {
    let full = io::Error::from_raw_os_error(nix::libc::ENOSPC).to_string();
    std::iter::successors(Some(error), |error| error.source()).any(|error| error.to_string().contains(&full))
}
