//! Staging directories: each service keeps the blobs there that are not durable yet.
//!
//! ```text
//!   DIR/staging/            locked while one is created or leftovers are removed
//!   DIR/staging/PID-COUNT/  locked as long as its owner lives
//!   DIR/staging/PID-COUNT/N the Nth blob
//!   DIR/staging/PID-COUNT/begun
//!                           in a batch's directory; its time is when the batch began to rely on blobs
//! ```
//!
//! The kernel releases the locks of a dead owner, so a directory that can be locked is a leftover.

use std::{
    collections::HashSet,
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg, OFlag, openat},
    sys::stat::Mode,
    unistd::{UnlinkatFlags, unlinkat},
};

const BEGUN: &str = "begun";

/// Distinguishes the staging directories of one process.
static COUNT: AtomicU64 = AtomicU64::new(0);

/// A staging directory. Dropping it removes it with everything in it.
#[derive(Debug)]
pub(super) struct Staging {
    path: PathBuf,
    dir: Flock<File>,
    next: AtomicU64,
}

impl Staging {
    /// Creates a directory in `parent` for this owner alone, and records the time if the owner is a batch.
    pub(super) fn create(parent: &Path, is_batch: bool) -> io::Result<Self> {
        Self::try_create(parent, is_batch).map_err(|error| at_path(parent, &error))
    }

    fn try_create(parent: &Path, is_batch: bool) -> io::Result<Self> {
        let _making = lock(parent, FlockArg::LockExclusive)?;
        loop {
            let path = parent.join(format!("{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => {
                    let dir = lock(&path, FlockArg::LockExclusiveNonblock)?;
                    let staging = Self { path, dir, next: AtomicU64::new(0) };
                    if is_batch {
                        File::create_new(staging.path.join(BEGUN))?;
                    }
                    return Ok(staging);
                }
                // A process had this id before, or has it in another PID namespace.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The inodes of all blobs that living owners have staged in `parent`.
    pub(super) fn inodes(parent: &Path) -> io::Result<HashSet<u64>> {
        let mut inodes = HashSet::new();
        for owner in fs::read_dir(parent)? {
            let blobs = match fs::read_dir(owner?.path()) {
                // Its owner has just removed it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                blobs => blobs?,
            };
            for blob in blobs {
                // Not the inode of the directory entry: on an overlay file system that is another number.
                match blob?.metadata() {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    metadata => drop(inodes.insert(metadata?.ino())),
                }
            }
        }
        Ok(inodes)
    }

    /// When the oldest living batch in `parent` began.
    pub(super) fn first_begun(parent: &Path) -> io::Result<Option<SystemTime>> {
        let mut first = None;
        for owner in fs::read_dir(parent)? {
            let begun = match fs::metadata(owner?.path().join(BEGUN)) {
                // The owner is no batch, is gone, or is about to begin.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                begun => begun?.modified()?,
            };
            first = Some(first.map_or(begun, |first: SystemTime| first.min(begun)));
        }
        Ok(first)
    }

    /// Removes the leftovers of dead owners in `parent`.
    pub(super) fn sweep(parent: &Path) -> io::Result<()> {
        let _sweeping = lock(parent, FlockArg::LockExclusive)?;
        for entry in fs::read_dir(parent)? {
            let path = entry?.path();
            match lock(&path, FlockArg::LockExclusiveNonblock) {
                Ok(_dead) => remove_leftover(&path)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Its owner has just removed it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The directory itself.
    pub(super) fn dir(&self) -> &File {
        &self.dir
    }

    /// Creates a file for a blob, and returns its number.
    pub(super) fn create_file(&self) -> io::Result<(u64, File)> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        let file = openat(&*self.dir, number.to_string().as_str(), flags, Mode::from_bits_retain(0o444))
            .map_err(|errno| at_path(&self.path, &errno.into()))?;
        Ok((number, file.into()))
    }

    /// The path of a blob's file.
    pub(super) fn path(&self, number: u64) -> PathBuf {
        self.path.join(number.to_string())
    }

    /// Opens a blob for reading.
    pub(super) fn open_file(&self, number: u64) -> io::Result<File> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(openat(&*self.dir, number.to_string().as_str(), flags, Mode::empty())?.into())
    }

    /// Removes a blob.
    pub(super) fn remove(&self, number: u64) -> io::Result<()> {
        Ok(unlinkat(&*self.dir, number.to_string().as_str(), UnlinkatFlags::NoRemoveDir)?)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // The next process to open the store removes leftovers.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// The same error with the path in its message.
pub(super) fn at_path(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Removes a directory that nobody has locked. Its owner may have removed it after it was opened here.
fn remove_leftover(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Locks a directory until the result is dropped.
pub(crate) fn lock(path: &Path, how: FlockArg) -> io::Result<Flock<File>> {
    let dir = File::open(path)?;
    if !dir.metadata()?.is_dir() {
        let message = format!("{}: only directories belong here: remove it", path.display());
        return Err(io::Error::new(io::ErrorKind::NotADirectory, message));
    }
    match Flock::lock(dir, how) {
        Ok(locked) => Ok(locked),
        Err((_, Errno::EWOULDBLOCK)) => Err(io::ErrorKind::WouldBlock.into()),
        Err((_, errno)) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_staging_directory_is_gone_when_its_owner_is() {
        let parent = tempfile::tempdir().unwrap();
        let staging = Staging::create(parent.path(), true).unwrap();
        staging.create_file().unwrap();
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
        let begun = fs::metadata(staging.path.join(BEGUN)).unwrap().modified().unwrap();
        let (_later_batch, _no_batch) =
            (Staging::create(parent.path(), true).unwrap(), Staging::create(parent.path(), false).unwrap());
        assert_eq!(Staging::first_begun(parent.path()).unwrap(), Some(begun));
        drop((_later_batch, _no_batch, staging));
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[test]
    fn only_unused_staging_files_are_swept() {
        let parent = tempfile::tempdir().unwrap();
        let living = Staging::create(parent.path(), true).unwrap();
        let dead = parent.path().join("1-0");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join("0"), "half").unwrap();
        Staging::sweep(parent.path()).unwrap();
        assert!(!dead.exists());
        assert!(living.path.exists());
        living.create_file().unwrap();
    }

    #[test]
    fn a_leftover_that_its_owner_has_removed_meanwhile_is_no_error() {
        let parent = tempfile::tempdir().unwrap();
        let staging = Staging::create(parent.path(), true).unwrap();
        let path = staging.path.clone();
        let opened = File::open(&path).unwrap();
        drop(staging);
        let _held = Flock::lock(opened, FlockArg::LockExclusiveNonblock).unwrap();
        remove_leftover(&path).unwrap();
    }
}
