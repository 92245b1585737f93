//! Directories in which something is prepared that shall appear whole.

use std::path::{Path, PathBuf};
use std::{fs, io};

/// A new directory at a fixed place, which only the holder of a lock uses: what a killed run left there is deleted
/// first, and whatever is there at the end too.
#[derive(Debug)]
pub(crate) struct Aside(PathBuf);

impl Aside {
    pub(crate) fn create(path: PathBuf) -> io::Result<Self> {
        let aside = Self(path);
        aside.remove()?;
        fs::create_dir(&aside.0)?;
        Ok(aside)
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

impl Drop for Aside {
    fn drop(&mut self) {
        // What can't be deleted now is in nobody's way: the next one here deletes it or says why not.
        let _ = self.remove();
    }
}
