//! What tar and NAR share: one stream of bytes that holds a tree.
//!
//! ```text
//!   bytes ──decompress──▶ tar::read / nar::read ──▶ Ingest ──▶ blobs.commit(), then all directories, leaves first
//!   node  ──▶ emit ──▶ tar::write / nar::write ──compress──▶ bytes
//! ```
//!
//! Whoever made an archive is not trusted: nothing in it is allocated before it is there, files go to the store in pieces,
//! and entries, bytes and depth are bounded by [`Limits`] and [`MAX_DEPTH`].

use std::io;

mod compression;
mod emit;
mod ingest;

pub use compression::{Compression, Compressor, decompress};
pub use emit::read_blob;
pub(crate) use emit::{Event, emit};
pub(crate) use ingest::Ingest;

/// Most directories in a path of an archive: as many as the inputs of a build may have.
pub const MAX_DEPTH: usize = 512;

/// What one archive may hold at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Files, directories and symbolic links.
    pub entries: u64,
    /// Bytes in all files, and in what an archive holds beside them.
    pub bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { entries: 1_000_000, bytes: 64 << 30 }
    }
}

/// Why an archive could not be imported. Nothing of it is visible in the store.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The archive can't be read: the file system refused, or it is damaged below the level of its format.
    #[error("{at}: can't read the archive")]
    Read {
        /// Which entry; see [`ArchiveError::Malformed`].
        at: String,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// The archive breaks a rule of its format, or holds what castore can't.
    #[error("{at}: {rule}")]
    Malformed {
        /// The path of an entry, with escapes, or "the archive" where no entry is to blame.
        at: String,
        /// What is wrong, as in "its path is absolute".
        rule: String,
    },
    /// The archive holds more than was allowed.
    #[error("{at}: here the archive exceeds the limit of {limit} {what}")]
    Limit {
        /// Which entry; see [`ArchiveError::Malformed`].
        at: String,
        /// "entries" or "bytes".
        what: &'static str,
        /// How many.
        limit: u64,
    },
    /// The store could not take it.
    #[error("{at}: the store can't take it")]
    Store {
        /// Which entry; see [`ArchiveError::Malformed`].
        at: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What is at fault when no entry is.
pub(crate) const WHOLE: &str = "the archive";

/// The path of an entry for a message: never empty, on one line.
pub(crate) fn shown(path: &[u8]) -> String {
    if path.is_empty() { WHOLE.to_owned() } else { crate::escape(path) }
}

impl ArchiveError {
    pub(crate) fn malformed(path: &[u8], rule: impl Into<String>) -> Self {
        Self::Malformed { at: shown(path), rule: rule.into() }
    }

    pub(crate) fn read(path: &[u8], source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::UnexpectedEof => Self::malformed(path, "the archive is cut short here"),
            _ => Self::Read { at: shown(path), source },
        }
    }
}
