//! Paths of the host that the operator lets builds see, shown read-only over a virtiofs share of their own.
//!
//! ```text
//!   request's available_ro_paths ──admit──▶ the configuration's host paths ──open──▶ descriptors
//!                                                                                       │ bind
//!   guest: bind of PATHS/N at the path ◀── paths.sock ◀── device ◀── open files ── opener ◀┘   each process confined
//! ```
//!
//! The device starts without paths, with its machine. Its guest's first look at one waits until they are bound, see [`Unbound`].
//!
//! A build sees the files, directories and symlinks below such a path that are on the same mount and readable by everybody.
//! The guest follows symlinks in its own root, never in the host's.
//!
//! A process can't give up rights to files and get others later. So the device, which talks to the guest from the start, never
//! finds or opens anything: it asks the opener. The opener goes from name to name with `openat2`, beneath the descriptor of the
//! shown directory, through directories that everybody may enter, and without following symlinks. It gives attributes, targets
//! of symlinks, and files and directories that everybody may read, open for that. It hears nothing of the device before it has the
//! paths and Landlock lets it read only in them. So a guest that takes the device over gains nothing, before it has paths or after.

mod device;
mod fs;
mod opener;
mod serve;
pub(super) mod testing;
#[cfg(test)]
mod tests;
mod wire;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

pub use device::{Device, Unbound};
pub(super) use fs::PathsFs;
pub use opener::OpenerError;
pub(super) use opener::run as run_opener;
pub(super) use serve::run;

/// Something of the host that a build is shown.
#[derive(Debug)]
pub struct Shown {
    file: File,
    is_directory: bool,
}

impl Shown {
    /// Opens a path of the host, following symlinks.
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
