//! The closure of a request's inputs, checked before any VM boots.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::io;

use cofferdam_castore::{B3Digest, Directory, DirectoryError, Node, PathComponent, Store};
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use tokio::task::{consume_budget, yield_now};

use crate::request::{RequestError, RequestErrorKind};

/// Most directories in a path, the root of the inputs left out.
pub const MAX_DEPTH: usize = 512;

/// Most different directories in one build's inputs.
pub const MAX_DIRECTORIES: usize = 1 << 20;

/// Most entries in all these directories, each directory counted once.
pub const MAX_ENTRIES: usize = 1 << 22;

/// Most bytes in one directory's encoding.
pub const MAX_DIRECTORY_BYTES: usize = 64 << 20;

/// Most bytes in the encodings of all directories, which the host's memory holds decoded.
pub const MAX_BYTES: usize = 512 << 20;

/// Most paths: a directory that is referred to from several places counts at each of them. Inode numbers stay below it.
pub const MAX_PATHS: u64 = 1 << 48;

/// How many blobs are asked for at a time; it matters for a store that is not on this machine.
const CONCURRENT_QUESTIONS: usize = 64;

/// Everything that a build may see of the store: a directory of its inputs and what lies below it.
#[derive(Debug)]
pub struct Tree {
    root: Directory,
    directories: HashMap<B3Digest, Directory>,
    blobs: HashSet<B3Digest>,
}

impl Tree {
    /// The directory that holds the inputs by their names.
    pub fn root(&self) -> &Directory {
        &self.root
    }

    /// A directory of the closure.
    pub fn directory(&self, digest: &B3Digest) -> Option<&Directory> {
        self.directories.get(digest)
    }

    /// Whether a file of the closure has these contents.
    pub fn has_blob(&self, digest: &B3Digest) -> bool {
        self.blobs.contains(digest)
    }

    /// Different directories, the root left out.
    pub fn directory_count(&self) -> usize {
        self.directories.len()
    }

    /// Different file contents.
    pub fn blob_count(&self) -> usize {
        self.blobs.len()
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
            Self::Root(source) => RequestError::new(
                RequestErrorKind::Unsupported,
                "inputs",
                format!("must fit into a directory: {source}"),
            ),
            Self::Store { .. } => return None,
        })
    }
}

/// Reads every directory below the inputs, and checks that every blob is there.
///
/// It takes a while, but yields often with any store, so that dropping it stops it soon.
///
/// # Errors
///
/// Names the place where something missing, wrong or excessive is referred to.
pub async fn resolve(store: &Store, inputs: &BTreeMap<PathComponent, Node>) -> Result<Tree, ResolveError> {
    let entries = inputs.iter().map(|(name, node)| (name.clone(), node.clone()));
    let root = Directory::try_from_iter(entries).map_err(ResolveError::Root)?;
    if root.size() > MAX_PATHS {
        let place = Place { input: 0, path: String::new() };
        return Err(ResolveError::Limit { place, what: "paths in all inputs", limit: MAX_PATHS });
    }

    let mut known = Known::default();
    for (input, (name, node)) in inputs.iter().enumerate() {
        if let Node::Directory { digest, .. } = node {
            known.read(store, digest, || Place { input, path: name.to_string() }).await?;
        }
    }
    let blobs = Walk::new(&root, &known.directories).blobs().await?;
    if let Err((digest, failure)) = all_there(store, &blobs).await {
        let place = Walk::new(&root, &known.directories).find_blob(&digest).await?;
        return Err(match failure {
            None => ResolveError::Missing { place, kind: "blob", digest },
            Some(source) => ResolveError::Store { place, source },
        });
    }
    Ok(Tree { root, directories: known.directories, blobs })
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

/// The directories read so far.
#[derive(Default)]
struct Known {
    directories: HashMap<B3Digest, Directory>,
    entries: usize,
    bytes: usize,
}

impl Known {
    /// Adds what lies below a directory, in one pass over the store. What turns out to be missing is left for the walk,
    /// which knows the path to it.
    async fn read(&mut self, store: &Store, root: &B3Digest, place: impl Fn() -> Place) -> Result<(), ResolveError> {
        if self.directories.contains_key(root) {
            return Ok(());
        }
        let mut below = store.directories.get_recursive(root);
        while let Some(directory) = below.next().await {
            yield_now().await;
            match directory {
                Ok(directory) => self.add(directory, &place)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return self.read_what_is_there(store, root, place).await;
                }
                Err(source) => return Err(ResolveError::Store { place: place(), source }),
            }
        }
        Ok(())
    }

    /// Reads one directory after the other, since a pass ends at the first that is missing, with others unread: the walk
    /// must not take those for missing.
    async fn read_what_is_there(
        &mut self,
        store: &Store,
        root: &B3Digest,
        place: impl Fn() -> Place,
    ) -> Result<(), ResolveError> {
        let mut seen = HashSet::from([*root]);
        let mut waiting = vec![*root];
        while let Some(digest) = waiting.pop() {
            yield_now().await;
            if !self.directories.contains_key(&digest) {
                match store.directories.get(&digest).await {
                    Ok(Some(directory)) => self.add(directory, &place)?,
                    Ok(None) => continue,
                    Err(source) => return Err(ResolveError::Store { place: place(), source }),
                }
            }
            let children = self.directories.get(&digest).into_iter().flat_map(Directory::children);
            waiting.extend(children.map(|(child, _)| child).filter(|child| seen.insert(*child)));
        }
        Ok(())
    }

    fn add(&mut self, directory: Directory, place: impl Fn() -> Place) -> Result<(), ResolveError> {
        let limit = |what, limit: usize| ResolveError::Limit { place: place(), what, limit: limit as u64 };
        let encoded = directory.encode();
        if encoded.len() > MAX_DIRECTORY_BYTES {
            return Err(limit("bytes in one directory", MAX_DIRECTORY_BYTES));
        }
        let entries = directory.len();
        if self.directories.insert(B3Digest::of(&encoded), directory).is_some() {
            return Ok(());
        }
        self.entries += entries;
        self.bytes += encoded.len();
        if self.bytes > MAX_BYTES {
            return Err(limit("bytes in the directories of all inputs", MAX_BYTES));
        }
        if self.entries > MAX_ENTRIES {
            return Err(limit("entries in all inputs", MAX_ENTRIES));
        }
        if self.directories.len() > MAX_DIRECTORIES {
            return Err(limit("directories in all inputs", MAX_DIRECTORIES));
        }
        Ok(())
    }
}

