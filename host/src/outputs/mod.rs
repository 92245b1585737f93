//! Ingests outputs as the guest sends them over vsock. One pass checks, scans and stores them. Memory holds the open
//! directories, and the encodings of those that are complete; both are bounded.
//!
//! ```text
//!   tree::Event ─▶ tree::Check ─▶ names, targets, contents ─▶ refscan
//!                                    │            │
//!                                    │            └▶ BlobWriter (hashes as it writes)
//!                                    └▶ Directory of each open directory ─▶ DirectoryPutter, leaves first
//!
//!   commit: all blobs with one sync, then the directories of each output
//! ```
//!
//! Nothing from the guest is visible in the store before [`Receiver::commit`].

mod differences;

use std::{io, mem};

use cofferdam_castore::{
    Directory, Node, PathComponent, Store, SymlinkTarget,
    blobservice::BlobWriter,
    directoryservice::{DirectoryMemory, DirectoryPutter},
    refscan::{ReferencePattern, ReferenceScanner},
};
use cofferdam_protocol::tree::{self, Event, TreeError};
use tokio::{io::AsyncWriteExt, runtime::Handle};

pub(crate) use differences::{Difference, Differences};

use crate::request::BuildOutput;

/// Most memory for the directories of all outputs of a build, in bytes, as [`DirectoryMemory`] counts it: of one directory
/// with about 180,000 files, or of a million files in many.
pub(crate) const MAX_DIRECTORY_MEMORY_BYTES: u64 = 128 << 20;

/// Most bytes of an encoded entry, beside its name and target.
const ENTRY_BYTES: usize = 64;

