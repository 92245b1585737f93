//! Shared by tar and NAR, both of which hold a tree in one stream of bytes.
//!
//! ```text
//!   bytes ──decompress──▶ tar::read / nar::read ──▶ Ingest ──▶ blobs.commit(), then all directories, leaves first
//!   node  ──▶ emit ──▶ tar::write / nar::write ──compress──▶ bytes
//! ```
//!
//! Archives are not trusted: memory is allocated only for bytes that have arrived, files go to the store in pieces, and
//! [`Limits`] and [`MAX_DEPTH`] limit entries, bytes and depth.

use std::io;

mod compression;
mod emit;
mod ingest;

pub use compression::{Compression, Compressor, decompress};
pub use emit::read_blob;
pub(crate) use emit::{Event, emit};
pub(crate) use ingest::Ingest;

/// Most directories in a path of an archive, the same limit as for inputs of a build.
pub const MAX_DEPTH: usize = 512;

/// Limits for one archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Files, directories and symbolic links.
    pub entries: u64,
    /// Bytes in all files, plus other bytes of the archive that are skipped.
    pub bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { entries: 1_000_000, bytes: 64 << 30 }
    }
}

/// Why an archive could not be imported. Nothing of it becomes visible in the store.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The archive can't be read, or can't be decompressed.
    #[error("{at}: can't read the archive")]
    Read {
        /// Which entry; see [`ArchiveError::Malformed`].
        at: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The archive breaks a rule of its format, or contains something that castore can't hold.
    #[error("{at}: {rule}")]
    Malformed {
        /// The path of the entry, with escapes, or "the archive".
        at: String,
        /// The rule, as in "its path is absolute".
        rule: String,
    },
    /// The archive exceeds a limit.
    #[error("{at}: the archive exceeds the limit of {limit} {what} here")]
    Limit {
        /// Which entry; see [`ArchiveError::Malformed`].
        at: String,
        /// "entries" or "bytes".
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The store failed.
    #[error("{at}: can't be stored")]
    Store {
        /// Which entry; see [`ArchiveError::Malformed`].
        at: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Stands for an entry in errors about the whole archive.
pub(crate) const WHOLE: &str = "the archive";

/// The path of an entry for messages: never empty, on one line.
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