/// Visits every entry of every directory, each directory once, and checks all that the device will rely on.
struct Walk<'a> {
    directories: &'a HashMap<B3Digest, Directory>,
    /// From the root to the directory being visited.
    open: Vec<Open<'a>>,
    /// Directories in the longest path below each directory that has been visited.
    heights: HashMap<B3Digest, usize>,
}

struct Open<'a> {
    /// `None` for the root.
    digest: Option<B3Digest>,
    nodes: Box<dyn Iterator<Item = (usize, (&'a PathComponent, &'a Node))> + Send + 'a>,
    /// The entry that was visited last.
    at: Option<(usize, &'a PathComponent)>,
    height: usize,
}

impl<'a> Open<'a> {
    fn new(digest: Option<B3Digest>, directory: &'a Directory) -> Self {
        Self { digest, nodes: Box::new(directory.nodes().enumerate()), at: None, height: 0 }
    }
}

impl<'a> Walk<'a> {
    fn new(root: &'a Directory, directories: &'a HashMap<B3Digest, Directory>) -> Self {
        Self { directories, open: vec![Open::new(None, root)], heights: HashMap::new() }
    }

    fn next(&mut self) -> Result<Option<&'a Node>, ResolveError> {
        while let Some(open) = self.open.last_mut() {
            let Some((index, (name, node))) = open.nodes.next() else {
                self.close();
                continue;
            };
            open.at = Some((index, name));
            match node {
                Node::Directory { digest, size } => self.enter(*digest, *size)?,
                Node::File { size, .. } if i64::try_from(*size).is_err() => {
                    return Err(self.limit("bytes in a file", i64::MAX.unsigned_abs()));
                }
                Node::File { .. } | Node::Symlink { .. } => {}
            }
            return Ok(Some(node));
        }
        Ok(None)
    }

    fn enter(&mut self, digest: B3Digest, claimed: u64) -> Result<(), ResolveError> {
        let Some(directory) = self.directories.get(&digest) else {
            return Err(ResolveError::Missing { place: self.place(), kind: "directory", digest });
        };
        let actual = directory.sizes().expect(claimed);
        if actual != claimed {
            return Err(ResolveError::Size { place: self.place(), digest, actual, claimed });
        }
        let visited = self.heights.get(&digest).copied();
        // The root is open too, and isn't counted.
        if self.open.len() + visited.unwrap_or(0) > MAX_DEPTH {
            return Err(self.limit("nested directories", MAX_DEPTH as u64));
        }
        match visited {
            Some(height) => self.raise(height + 1),
            None => self.open.push(Open::new(Some(digest), directory)),
        }
        Ok(())
    }

    fn close(&mut self) {
        if let Some(Open { digest: Some(digest), height, .. }) = self.open.pop() {
            self.heights.insert(digest, height);
            self.raise(height + 1);
        }
    }

    fn raise(&mut self, height: usize) {
        if let Some(open) = self.open.last_mut() {
            open.height = open.height.max(height);
        }
    }

    /// Visits everything.
    async fn blobs(mut self) -> Result<HashSet<B3Digest>, ResolveError> {
        let mut blobs = HashSet::new();
        while let Some(node) = self.next()? {
            consume_budget().await;
            if let Node::File { digest, .. } = node {
                blobs.insert(*digest);
            }
        }
        Ok(blobs)
    }

    async fn find_blob(mut self, wanted: &B3Digest) -> Result<Place, ResolveError> {
        while let Some(node) = self.next()? {
            consume_budget().await;
            if matches!(node, Node::File { digest, .. } if digest == wanted) {
                break;
            }
        }
        Ok(self.place())
    }

    fn limit(&self, what: &'static str, limit: u64) -> ResolveError {
        ResolveError::Limit { place: self.place(), what, limit }
    }

    /// Where the entry is that was visited last.
    fn place(&self) -> Place {
        let mut names = self.open.iter().filter_map(|open| open.at);
        let Some((input, name)) = names.next() else { return Place { input: 0, path: String::new() } };
        let path = names.fold(name.to_string(), |path, (_, name)| format!("{path}/{name}"));
        Place { input, path }
    }
}

#[cfg(test)]
mod tests;
