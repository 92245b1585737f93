//! A node of the store, depth first.

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

/// What comes next in a tree.
pub(crate) enum Event<'a> {
    /// A directory, whose entries follow in the order of their names.
    Enter,
    /// The end of the innermost directory.
    Leave,
    /// A symbolic link.
    Symlink(&'a SymlinkTarget),
    /// A regular file, whose contents follow.
    File {
        /// Bytes that follow.
        size: u64,
        /// Whether its owner may execute it.
        executable: bool,
    },
    /// A piece of the contents of the file that came last.
    Data(&'a [u8]),
    /// The end of that file.
    EndFile,
}

/// Tells `sink` of a node and all below it, each with its path from the root, whose own is empty. Every blob is checked
/// against its digest.
///
/// Memory is bounded by the directories; depth costs no stack.
///
/// # Errors
///
/// The store's come with the entry's path below `name`; what the sink says is about `name` itself.
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
    /// From the root, with slashes between.
    path: Vec<u8>,
}

/// A directory whose entries are being told, and how long the path to it is.
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
                self.tell(Event::Leave)?;
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

    /// Tells of a node; of a directory only its begin.
    fn begin(&mut self, node: &Node) -> Result<Option<Level>, ExportError> {
        if (self.interrupted)() {
            return Err(ExportError::Interrupted);
        }
        match node {
            Node::Symlink { target } => self.tell(Event::Symlink(target))?,
            Node::File { digest, size, executable } => {
                self.tell(Event::File { size: *size, executable: *executable })?;
                let place = self.place();
                let (name, path, sink) = (self.name, &self.path, &mut self.sink);
                read_blob(self.store, digest, *size, &place, self.interrupted, &mut |bytes| {
                    sink(path, Event::Data(bytes)).map_err(|error| write_error(name, error))
                })?;
                self.tell(Event::EndFile)?;
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
                self.tell(Event::Enter)?;
                return Ok(Some(Level { nodes, path_bytes: self.path.len() }));
            }
        }
        Ok(None)
    }

    fn tell(&mut self, event: Event<'_>) -> Result<(), ExportError> {
        (self.sink)(&self.path, event).map_err(|error| write_error(self.name, error))
    }

    fn place(&self) -> PathBuf {
        if self.path.is_empty() { self.name.to_owned() } else { self.name.join(OsStr::from_bytes(&self.path)) }
    }
}

fn write_error(name: &Path, source: io::Error) -> ExportError {
    ExportError::Write { path: name.to_owned(), action: "write it", source }
}

/// Reads a blob in pieces and checks its size and its digest; the last piece may have been taken when it turns out that
/// they are wrong. `place` is for errors.
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
        // What is too long is not passed on: the size has been told already.
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
