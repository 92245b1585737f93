//! Disks that a test can fill.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    thread,
};

use nix::{
    fcntl::{FallocateFlags, fallocate},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::statvfs::statvfs,
};

const FILLER: &str = "filler";

/// A small file system in memory. Dropping it unmounts it.
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one of so many MiB in this directory, which is created.
    #[track_caller]
    pub fn at(place: &Path, mib: u32) -> Self {
        fs::create_dir_all(place).expect("a temporary directory can be written");
        let options = format!("size={mib}m,mode=0700");
        mount(Some("small"), place, Some("tmpfs"), MsFlags::empty(), Some(&*options)).expect("this needs root");
        Self(place.to_owned())
    }

    /// Bytes that are free.
    pub fn free(&self) -> u64 {
        let found = statvfs(&self.0).expect("it is mounted");
        found.blocks_available() * found.fragment_size()
    }

    /// Fills it, but for so many bytes.
    #[track_caller]
    pub fn fill(&self, but_bytes: u64) {
        let filler = File::options().append(true).create(true).open(self.0.join(FILLER)).expect("it can be written");
        let (begin, more) = (filler.metadata().expect("it is open").len(), self.free().saturating_sub(but_bytes));
        let [begin, more] = [begin, more].map(u64::cast_signed);
        if more > 0 {
            fallocate(&filler, FallocateFlags::empty(), begin, more).expect("there is so much space");
        }
    }

    /// Takes back what filled it.
    #[track_caller]
    pub fn relieve(&self) {
        fs::remove_file(self.0.join(FILLER)).expect("it was filled");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // A test that fails leaves processes, which would hide why.
        let flags = if thread::panicking() { MntFlags::MNT_DETACH } else { MntFlags::empty() };
        umount2(&self.0, flags).expect("nothing uses it any more");
    }
}
