//! Walks a node of the store depth first.

use std::{
    collections::{HashMap, btree_map},
    ffi::OsStr,
    io::{self, SeekFrom},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use futures::executor::block_on;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};

use crate::{
    B3Digest, Directory, Node, PathComponent, Store, SymlinkTarget,
    export::{ExportError, closure},
};

/// Bytes of a blob that are in memory at a time.
const BUFFER_BYTES: usize = 512 * 1024;

/// A step of the walk.
pub(crate) enum Event<'a> {
    /// A directory begins; its entries follow, sorted by name.
    Enter,
    /// The innermost directory ends.
    Leave,
    /// A symbolic link.
    Symlink(&'a SymlinkTarget),
    /// A regular file begins; its contents follow.
    File {
        /// Bytes of contents.
        size: u64,
        /// Whether its owner may execute it.
        executable: bool,
    },
    /// A piece of the contents.
    Data(&'a [u8]),
    /// The file ends.
    EndFile,
}

/// Walks a node and everything below it. `sink` gets each event with the path from the root, which is empty for the root
/// itself. Every blob is checked against its digest.
///
/// Memory holds the directories and one piece of a file; depth costs no stack.
///
/// # Errors
///
/// Errors of the store name the entry's path below `name`. Errors of `sink` name `name` itself.
pub(crate) fn emit(
    store: &Store,
    node: &Node,
    name: &Path,
    interrupted: &dyn Fn() -> bool,
    sink: &mut dyn FnMut(&[u8], Event<'_>) -> io::Result<()>,
) -> Result<(), ExportError> {
    let mut emitter = Emitter { store, name, interrupted, sink, directories: HashMap::new(), path: Vec::new() };
    if let Node::Directory { digest, .. } = node {
        emitter.directories = closure(store, digest, name)?;
    }
    emitter.node(node)
}

struct Emitter<'a> {
    store: &'a Store,
    name: &'a Path,
    interrupted: &'a dyn Fn() -> bool,
    sink: &'a mut dyn FnMut(&[u8], Event<'_>) -> io::Result<()>,
    directories: HashMap<B3Digest, Directory>,
    /// The path from the root, with slashes.
    path: Vec<u8>,
}

/// A directory that is being walked, and the length of its path.
struct Level {
    nodes: btree_map::IntoIter<PathComponent, Node>,
    path_bytes: usize,
}

impl Emitter<'_> {
    fn node(&mut self, root: &Node) -> Result<(), ExportError> {
        let mut levels = Vec::from_iter(self.begin(root)?);
        while let Some(level) = levels.last_mut() {
            self.path.truncate(level.path_bytes);
            let Some((name, node)) = level.nodes.next() else {
                self.send(Event::Leave)?;
                levels.pop();
                continue;
            };
            if !self.path.is_empty() {
                self.path.push(b'/');
            }
            self.path.extend_from_slice(name.as_bytes());
            levels.extend(self.begin(&node)?);
        }
        Ok(())
    }

    /// Sends the events of a node. A directory only begins, and is returned to be walked.
    fn begin(&mut self, node: &Node) -> Result<Option<Level>, ExportError> {
        if (self.interrupted)() {
            return Err(ExportError::Interrupted);
        }
        match node {
            Node::Symlink { target } => self.send(Event::Symlink(target))?,
            Node::File { digest, size, executable } => {
                self.send(Event::File { size: *size, executable: *executable })?;
                let place = self.place();
                let (name, path, sink) = (self.name, &self.path, &mut self.sink);
                read_blob(self.store, digest, *size, &place, self.interrupted, &mut |bytes| {
                    sink(path, Event::Data(bytes)).map_err(|error| write_error(name, error))
                })?;
                self.send(Event::EndFile)?;
            }
            Node::Directory { digest, size } => {
                let Some(directory) = self.directories.get(digest) else {
                    return Err(ExportError::Missing { path: self.place(), what: "directory", digest: *digest });
                };
                let (expected, actual) = (*size, directory.sizes().expect(*size));
                if actual != expected {
                    let (path, digest) = (self.place(), *digest);
                    return Err(ExportError::Size { path, what: "directory", digest, expected, actual });
                }
                let nodes = directory.clone().into_nodes();
                self.send(Event::Enter)?;
                return Ok(Some(Level { nodes, path_bytes: self.path.len() }));
            }
        }
        Ok(None)
    }

    fn send(&mut self, event: Event<'_>) -> Result<(), ExportError> {
        (self.sink)(&self.path, event).map_err(|error| write_error(self.name, error))
    }

    fn place(&self) -> PathBuf {
        if self.path.is_empty() { self.name.to_owned() } else { self.name.join(OsStr::from_bytes(&self.path)) }
    }
}

fn write_error(name: &Path, source: io::Error) -> ExportError {
    ExportError::Write { path: name.to_owned(), action: "write it", source }
}

/// Reads a blob in pieces, and checks its size and its digest. `take` may get all pieces before a wrong digest shows.
/// Errors name `place`.
pub fn read_blob(
    store: &Store,
    digest: &B3Digest,
    size: u64,
    place: &Path,
    interrupted: &dyn Fn() -> bool,
    take: &mut dyn FnMut(&[u8]) -> Result<(), ExportError>,
) -> Result<(), ExportError> {
    let failed = |source| ExportError::Store { path: place.to_owned(), source };
    let Some(mut blob) = block_on(store.blobs.open_read(digest)).map_err(failed)? else {
        return Err(ExportError::Missing { path: place.to_owned(), what: "blob", digest: *digest });
    };
    let (mut hasher, mut actual) = (blake3::Hasher::new(), 0_u64);
    let mut buffer = vec![0; BUFFER_BYTES.min(usize::try_from(size.saturating_add(1)).unwrap_or(usize::MAX))];
    loop {
        let read = block_on(blob.read(&mut buffer)).map_err(failed)?;
        actual += read as u64;
        // Excess bytes are not passed on: `take` relies on the size.
        if actual > size {
            actual = block_on(blob.seek(SeekFrom::End(0))).map_err(failed)?;
            break;
        }
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
        take(&buffer[..read])?;
        if interrupted() {
            return Err(ExportError::Interrupted);
        }
    }
    if actual != size {
        let (path, digest) = (place.to_owned(), *digest);
        return Err(ExportError::Size { path, what: "blob", digest, expected: size, actual });
    }
    let found = B3Digest::from(hasher.finalize());
    if found != *digest {
        let message = format!("the blob {digest} has the digest {found}: the store is damaged");
        return Err(failed(io::Error::new(io::ErrorKind::InvalidData, message)));
    }
    Ok(())
}
