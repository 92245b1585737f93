//! Paths of the host that the operator lets builds see, shown read-only over a virtiofs share of their own.
//!
//! ```text
//!   request's available_ro_paths ──admit──▶ the configuration's host paths ──open──▶ descriptors
//!                                                                                       │
//!                 guest: bind of PATHS/N at the path ◀── paths.sock ◀── device process, ▼ confined
//! ```
//!
//! What a build sees is what is below such a path on its own mount and readable by everybody: files, directories and
//! symlinks, which the guest follows in its own root, never in the host's. The device looks every path up anew, beneath
//! the descriptor of the shown directory and through no symlink, as the kernel's `openat2` makes sure; and Landlock lets
//! its process read in those directories alone. So a guest that takes the device over has what it is shown anyway.

mod device;
mod fs;
mod serve;
#[cfg(test)]
mod tests;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

pub use device::Device;
pub(super) use serve::run;

/// Something of the host that a build is shown.
#[derive(Debug)]
pub struct Shown {
    file: File,
    is_directory: bool,
}

impl Shown {
    /// Opens what is at a path of the host, where symlinks are followed.
    ///
    /// # Errors
    ///
    /// It can't be read, or is neither a file nor a directory.
    pub fn open(path: &Path) -> io::Result<Self> {
        // Who opens a device or a named pipe has done something with it already.
        let found = path.metadata()?;
        if !found.is_dir() && !found.is_file() {
            return Err(io::Error::other("only files and directories can be shown"));
        }
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
        Ok(Self { file, is_directory: found.is_dir() })
    }

    /// Whether it is a directory; else it is a file.
    pub fn is_directory(&self) -> bool {
        self.is_directory
    }
}
