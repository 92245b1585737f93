//! Directories for work in progress. A result is renamed to its place when it is complete.

use std::path::{Path, PathBuf};
use std::{fs, io};

/// A new, empty directory at a fixed path. The caller must hold a lock, so that no other process uses the path.
///
/// Leftovers of a killed process are deleted first. Dropping this deletes the directory, unless it has been renamed.
#[derive(Debug)]
pub(crate) struct StagingDir(PathBuf);

impl StagingDir {
    pub(crate) fn create(path: PathBuf) -> io::Result<Self> {
        let directory = Self(path);
        directory.remove()?;
        fs::create_dir(&directory.0)?;
        Ok(directory)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

impl Drop for StagingDir {
    fn drop(&mut self) {
        // If this fails, the next `create` tries again and reports the error.
        let _ = self.remove();
    }
}
