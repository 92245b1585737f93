use std::{
    cell::Cell,
    io::{self, Read, Seek, SeekFrom},
    rc::Rc,
};

use ::tar::{Archive, Entry, EntryType, PaxExtensions};

use super::{
    sparse::{self, Sparse},
    tree::Tree,
};
use crate::{
    Directory, Node, Store, SymlinkTarget,
    archive::{ArchiveError, Ingest, Limits},
};

/// What becomes of an archive's entries.
pub(super) trait Entries {
    fn directory(&mut self, path: &[u8], ingest: &mut Ingest) -> Result<(), ArchiveError>;

    /// A regular file; `mode` has its permissions.
    fn file(&mut self, path: &[u8], node: Node, mode: u32, ingest: &mut Ingest) -> Result<(), ArchiveError>;

    fn symlink(&mut self, path: &[u8], node: Node, ingest: &mut Ingest) -> Result<(), ArchiveError>;

    /// A hard link at `path` to an earlier entry, `target`.
    fn hard_link(&mut self, path: &[u8], target: &[u8], ingest: &mut Ingest) -> Result<(), ArchiveError>;

    /// A kind of file without a node, such as "a fifo".
    fn special(&mut self, path: &[u8], kind: &str, ingest: &mut Ingest) -> Result<(), ArchiveError>;
}

/// Limit, in bytes, for the headers of one entry, with long names and PAX records.
pub(super) const MAX_HEADER_BYTES: u64 = 1024 * 1024;

const OWNER_MAY_EXECUTE: u32 = 0o100;

/// Keys that a global PAX header may not have, since they would turn an entry into another one.
const MEANINGFUL: [&str; 3] = ["path", "linkpath", "size"];

/// Length of a header, in bytes.
const HEADER_BYTES: usize = 512;

/// Where a header has its entry's kind.
const KIND_AT: usize = 156;

/// The kind of a label of the whole archive, which is its first entry.
const LABEL: u8 = b'V';

/// Imports a tar archive, durably. Returns the node of the directory that it holds.
///
/// Blocks: call it from a thread that may.
///
/// # Errors
///
/// Names the entry where the archive is wrong or the store failed. Nothing becomes visible in the store.
pub fn import(store: &Store, archive: impl Read, limits: Limits) -> Result<Node, ArchiveError> {
    let mut ingest = Ingest::new(store, limits);
    let mut tree = Tree::new();
    read(archive, &mut tree, &mut ingest)?;
    finish(ingest, tree.into_directories()?)
}

/// Makes a tree visible, whose directories are sorted leaves first.
pub(super) fn finish(ingest: Ingest, directories: Vec<Directory>) -> Result<Node, ArchiveError> {
    let Some(root) = directories.last() else { unreachable!("there is always a root") };
    ingest.finish(root.to_node(), directories)
}

/// Reads an archive to its end.
pub(super) fn read(mut archive: impl Read, taken: &mut impl Entries, ingest: &mut Ingest) -> Result<(), ArchiveError> {
    let meter = Meter::default();
    let beginning = without_label(&mut archive).map_err(|error| ArchiveError::read(&[], error))?;
    let archive = beginning.chain(archive);
    let mut archive = Archive::new(Metered { inner: archive, meter: meter.clone() });
    let mut entries = archive.entries().map_err(|error| ArchiveError::read(&[], error))?;
    while let Some(entry) = meter.within(MAX_HEADER_BYTES, || entries.next()) {
        let mut entry = entry.map_err(|error| meter.failed(error))?;
        take(&mut entry, taken, ingest)?;
        // Otherwise the meter would count the rest as a header.
        let path = entry.path_bytes().into_owned();
        ingest.skip(&path, &mut entry)?;
    }
    if meter.ended.get() {
        return Err(ArchiveError::malformed(&[], "is cut short: the end that it must have is missing"));
    }
    // Padding, and the trailer of a compressed archive.
    ingest.skip(&[], &mut archive.into_inner())
}

/// The first header, or nothing if that is a label: GNU tar gives it no size, which the parser takes for damage.
fn without_label(archive: &mut impl Read) -> io::Result<io::Cursor<Vec<u8>>> {
    let mut header = Vec::with_capacity(HEADER_BYTES);
    archive.take(HEADER_BYTES as u64).read_to_end(&mut header)?;
    if header.get(KIND_AT) == Some(&LABEL) {
        header.clear();
    }
    Ok(io::Cursor::new(header))
}

