//! Where a tar archive has its files.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Seek as _},
};

use ::tar::{Archive, EntryType};

use super::read::{MAX_HEADER_BYTES, Meter, Metered};
use crate::archive::ArchiveError;

/// A file of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Member {
    /// A regular file.
    File {
        /// Where its contents begin, in bytes from the beginning of the archive.
        offset: u64,
        /// Its length in bytes.
        size: u64,
    },
    /// A symbolic or hard link.
    Link {
        /// Its target.
        target: Vec<u8>,
        /// Whether the target is relative to the directory of the link, not of the archive.
        is_symbolic: bool,
    },
}

/// The files and links of an uncompressed archive by their paths, of which the last of each path counts. The contents are
/// not read.
///
/// # Errors
///
/// The archive is malformed, or has more than `limit` entries.
pub fn members(archive: &File, limit: u64) -> Result<BTreeMap<Vec<u8>, Member>, ArchiveError> {
    let meter = Meter::default();
    let mut inner = archive;
    inner.rewind().map_err(|error| ArchiveError::read(&[], error))?;
    let mut archive = Archive::new(Metered { inner, meter: meter.clone() });
    let mut entries = archive.entries_with_seek().map_err(|error| ArchiveError::read(&[], error))?;
    let mut members = BTreeMap::new();
    let mut count = 0;
    while let Some(entry) = meter.within(MAX_HEADER_BYTES, || entries.next()) {
        let entry = entry.map_err(|error: io::Error| meter.failed(error))?;
        count += 1;
        if count > limit {
            return Err(ArchiveError::Limit { at: "the archive".to_owned(), what: "entries", limit });
        }
        let target = || entry.link_name_bytes().map(std::borrow::Cow::into_owned).unwrap_or_default();
        let member = match entry.header().entry_type() {
            EntryType::Regular | EntryType::Continuous => {
                Member::File { offset: entry.raw_file_position(), size: entry.size() }
            }
            EntryType::Symlink => Member::Link { target: target(), is_symbolic: true },
            EntryType::Link => Member::Link { target: target(), is_symbolic: false },
            _ => continue,
        };
        members.insert(clean(&entry.path_bytes()), member);
    }
    Ok(members)
}

/// A path without slashes and dots that mean nothing.
fn clean(path: &[u8]) -> Vec<u8> {
    let parts: Vec<_> = path.split(|&byte| byte == b'/').filter(|part| !matches!(*part, b"" | b".")).collect();
    parts.join(&b'/')
}