/// Why an event was refused.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The guest broke a rule of the tree stream.
    #[error("the tree stream is malformed")]
    Tree(#[source] TreeError),
    /// The directories take more than [`MAX_DIRECTORY_MEMORY_BYTES`].
    #[error("the directories of the outputs can't be kept in memory")]
    DirectoryMemory(#[source] io::Error),
    /// The store failed.
    #[error("can't store the outputs")]
    Store(#[source] io::Error),
}

/// Receives the outputs of one build, one after the other.
///
/// It blocks its thread while the store writes.
pub struct Receiver<'a> {
    store: &'a Store,
    handle: Handle,
    check: tree::Check,
    needles: &'a ReferencePattern,
    scanner: ReferenceScanner,
    memory: DirectoryMemory,
    /// The open directories, outermost first.
    open: Vec<OpenDirectory>,
    file: Option<OpenFile>,
    root: Option<Node>,
    putter: Option<Box<dyn DirectoryPutter + 'a>>,
    /// The directories of complete outputs, to be closed by [`Receiver::commit`].
    putters: Vec<Box<dyn DirectoryPutter + 'a>>,
}

struct OpenDirectory {
    name: Vec<u8>,
    directory: Directory,
    encoded_bytes: usize,
}

struct OpenFile {
    name: Vec<u8>,
    executable: bool,
    size: u64,
    writer: Box<dyn BlobWriter>,
}

impl<'a> Receiver<'a> {
    /// Receives into `store`, looking for `needles`, within `limits` for all outputs together.
    pub fn new(store: &'a Store, handle: Handle, needles: &'a ReferencePattern, limits: tree::Limits) -> Self {
        Self {
            store,
            handle,
            check: tree::Check::new(limits),
            needles,
            scanner: needles.scanner(),
            memory: DirectoryMemory::limited(MAX_DIRECTORY_MEMORY_BYTES),
            open: Vec::new(),
            file: None,
            root: None,
            putter: None,
            putters: Vec::new(),
        }
    }

    /// Whether an output has begun, but not ended.
    pub fn is_inside_tree(&self) -> bool {
        self.root.is_none() && (self.file.is_some() || !self.open.is_empty())
    }

    /// Takes one event of the current output. Returns the output after its last event.
    ///
    /// # Errors
    ///
    /// The guest broke a rule, or the store failed. The receiver must not be used after that.
    pub fn take(&mut self, event: &Event<'_>) -> Result<Option<BuildOutput>, ReceiveError> {
        self.check.admit(event).map_err(ReceiveError::Tree)?;
        match *event {
            Event::Directory { name } => {
                self.scanner.scan_whole(name);
                self.memory.take_counted(0, 0).map_err(ReceiveError::DirectoryMemory)?;
                let name = name.to_owned();
                self.open.push(OpenDirectory { name, directory: Directory::default(), encoded_bytes: 0 });
            }
            Event::File { name, executable } => {
                self.scanner.scan_whole(name);
                let writer = self.handle.block_on(self.store.blobs.open_write());
                self.file = Some(OpenFile { name: name.to_owned(), executable, size: 0, writer });
            }
            Event::Symlink { name, target } => {
                self.scanner.scan_whole(name);
                self.scanner.scan_whole(target);
                let target = SymlinkTarget::try_from(target).map_err(refused)?;
                self.place(name, Node::Symlink { target })?;
            }
            Event::Data(bytes) => {
                let Some(file) = &mut self.file else { return Ok(None) };
                self.scanner.feed(bytes);
                file.size += bytes.len() as u64;
                self.handle.block_on(file.writer.write_all(bytes)).map_err(ReceiveError::Store)?;
            }
            Event::End => self.close_innermost()?,
        }
        let Some(node) = self.root.take_if(|_| self.check.is_complete()) else { return Ok(None) };
        self.check.next_tree().map_err(ReceiveError::Tree)?;
        self.putters.extend(self.putter.take());
        let scanner = mem::replace(&mut self.scanner, self.needles.scanner());
        Ok(Some(BuildOutput { node, needles: scanner.found() }))
    }

    /// Makes all complete outputs durable: one sync for all blobs, then the directories that refer to them.
    ///
    /// # Errors
    ///
    /// The store failed.
    pub fn commit(mut self) -> io::Result<()> {
        self.handle.block_on(async {
            self.store.blobs.commit().await?;
            for putter in &mut self.putters {
                putter.close().await?;
            }
            Ok(())
        })
    }

    fn close_innermost(&mut self) -> Result<(), ReceiveError> {
        if let Some(mut file) = self.file.take() {
            self.scanner.end_stream();
            let digest = self.handle.block_on(file.writer.close()).map_err(ReceiveError::Store)?;
            return self.place(&file.name, Node::File { digest, size: file.size, executable: file.executable });
        }
        let Some(OpenDirectory { name, directory, encoded_bytes }) = self.open.pop() else { return Ok(()) };
        let (size, entries) = (directory.size(), directory.len());
        let store = self.store;
        let putter = self.putter.get_or_insert_with(|| store.directories.put_multiple_start());
        let digest = directory.digest();
        self.handle.block_on(putter.put(directory)).map_err(ReceiveError::Store)?;
        self.memory.keep_encoded(encoded_bytes, entries);
        self.place(&name, Node::Directory { digest, size })
    }

    fn place(&mut self, name: &[u8], node: Node) -> Result<(), ReceiveError> {
        match self.open.last_mut() {
            None => self.root = Some(node),
            Some(parent) => {
                let target = if let Node::Symlink { target } = &node { target.as_ref().len() } else { 0 };
                let encoded_bytes = name.len() + target + ENTRY_BYTES;
                self.memory.take_entry(encoded_bytes).map_err(ReceiveError::DirectoryMemory)?;
                parent.encoded_bytes += encoded_bytes;
                let name = PathComponent::try_from(name).map_err(refused)?;
                parent.directory.add(name, node).map_err(refused)?;
            }
        }
        Ok(())
    }
}

/// An error of castore's own types. The check has applied the same rules before; should the two differ, the stricter wins.
fn refused(error: impl std::error::Error + Send + Sync + 'static) -> ReceiveError {
    ReceiveError::Store(io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests;
