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
    io::{self, Write as _},
    ops::Range,
    os::{
        fd::AsFd as _,
        unix::fs::{FileExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};

use crate::B3Digest;

const COLLECTED: &str = "collected";

const ENTRY_BYTES: usize = 1 + B3Digest::LENGTH;

/// Room that is reserved on the disk, in bytes: on a full disk, a collection can begin.
const RESERVED_BYTES: i64 = 1 << 20;

/// Most bytes of the list. A collection that would exceed it ends before it removes more.
const MAX_BYTES: u64 = 256 << 20;

/// Most entries that are forgotten at a time.
const BATCH: usize = 1 << 15;

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

    /// Passes everything that was removed to `forget`, some of it at a time, and takes from the list what that has succeeded for.
    pub(crate) fn take(&self, mut forget: impl FnMut(Vec<(Kind, B3Digest)>) -> io::Result<()>) -> io::Result<()> {
        let file = Flock::lock(File::open(&self.path)?, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
        let mut left = whole_entries(&file)?;
        while left > 0 {
            let first = left.saturating_sub((BATCH * ENTRY_BYTES) as u64);
            forget(entries(&file, first..left)?)?;
            self.file.set_len(first)?;
            left = first;
        }
        self.file.set_len(0)?;
        self.reserve();
        Ok(())
    }

    /// Whether this has been removed since the last [`take`](Self::take).
    pub(crate) fn contains(&self, kind: Kind, digest: &B3Digest) -> io::Result<bool> {
        let file = Flock::lock(File::open(&self.path)?, FlockArg::LockShared).map_err(|(_, errno)| errno)?;
        let mut left = whole_entries(&file)?;
        while left > 0 {
            let first = left.saturating_sub((BATCH * ENTRY_BYTES) as u64);
            if entries(&file, first..left)?.contains(&(kind, *digest)) {
                return Ok(true);
            }
            left = first;
        }
        Ok(false)
    }

    fn reserve(&self) {
        // A file system without this has no room reserved.
        let _ = fallocate(self.file.as_fd(), FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, RESERVED_BYTES);
    }
}

/// The bytes of all entries. A killed process, or a full disk, may have left part of one behind them: what it names was not
/// removed.
fn whole_entries(file: &File) -> io::Result<u64> {
    let bytes = file.metadata()?.len();
    Ok(bytes - bytes % ENTRY_BYTES as u64)
}

fn entries(file: &File, range: Range<u64>) -> io::Result<Vec<(Kind, B3Digest)>> {
    let mut encoded = vec![0; usize::try_from(range.end - range.start).unwrap_or_default()];
    file.read_exact_at(&mut encoded, range.start)?;
    Ok(encoded.chunks_exact(ENTRY_BYTES).filter_map(decode).collect())
}

/// Notes that these objects are about to be removed from the store in `dir`.
pub(crate) fn note_collected(dir: &Path, kind: Kind, digests: &[B3Digest]) -> io::Result<()> {
    let path = dir.join(COLLECTED);
    let file = match OpenOptions::new().append(true).open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    let file = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    let bytes = whole_entries(&file)?;
    if bytes.saturating_add((digests.len() * ENTRY_BYTES) as u64) > MAX_BYTES {
        let message = format!("{} is full: start the daemon of this store, which empties it", path.display());
        return Err(io::Error::new(io::ErrorKind::QuotaExceeded, message));
    }
    file.set_len(bytes)?;
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
        collected.take(|_| Err(io::Error::other("not now"))).unwrap_err();
        assert!(
            collected.contains(Kind::Directory, &one).unwrap() && !collected.contains(Kind::Directory, &other).unwrap()
        );
        let expected = vec![(Kind::Blob, one), (Kind::Blob, other), (Kind::Directory, one)];
        let mut taken = Vec::new();
        collected
            .take(|some| {
                taken.extend(some);
                Ok(())
            })
            .unwrap();
        assert_eq!(taken, expected);
        assert!(collected.is_empty().unwrap());
    }

    #[test]
    fn a_long_list_is_read_in_pieces_and_a_full_one_ends_the_collection() {
        let dir = tempfile::tempdir().unwrap();
        let collected = Collected::open(dir.path()).unwrap();
        let digests: Vec<_> = (0..BATCH as u32 + 7).map(|number| B3Digest::of(&number.to_le_bytes())).collect();
        note_collected(dir.path(), Kind::Blob, &digests).unwrap();
        let (mut taken, mut calls) = (Vec::new(), 0);
        let mut take = |fails_at: usize| {
            collected.take(|some| {
                calls += 1;
                if calls == fails_at {
                    return Err(io::ErrorKind::StorageFull.into());
                }
                taken.extend(some);
                Ok(())
            })
        };
        take(2).unwrap_err();
        take(0).unwrap();
        assert_eq!(calls, 3);
        taken.sort_unstable();
        let mut expected: Vec<_> = digests.iter().map(|digest| (Kind::Blob, *digest)).collect();
        expected.sort_unstable();
        assert_eq!(taken, expected);
        collected.file.set_len(MAX_BYTES).unwrap();
        let full = note_collected(dir.path(), Kind::Blob, &digests[..1]).unwrap_err();
        assert!(full.to_string().contains("collected is full: start the daemon"), "{full}");
    }
}
