//! The closure of a request's inputs, checked before any VM boots.

mod closure;
mod heap;
#[cfg(test)]
mod tests;
mod walk;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::io;

use cofferdam_castore::directoryservice::{DirectoryMemory, DirectoryMemoryError};
use cofferdam_castore::{B3Digest, Directory, DirectoryError, Node, PathComponent, Store};
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use tokio::task::consume_budget;

use self::closure::{Closure, Known};
use self::heap::Returned;
use self::walk::Walk;
use crate::request::{RequestError, RequestErrorKind};

/// Most directories in a path, the root of the inputs left out.
pub const MAX_DEPTH: usize = 512;

/// Most different directories in one build's inputs.
pub const MAX_DIRECTORIES: usize = 1 << 20;

/// Most entries in all these directories, each directory counted once.
pub const MAX_ENTRIES: usize = 1 << 22;

/// Most bytes in one directory's encoding.
pub const MAX_DIRECTORY_BYTES: usize = 64 << 20;

/// Most bytes in the encodings of all directories.
pub const MAX_BYTES: usize = 512 << 20;

/// Most paths: a directory that is referred to from several places counts at each of them. Inode numbers stay below it.
pub const MAX_PATHS: u64 = 1 << 48;

/// How many blobs are asked for at a time; it matters for a store that is not on this machine.
const CONCURRENT_QUESTIONS: usize = 64;

/// Every time stamp of inputs, in seconds since the epoch: 2 January 1980. ZIP and FAT know no time before that year, in any time
/// zone.
pub const TIME: u64 = 315_619_200;

/// Every time stamp in a Nix store.
pub const NIX_TIME: u64 = 1;

/// Everything that a build may see of the store: a directory of its inputs and what lies below it.
#[derive(Debug)]
pub struct Tree {
    root: Known,
    directories: HashMap<B3Digest, Known>,
    blobs: HashSet<B3Digest>,
    /// Of what is read-only, in seconds since the epoch.
    time: u64,
    /// Paths below the root, a NUL after each.
    writable: Vec<u8>,
    /// Dropped last.
    heap: Returned,
}

impl Tree {
    /// The encoding of the directory that holds the inputs by their names.
    pub fn root(&self) -> &[u8] {
        &self.root.encoded
    }

    /// The encoding of a directory of the closure.
    pub fn directory(&self, digest: &B3Digest) -> Option<&[u8]> {
        self.directories.get(digest).map(|directory| &*directory.encoded)
    }

    /// Whether a file of the closure has these contents.
    pub fn has_blob(&self, digest: &B3Digest) -> bool {
        self.blobs.contains(digest)
    }

    /// This tree, of which the build has writable copies at these paths below the root.
    #[must_use]
    pub fn with_writable<'a>(mut self, paths: impl IntoIterator<Item = &'a str>) -> Self {
        self.writable = paths.into_iter().flat_map(|path| path.bytes().chain([0])).collect();
        self
    }

    /// This tree, with another time of everything that is read-only, in seconds since the epoch.
    #[must_use]
    pub fn with_time(mut self, time: u64) -> Self {
        self.time = time;
        self
    }

    /// The time of what is read-only, then the paths of writable copies, a NUL after each.
    pub(super) fn appearance(&self) -> Vec<u8> {
        [&self.time.to_le_bytes(), &*self.writable].concat()
    }

    /// Different directories, the root left out.
    pub fn directory_count(&self) -> usize {
        self.directories.len()
    }

    /// Different file contents.
    pub fn blob_count(&self) -> usize {
        self.blobs.len()
    }

    /// Most memory that it takes in this process and in the process of a device that serves it, together, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.heap.0.used()
    }
}

/// A place in a request's inputs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Which input, from 0, in the order of their names.
    pub input: usize,
    /// Its path from the root of the inputs, with escapes.
    pub path: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "inputs[{}] (\"{}\")", self.input, self.path)
    }
}

/// A fault of the inputs, or of their store.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// The store lacks a directory or a blob.
    #[error("{place}: the store has no {kind} {digest}; import it first")]
    Missing {
        /// Where it is referred to.
        place: Place,
        /// "directory" or "blob".
        kind: &'static str,
        /// What is missing.
        digest: B3Digest,
    },
    /// A reference to a directory says that it has another number of entries than it has.
    #[error("{place}: the directory {digest} has {actual} entries below it, not {claimed} as the reference to it says")]
    Size {
        /// Where it is referred to.
        place: Place,
        /// The directory.
        digest: B3Digest,
        /// What the directory itself says.
        actual: u64,
        /// What the reference says.
        claimed: u64,
    },
    /// The inputs exceed a limit.
    #[error("{place}: exceeds the limit of {limit} {what}")]
    Limit {
        /// Where it is reached.
        place: Place,
        /// What is counted.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The directories of all inputs take too much memory.
    #[error(
        "{place}: with it, the directories of all inputs take more memory than inputs_memory, which is {limit} bytes"
    )]
    Memory {
        /// The input with which they do.
        place: Place,
        /// The limit, in bytes.
        limit: u64,
    },
    /// The inputs together are more than one directory can hold.
    #[error("inputs: don't fit into one directory")]
    Root(#[source] DirectoryError),
    /// The store can't be read.
    #[error("{place}: the store can't be read")]
    Store {
        /// What was being looked for.
        place: Place,
        /// What the store said.
        #[source]
        source: io::Error,
    },
}

