use std::io::{self, Read};

use futures::executor::block_on;
use tokio::io::AsyncWriteExt as _;

use super::{ArchiveError, Limits, WHOLE, shown};
use crate::{B3Digest, Directory, Node, Store, import::put_directories};

/// Bytes of a file that are in memory at a time.
const BUFFER_BYTES: usize = 512 * 1024;

/// Imports one archive. Counts against the limits, and makes nothing visible before [`Ingest::finish`].
pub(crate) struct Ingest {
    store: Store,
    limits: Limits,
    entries: u64,
    bytes: u64,
    buffer: Vec<u8>,
}

impl Ingest {
    pub(crate) fn new(store: &Store, limits: Limits) -> Self {
        Self { store: store.batch(), limits, entries: 0, bytes: 0, buffer: vec![0; BUFFER_BYTES] }
    }

    /// Counts the entry at `path`.
    pub(crate) fn entry(&mut self, path: &[u8]) -> Result<(), ArchiveError> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(ArchiveError::Limit { at: shown(path), what: "entries", limit: self.limits.entries });
        }
        Ok(())
    }

    /// Stores a file of exactly `size` bytes.
    pub(crate) fn file(
        &mut self,
        path: &[u8],
        contents: &mut dyn Read,
        size: u64,
        executable: bool,
    ) -> Result<Node, ArchiveError> {
        self.bytes(path, size)?;
        let failed = |source| ArchiveError::Store { at: shown(path), source };
        let mut writer = block_on(self.store.blobs.open_write());
        let mut left = size;
        while left > 0 {
            let piece = self.buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let read =
                read_some(contents, &mut self.buffer[..piece]).map_err(|error| ArchiveError::read(path, error))?;
            if read == 0 {
                return Err(ArchiveError::read(path, io::ErrorKind::UnexpectedEof.into()));
            }
            block_on(writer.write_all(&self.buffer[..read])).map_err(failed)?;
            left -= read as u64;
        }
        let digest: B3Digest = block_on(writer.close()).map_err(failed)?;
        Ok(Node::File { digest, size, executable })
    }

    /// Skips the rest of `contents`.
    pub(crate) fn skip(&mut self, path: &[u8], contents: &mut dyn Read) -> Result<(), ArchiveError> {
        loop {
            match read_some(contents, &mut self.buffer).map_err(|error| ArchiveError::read(path, error))? {
                0 => return Ok(()),
                read => self.bytes(path, read as u64)?,
            }
        }
    }

    /// Counts more bytes.
    fn bytes(&mut self, path: &[u8], bytes: u64) -> Result<(), ArchiveError> {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > self.limits.bytes {
            return Err(ArchiveError::Limit { at: shown(path), what: "bytes", limit: self.limits.bytes });
        }
        Ok(())
    }

    /// Makes the blobs durable and visible, then the directories, which are sorted leaves first.
    pub(crate) fn finish(self, root: Node, directories: Vec<Directory>) -> Result<Node, ArchiveError> {
        let failed = |source| ArchiveError::Store { at: WHOLE.to_owned(), source };
        block_on(self.store.blobs.commit()).map_err(failed)?;
        if !directories.is_empty() {
            put_directories(&self.store, directories).map_err(failed)?;
        }
        Ok(root)
    }
}

fn read_some(source: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match source.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => return read,
        }
    }
}