fn take<R: Read>(entry: &mut Entry<'_, R>, taken: &mut impl Entries, ingest: &mut Ingest) -> Result<(), ArchiveError> {
    let path = entry.path_bytes().into_owned();
    let kind = entry.header().entry_type();
    if kind == EntryType::XGlobalHeader {
        ingest.entry(&path)?;
        return check_global_header(entry);
    }
    let sparse = described_as_sparse(entry, &path)?;
    match kind {
        // Older programs mark a directory by a slash alone.
        EntryType::Regular if path.ends_with(b"/") => taken.directory(&path, ingest),
        EntryType::Directory => taken.directory(&path, ingest),
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            let mode = entry.header().mode().map_err(|error| ArchiveError::malformed(&path, error.to_string()))?;
            let (size, executable) = (entry.size(), mode & OWNER_MAY_EXECUTE != 0);
            if !sparse.is_one() {
                let node = ingest.file(&path, entry, size, executable)?;
                return taken.file(&path, node, mode, ingest);
            }
            let path = sparse.name.clone().unwrap_or(path);
            let wrong = |rule| ArchiveError::malformed(&path, format!("is a sparse file, and {rule}"));
            let (size, mut contents) = sparse.expand(entry, size).map_err(wrong)?;
            let node = ingest.file(&path, &mut contents, size, executable)?;
            taken.file(&path, node, mode, ingest)
        }
        EntryType::Symlink => {
            let target = SymlinkTarget::try_from(link_name(entry))
                .map_err(|error| ArchiveError::malformed(&path, error.to_string()))?;
            taken.symlink(&path, Node::Symlink { target }, ingest)
        }
        EntryType::Link => taken.hard_link(&path, &link_name(entry), ingest),
        EntryType::Char => taken.special(&path, "a character device", ingest),
        EntryType::Block => taken.special(&path, "a block device", ingest),
        EntryType::Fifo => taken.special(&path, "a fifo", ingest),
        other if other.as_byte() == LABEL => ingest.entry(&path),
        other => Err(unsupported(&path, &format!("of the kind '{}'", other.as_byte().escape_ascii()))),
    }
}

pub(super) fn unsupported(path: &[u8], kind: &str) -> ArchiveError {
    let rule = format!("is {kind}; only directories, regular files and links can be imported");
    ArchiveError::malformed(path, rule)
}

fn link_name<R: Read>(entry: &Entry<'_, R>) -> Vec<u8> {
    entry.link_name_bytes().map(std::borrow::Cow::into_owned).unwrap_or_default()
}

fn described_as_sparse<R: Read>(entry: &mut Entry<'_, R>, path: &[u8]) -> Result<Sparse, ArchiveError> {
    let malformed = |error: io::Error| ArchiveError::malformed(path, error.to_string());
    let mut sparse = Sparse::default();
    for record in entry.pax_extensions().map_err(malformed)?.into_iter().flatten() {
        let record = record.map_err(malformed)?;
        sparse
            .record(record.key_bytes(), record.value_bytes())
            .map_err(|rule| ArchiveError::malformed(path, format!("is a sparse file, and {rule}")))?;
    }
    Ok(sparse)
}

fn check_global_header<R: Read>(entry: &mut Entry<'_, R>) -> Result<(), ArchiveError> {
    let mut header = Vec::new();
    let read = entry.take(MAX_HEADER_BYTES).read_to_end(&mut header);
    read.map_err(|error| ArchiveError::read(&[], error))?;
    for record in PaxExtensions::new(&header) {
        let record = record.map_err(|error| ArchiveError::malformed(&[], error.to_string()))?;
        let key = record.key_bytes();
        if MEANINGFUL.iter().any(|meaningful| key == meaningful.as_bytes())
            || key.starts_with(sparse::PREFIX.as_bytes())
        {
            let rule = format!("gives all entries the same \"{}\", which makes no sense", key.escape_ascii());
            return Err(ArchiveError::malformed(&[], rule));
        }
    }
    Ok(())
}

/// Limits the bytes that are read for headers, since the parser keeps them in memory, and notices the end of the input.
#[derive(Clone, Default)]
pub(super) struct Meter {
    /// Bytes that may be read; `None` for no limit.
    left: Rc<Cell<Option<u64>>>,
    ended: Rc<Cell<bool>>,
    /// The input itself failed, so the archive is not to blame.
    failed: Rc<Cell<bool>>,
}

impl Meter {
    pub(super) fn within<T>(&self, bytes: u64, read: impl FnOnce() -> T) -> T {
        self.left.set(Some(bytes));
        let done = read();
        self.left.set(None);
        done
    }

    pub(super) fn failed(&self, error: io::Error) -> ArchiveError {
        if self.failed.get() {
            ArchiveError::read(&[], error)
        } else if self.ended.get() {
            ArchiveError::read(&[], io::ErrorKind::UnexpectedEof.into())
        } else {
            ArchiveError::malformed(&[], format!("is not a tar archive, or is damaged: {error}"))
        }
    }
}

pub(super) struct Metered<R> {
    pub(super) inner: R,
    pub(super) meter: Meter,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.meter.left.get();
        let most = left.map_or(buffer.len(), |left| buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX)));
        if most == 0 && !buffer.is_empty() {
            return Err(io::Error::other(format!("the headers of one entry exceed {MAX_HEADER_BYTES} bytes")));
        }
        let read = self.inner.read(&mut buffer[..most]).inspect_err(|_| self.meter.failed.set(true))?;
        self.meter.ended.set(read == 0 && !buffer.is_empty());
        self.meter.left.set(left.map(|left| left - read as u64));
        Ok(read)
    }
}

impl<R: Seek> Seek for Metered<R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.inner.seek(to)
    }
}