impl ResolveError {
    /// The error as one of the request's, unless it is the store that failed.
    pub fn missing(&self) -> Option<RequestError> {
        let field = |place: &Place| format!("inputs[{}]", place.input);
        Some(match self {
            Self::Missing { place, kind, digest } => {
                let rule = format!("must be in the store, which has no {kind} for \"{}\"", place.path);
                RequestError::new(RequestErrorKind::Missing, field(place), rule).got(digest)
            }
            Self::Size { place, actual, claimed, .. } => {
                let rule = format!("must have its real size, which is {actual}, at \"{}\"", place.path);
                RequestError::new(RequestErrorKind::Invalid, field(place), rule).got(claimed)
            }
            Self::Limit { place, what, limit } => {
                let rule = format!("must not exceed the limit of {limit} {what}, and does at \"{}\"", place.path);
                RequestError::new(RequestErrorKind::Unsupported, field(place), rule)
            }
            Self::Memory { place, limit } => RequestError::new(
                RequestErrorKind::Unsupported,
                field(place),
                format!("must leave the directories of all inputs within inputs_memory, which is {limit} bytes"),
            ),
            Self::Root(source) => RequestError::new(
                RequestErrorKind::Unsupported,
                "inputs",
                format!("must fit into a directory: {source}"),
            ),
            Self::Store { .. } => return None,
        })
    }
}

/// Reads every directory below the inputs within this memory, and checks that every blob is there.
///
/// It takes a while, but yields often with any store, so that dropping it stops it soon.
///
/// # Errors
///
/// Names the place where something missing, wrong or excessive is referred to.
pub async fn resolve(
    store: &Store,
    inputs: &BTreeMap<PathComponent, Node>,
    memory: DirectoryMemory,
) -> Result<Tree, ResolveError> {
    let entries = inputs.iter().map(|(name, node)| (name.clone(), node.clone()));
    let root = Directory::try_from_iter(entries).map_err(ResolveError::Root)?;
    let nowhere = || Place { input: 0, path: String::new() };
    if root.size() > MAX_PATHS {
        return Err(ResolveError::Limit { place: nowhere(), what: "paths in all inputs", limit: MAX_PATHS });
    }
    let encoded = root.encode();
    memory.take_counted(encoded.len(), root.len()).map_err(|source| unread(nowhere(), source))?;

    // Dropped after what it is about.
    let heap = Returned(memory.clone());
    let mut closure = Closure::new(memory);
    let root = closure.known(&root, encoded).await;
    for (input, (name, node)) in inputs.iter().enumerate() {
        if let Node::Directory { digest, .. } = node {
            closure.read(store, digest, || Place { input, path: name.to_string() }).await?;
        }
    }
    let Closure { directories, blobs, .. } = closure;
    Walk::new(&root, &directories).check().await?;
    if let Err((digest, failure)) = all_there(store, &blobs).await {
        let place = Walk::new(&root, &directories).find_blob(&digest).await?;
        return Err(match failure {
            None => ResolveError::Missing { place, kind: "blob", digest },
            Some(source) => ResolveError::Store { place, source },
        });
    }
    // What decoded directories have left.
    heap.now();
    Ok(Tree { root, directories, blobs, time: TIME, writable: Vec::new(), heap })
}

/// Fails with the first blob that isn't there (`None`) or can't be asked for.
async fn all_there(store: &Store, blobs: &HashSet<B3Digest>) -> Result<(), (B3Digest, Option<io::Error>)> {
    stream::iter(blobs.iter().copied())
        .map(|digest| async move {
            consume_budget().await;
            match store.blobs.has(&digest).await {
                Ok(true) => Ok(()),
                Ok(false) => Err((digest, None)),
                Err(error) => Err((digest, Some(error))),
            }
        })
        .buffer_unordered(CONCURRENT_QUESTIONS)
        .try_collect()
        .await
}

/// A directory could not be read from the store, or there is no memory for it.
fn unread(place: Place, source: io::Error) -> ResolveError {
    match DirectoryMemoryError::of(&source) {
        Some(DirectoryMemoryError { limit }) => ResolveError::Memory { place, limit },
        None => ResolveError::Store { place, source },
    }
}
