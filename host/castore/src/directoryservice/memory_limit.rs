use std::{
    error::Error,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::proto::count_entries;

/// Memory of an entry, in bytes, beside its encoded bytes. An entry of a file or a symlink takes up to 350 bytes while its
/// directory is decoded and checked.
const ENTRY_BYTES: u64 = 384;

/// How often the encoded bytes of a directory are in memory while it is decoded, checked and kept.
const COPIES: u64 = 4;

/// Memory of a directory without entries, in bytes.
const DIRECTORY_BYTES: u64 = 512;

/// A bound on the memory of the directories of one tree. Its clones share it.
///
/// A directory is counted before it is decoded wherever its encoding is at hand: entries of a few bytes each take many times
/// the memory when they are decoded.
#[derive(Debug, Clone)]
pub struct DirectoryMemory {
    limit: u64,
    used: Arc<AtomicU64>,
}

/// Directories take more memory than they may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the directories take more than {limit} bytes of memory")]
pub struct DirectoryMemoryError {
    /// The bound, in bytes.
    pub limit: u64,
}

impl DirectoryMemoryError {
    /// The error of this kind that a directory service returned, if it is one.
    pub fn of(error: &io::Error) -> Option<Self> {
        error.get_ref().and_then(|inner| (inner as &(dyn Error + 'static)).downcast_ref()).copied()
    }
}

/// Unlimited.
impl Default for DirectoryMemory {
    fn default() -> Self {
        Self::unlimited()
    }
}

impl DirectoryMemory {
    /// At most so many bytes.
    pub fn limited(limit: u64) -> Self {
        Self { limit, used: Arc::default() }
    }

    /// Any number of bytes.
    pub fn unlimited() -> Self {
        Self::limited(u64::MAX)
    }

    /// The bytes of all directories so far.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// The bytes of a directory with an encoding of this length and so many entries.
    fn cost(encoded_bytes: usize, entries: usize) -> u64 {
        DIRECTORY_BYTES + COPIES * encoded_bytes as u64 + ENTRY_BYTES * entries as u64
    }

    /// Counts a directory that is about to be decoded.
    ///
    /// # Errors
    ///
    /// `QuotaExceeded` with a [`DirectoryMemoryError`], or `InvalidData` if these bytes are no directory.
    pub fn take(&self, encoded: &[u8]) -> io::Result<()> {
        let entries = count_entries(encoded).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        self.take_counted(encoded.len(), entries)
    }

    /// Counts a directory with an encoding of this length and so many entries.
    ///
    /// # Errors
    ///
    /// `QuotaExceeded` with a [`DirectoryMemoryError`].
    pub fn take_counted(&self, encoded_bytes: usize, entries: usize) -> io::Result<()> {
        self.add(Self::cost(encoded_bytes, entries))
    }

    fn add(&self, cost: u64) -> io::Result<()> {
        let add = |used: u64| used.checked_add(cost).filter(|sum| *sum <= self.limit);
        match self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add) {
            Ok(_) => Ok(()),
            Err(_) => Err(io::Error::new(io::ErrorKind::QuotaExceeded, DirectoryMemoryError { limit: self.limit })),
        }
    }

    /// Counts one more entry, with an encoding of this length, of a directory that has been counted.
    ///
    /// # Errors
    ///
    /// `QuotaExceeded` with a [`DirectoryMemoryError`].
    pub fn take_entry(&self, encoded_bytes: usize) -> io::Result<()> {
        self.add(Self::cost(encoded_bytes, 1) - Self::cost(0, 0))
    }

    /// Takes back what a directory was counted as, which was dropped.
    pub fn give_back(&self, encoded_bytes: usize, entries: usize) {
        self.used.fetch_sub(Self::cost(encoded_bytes, entries), Ordering::Relaxed);
    }

    /// Takes back what a directory was counted as, of which nothing is kept but the encoding.
    pub fn keep_encoded(&self, encoded_bytes: usize, entries: usize) {
        let kept = DIRECTORY_BYTES + encoded_bytes as u64;
        self.used.fetch_sub(Self::cost(encoded_bytes, entries) - kept, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Directory,
        testing::{name, symlink},
    };

    #[test]
    fn directories_are_counted_up_to_the_limit_and_can_be_given_back() {
        let directory = Directory::try_from_iter([(name("a"), symlink("b")), (name("c"), symlink("d"))]).unwrap();
        let encoded = directory.encode();
        let cost = DIRECTORY_BYTES + COPIES * 16 + ENTRY_BYTES * 2;
        let memory = DirectoryMemory::limited(2 * cost);
        let clone = memory.clone();
        memory.take(&encoded).unwrap();
        clone.take(&encoded).unwrap();
        let error = memory.take(&encoded).unwrap_err();
        assert_eq!(DirectoryMemoryError::of(&error), Some(DirectoryMemoryError { limit: 2 * cost }));
        assert_eq!(memory.used(), 2 * cost);
        memory.give_back(encoded.len(), 2);
        memory.take(&encoded).unwrap();
    }

    #[test]
    fn a_directory_that_grows_is_counted_like_a_whole_one_until_its_encoding_is_all_that_is_kept() {
        let whole = DirectoryMemory::unlimited();
        whole.take_counted(30, 2).unwrap();
        let growing = DirectoryMemory::limited(whole.used());
        growing.take_counted(0, 0).unwrap();
        growing.take_entry(10).unwrap();
        growing.take_entry(20).unwrap();
        assert_eq!(growing.used(), whole.used());
        assert!(growing.take_entry(0).is_err());
        growing.keep_encoded(30, 2);
        assert_eq!(growing.used(), DIRECTORY_BYTES + 30);
    }

    #[test]
    fn bytes_that_are_no_directory_are_refused() {
        let error = DirectoryMemory::unlimited().take(b"\xff").unwrap_err();
        assert_eq!((error.kind(), DirectoryMemoryError::of(&error)), (io::ErrorKind::InvalidData, None));
    }
}
