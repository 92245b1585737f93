//! What collections have removed, for whoever keeps something about the contents of a store.
//!
//! ```text
//!   DIR/collected   for each object that a collection is about to remove: a byte for its kind, then its digest;
//!                   locked while it is written, and while it is read and emptied
//! ```
//!
//! The file is there only if somebody reads it. A collection writes to it before it removes anything.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::{fd::AsFd as _, unix::fs::OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};

use crate::B3Digest;

const COLLECTED: &str = "collected";

const ENTRY_BYTES: usize = 1 + B3Digest::LENGTH;

/// Room that is reserved on the disk, in bytes: on a full disk, a collection can begin.
const RESERVED_BYTES: i64 = 1 << 20;

/// What a digest in a store names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// The contents of a file.
    Blob = 0,
    /// A directory.
    Directory = 1,
}

/// The reader's end of the list.
#[derive(Debug)]
pub(crate) struct Collected {
    path: PathBuf,
    file: File,
}

impl Collected {
    /// Opens the list of the store in `dir`. If it is missing, it is created, and collections write to it from now on.
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let path = dir.join(COLLECTED);
        let mut options = OpenOptions::new();
        let file = options.read(true).append(true).create(true).mode(0o600).open(&path)?;
        let collected = Self { path, file };
        collected.reserve();
        Ok(collected)
    }

    /// Whether nothing has been removed since the last [`take`](Self::take).
    pub(crate) fn is_empty(&self) -> io::Result<bool> {
        Ok(self.file.metadata()?.len() == 0)
    }

    /// Passes everything that was removed to `forget`, and empties the list if that succeeds.
    pub(crate) fn take<T>(&self, forget: impl FnOnce(Vec<(Kind, B3Digest)>) -> io::Result<T>) -> io::Result<T> {
        let file = Flock::lock(File::open(&self.path)?, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
        let mut encoded = Vec::new();
        (&*file).read_to_end(&mut encoded)?;
        // A killed process may have left part of an entry. What it names was not removed.
        let done = forget(encoded.chunks_exact(ENTRY_BYTES).filter_map(decode).collect())?;
        self.file.set_len(0)?;
        self.reserve();
        Ok(done)
    }

    fn reserve(&self) {
        // A file system without this has no room reserved.
        let _ = fallocate(self.file.as_fd(), FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, RESERVED_BYTES);
    }
}

/// Notes that these objects are about to be removed from the store in `dir`.
pub(crate) fn note_collected(dir: &Path, kind: Kind, digests: &[B3Digest]) -> io::Result<()> {
    let file = match OpenOptions::new().append(true).open(dir.join(COLLECTED)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    let file = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    let bytes = file.metadata()?.len();
    file.set_len(bytes - bytes % ENTRY_BYTES as u64)?;
    let encoded: Vec<_> = digests.iter().flat_map(|digest| [&[kind as u8], digest.as_slice()].concat()).collect();
    (&*file).write_all(&encoded)
}

fn decode(entry: &[u8]) -> Option<(Kind, B3Digest)> {
    let (kind, digest) = entry.split_first()?;
    let kind = match kind {
        0 => Kind::Blob,
        1 => Kind::Directory,
        _ => return None,
    };
    Some((kind, digest.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_removed_is_read_once_and_only_if_it_is_to_be() {
        let dir = tempfile::tempdir().unwrap();
        let [one, other] = [b"one", b"two"].map(|contents| B3Digest::of(contents));
        note_collected(dir.path(), Kind::Blob, &[one]).unwrap();
        let collected = Collected::open(dir.path()).unwrap();
        assert!(collected.is_empty().unwrap());
        note_collected(dir.path(), Kind::Blob, &[one, other]).unwrap();
        // A process is killed while it writes.
        (&collected.file).write_all(&[0, 1, 2]).unwrap();
        note_collected(dir.path(), Kind::Directory, &[one]).unwrap();
        assert!(!collected.is_empty().unwrap());
        collected.take(|_| Err::<(), _>(io::Error::other("not now"))).unwrap_err();
        let expected = vec![(Kind::Blob, one), (Kind::Blob, other), (Kind::Directory, one)];
        assert_eq!(collected.take(Ok).unwrap(), expected);
        assert!(collected.is_empty().unwrap());
    }
}
