//! What lies below the inputs, as it is read from the store.

use std::collections::{HashMap, HashSet};
use std::io;

use cofferdam_castore::directoryservice::DirectoryMemory;
use cofferdam_castore::{B3Digest, Directory, DirectorySizes, Node, Store};
use futures::stream::StreamExt as _;
use tokio::task::{consume_budget, yield_now};

use super::{MAX_BYTES, MAX_DIRECTORIES, MAX_DIRECTORY_BYTES, MAX_ENTRIES, Place, ResolveError, unread};

/// A directory as it is kept: encoded, since its entries take many times the memory when they are decoded.
#[derive(Debug)]
pub(super) struct Known {
    /// Its canonical encoding.
    pub(super) encoded: Box<[u8]>,
    /// Digest and size of each directory in it, in the order of their names.
    pub(super) children: Box<[(B3Digest, u64)]>,
    pub(super) sizes: DirectorySizes,
    /// Whether one of its files is longer than any offset can reach.
    pub(super) has_endless_file: bool,
}

/// Whether no offset reaches the end of this file.
pub(super) fn is_endless(node: &Node) -> bool {
    matches!(node, Node::File { size, .. } if i64::try_from(*size).is_err())
}

/// The directories read so far.
#[derive(Default)]
pub(super) struct Closure {
    pub(super) directories: HashMap<B3Digest, Known>,
    /// Contents of the files in them.
    pub(super) blobs: HashSet<B3Digest>,
    pub(super) memory: DirectoryMemory,
    pub(super) entries: usize,
    pub(super) bytes: usize,
}

impl Closure {
    pub(super) fn new(memory: DirectoryMemory) -> Self {
        Self { memory, ..Self::default() }
    }

    /// Adds what lies below a directory, in one pass over the store. What turns out to be missing is left for the walk,
    /// which knows the path to it.
    pub(super) async fn read(
        &mut self,
        store: &Store,
        root: &B3Digest,
        place: impl Fn() -> Place,
    ) -> Result<(), ResolveError> {
        if self.directories.contains_key(root) {
            return Ok(());
        }
        let mut below = store.directories.get_recursive_within(root, &self.memory);
        while let Some(directory) = below.next().await {
            yield_now().await;
            match directory {
                Ok(directory) => self.add(directory, &place).await?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    drop(below);
                    return self.read_what_is_there(store, root, place).await;
                }
                Err(source) => return Err(unread(place(), source)),
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
                // The first directory of a pass comes even if one below it is missing.
                match store.directories.get_recursive_within(&digest, &self.memory).next().await {
                    Some(Ok(directory)) => self.add(directory, &place).await?,
                    None => continue,
                    Some(Err(source)) => return Err(unread(place(), source)),
                }
            }
            let children = self.directories.get(&digest).into_iter().flat_map(|directory| &directory.children);
            waiting.extend(children.map(|(child, _)| *child).filter(|child| seen.insert(*child)));
        }
        Ok(())
    }

    pub(super) async fn add(&mut self, directory: Directory, place: impl Fn() -> Place) -> Result<(), ResolveError> {
        let limit = |what, limit: usize| ResolveError::Limit { place: place(), what, limit: limit as u64 };
        let encoded = directory.encode();
        if encoded.len() > MAX_DIRECTORY_BYTES {
            return Err(limit("bytes in one directory", MAX_DIRECTORY_BYTES));
        }
        let digest = B3Digest::of(&encoded);
        if self.directories.contains_key(&digest) {
            self.memory.give_back(encoded.len(), directory.len());
            return Ok(());
        }
        self.entries += directory.len();
        self.bytes += encoded.len();
        if self.bytes > MAX_BYTES {
            return Err(limit("bytes in the directories of all inputs", MAX_BYTES));
        }
        if self.entries > MAX_ENTRIES {
            return Err(limit("entries in all inputs", MAX_ENTRIES));
        }
        if self.directories.len() >= MAX_DIRECTORIES {
            return Err(limit("directories in all inputs", MAX_DIRECTORIES));
        }
        let known = self.known(&directory, encoded).await;
        self.directories.insert(digest, known);
        Ok(())
    }

    /// A directory with its encoding. Its blobs are added.
    pub(super) async fn known(&mut self, directory: &Directory, encoded: Vec<u8>) -> Known {
        let mut has_endless_file = false;
        for (_, node) in directory.nodes() {
            consume_budget().await;
            has_endless_file |= is_endless(node);
            if let Node::File { digest, .. } = node {
                self.blobs.insert(*digest);
            }
        }
        Known {
            encoded: encoded.into(),
            children: directory.children().collect(),
            sizes: directory.sizes(),
            has_endless_file,
        }
    }
}
