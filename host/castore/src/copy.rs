//! Copies nodes and everything below them from one store to another.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
};

use futures::{StreamExt as _, TryStreamExt as _, executor::block_on, stream};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{
    B3Digest, Directory, LocalStore, Node, Store,
    directoryservice::put_tree,
    export::{ExportError, closure},
};

/// Blobs that are copied at a time, which matters for remote stores.
const CONCURRENT_BLOBS: usize = 16;

/// Bytes of each blob that are in memory at a time.
const BUFFER_BYTES: usize = 128 * 1024;

/// Why a node could not be copied. Blobs that were copied before may stay, and need not be copied again.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The source lacks something, or failed.
    #[error("can't read from the source")]
    From(#[source] ExportError),
    /// A blob of the source is damaged.
    #[error("the blob {digest} of the source is damaged: its contents have the digest {actual}")]
    Damaged {
        /// Its digest.
        digest: B3Digest,
        /// The digest of its contents.
        actual: B3Digest,
    },
    /// The destination failed.
    #[error("can't write the {what} {digest} to the destination")]
    To {
        /// "blob" or "directory".
        what: &'static str,
        /// Which one; for directories, the root of the tree.
        digest: B3Digest,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The destination could not make the copy durable.
    #[error("can't make the copy durable in the destination")]
    Commit(#[source] io::Error),
    /// The observer interrupted the copy.
    #[error("the copy was interrupted")]
    Interrupted,
}

/// The progress of a copy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copied {
    /// Number of distinct blobs.
    pub blobs: u64,
    /// Blobs that the destination has, from before or by now.
    pub blobs_done: u64,
    /// Blobs that were copied.
    pub blobs_copied: u64,
    /// Bytes in the copied blobs.
    pub bytes_copied: u64,
    /// Number of distinct directories.
    pub directories: u64,
}

/// Observes a copy.
pub trait CopyObserver {
    /// Called after each blob.
    fn progress(&self, copied: &Copied);
    /// Whether to give up the copy.
    fn interrupted(&self) -> bool;
}

/// Copies nodes, durably: first the blobs that the destination lacks, then the directories.
///
/// Blocks: call it from a thread that may.
///
/// # Errors
///
/// Tells which of the two stores failed, and where.
pub fn copy(from: &Store, to: &Store, nodes: &[Node], observer: &dyn CopyObserver) -> Result<Copied, CopyError> {
    let to = &to.batch();
    let mut directories = HashMap::new();
    let mut blobs = HashMap::new();
    for node in nodes {
        match node {
            Node::Directory { digest, .. } => {
                if !directories.contains_key(digest) {
                    let below = closure(from, digest, Path::new(&digest.to_string())).map_err(CopyError::From)?;
                    if below.is_empty() {
                        let path = PathBuf::from(digest.to_string());
                        return Err(CopyError::From(ExportError::Missing { path, what: "directory", digest: *digest }));
                    }
                    directories.extend(below);
                }
            }
            Node::File { digest, size, .. } => drop(blobs.insert(*digest, *size)),
            Node::Symlink { .. } => {}
        }
    }
    for directory in directories.values() {
        for (_, node) in directory.nodes() {
            if let Node::File { digest, size, .. } = node {
                blobs.insert(*digest, *size);
            }
        }
    }
    let mut copied = Copied { blobs: blobs.len() as u64, directories: directories.len() as u64, ..Copied::default() };
    observer.progress(&copied);
    block_on(async {
        let mut each = stream::iter(blobs.keys())
            .map(|digest| copy_blob(from, to, digest, observer))
            .buffer_unordered(CONCURRENT_BLOBS);
        while let Some(bytes) = each.try_next().await? {
            copied.blobs_done += 1;
            copied.blobs_copied += u64::from(bytes.is_some());
            copied.bytes_copied += bytes.unwrap_or(0);
            observer.progress(&copied);
        }
        to.blobs.commit().await.map_err(CopyError::Commit)?;
        for node in nodes {
            if let Node::Directory { digest, .. } = node {
                let failed = |source| CopyError::To { what: "directory", digest: *digest, source };
                put_tree(&*to.directories, digest, &directories).await.map_err(failed)?;
            }
        }
        Ok(copied)
    })
}

/// Copies a blob if it is missing, and returns its size.
async fn copy_blob(
    from: &Store,
    to: &Store,
    digest: &B3Digest,
    observer: &dyn CopyObserver,
) -> Result<Option<u64>, CopyError> {
    let failed = |source| CopyError::To { what: "blob", digest: *digest, source };
    let path = || PathBuf::from(digest.to_string());
    if to.blobs.has(digest).await.map_err(failed)? {
        return Ok(None);
    }
    let from_failed = |source| CopyError::From(ExportError::Store { path: path(), source });
    let Some(mut blob) = from.blobs.open_read(digest).await.map_err(from_failed)? else {
        return Err(CopyError::From(ExportError::Missing { path: path(), what: "blob", digest: *digest }));
    };
    let mut writer = to.blobs.open_write().await;
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut bytes = 0;
    loop {
        if observer.interrupted() {
            return Err(CopyError::Interrupted);
        }
        let read = blob.read(&mut buffer).await.map_err(from_failed)?;
        if read == 0 {
            break;
        }
        bytes += read as u64;
        writer.write_all(&buffer[..read]).await.map_err(failed)?;
    }
    let actual = writer.close().await.map_err(failed)?;
    if actual == *digest { Ok(Some(bytes)) } else { Err(CopyError::Damaged { digest: *digest, actual }) }
}

/// Nodes that cover everything in a local store: the directories that are in no other one, and the blobs that no directory
/// refers to.
///
/// # Errors
///
/// The store can't be read.
pub fn everything(store: &LocalStore) -> io::Result<Vec<Node>> {
    let (mut roots, mut below, mut blobs) = (HashMap::new(), Vec::new(), std::collections::HashSet::new());
    let mut last = None;
    loop {
        let stored = store.directories().stored_after(last.as_ref())?;
        let Some((digest, _)) = stored.last() else { break };
        last = Some(*digest);
        for (digest, encoded) in stored {
            let directory =
                Directory::decode(&encoded).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            for (_, node) in directory.nodes() {
                match node {
                    Node::Directory { digest, .. } => below.push(*digest),
                    Node::File { digest, .. } => drop(blobs.insert(*digest)),
                    Node::Symlink { .. } => {}
                }
            }
            roots.insert(digest, directory.size());
        }
    }
    for digest in below {
        roots.remove(&digest);
    }
    let mut nodes: Vec<_> = roots.into_iter().map(|(digest, size)| Node::Directory { digest, size }).collect();
    for (digest, size) in store.stored_blobs()? {
        if !blobs.contains(&digest) {
            nodes.push(Node::File { digest, size, executable: false });
        }
    }
    Ok(nodes)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::{
        import::import_path,
        testing::{file, name},
        verify::verify_node,
    };

    struct Watch {
        last: Cell<Copied>,
        give_up: bool,
    }

    impl CopyObserver for Watch {
        fn progress(&self, copied: &Copied) {
            self.last.set(*copied);
        }

        fn interrupted(&self) -> bool {
            self.give_up
        }
    }

    fn tree(store: &Store) -> Node {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b/c")).unwrap();
        std::fs::create_dir_all(dir.path().join("z/b/c")).unwrap();
        for path in ["a/b/c/one", "a/b/two", "z/b/c/one", "top"] {
            std::fs::write(dir.path().join(path), &path[path.len() - 3..]).unwrap();
        }
        import_path(store, dir.path()).unwrap()
    }

    #[test]
    fn a_copy_is_whole_and_the_next_one_has_nothing_to_do() {
        let (from, to) = (Store::memory(), Store::memory());
        let node = tree(&from);
        let watch = Watch { last: Cell::default(), give_up: false };
        let copied = copy(&from, &to, std::slice::from_ref(&node), &watch).unwrap();
        let expected = Copied { blobs: 3, blobs_done: 3, blobs_copied: 3, bytes_copied: 9, directories: 6 };
        assert_eq!((copied, watch.last.get()), (expected, expected));
        verify_node(&to, &node, Path::new("copy"), &|| false).unwrap();
        let again = copy(&from, &to, &[node], &watch).unwrap();
        assert_eq!(again, Copied { blobs_copied: 0, bytes_copied: 0, ..expected });
    }

    #[test]
    fn what_the_source_lacks_is_named_and_nothing_is_copied() {
        let (from, to) = (Store::memory(), Store::memory());
        let watch = Watch { last: Cell::default(), give_up: false };
        let missing = Directory::try_from_iter([(name("f"), file(b"never put", false))]).unwrap();
        let error = copy(&from, &to, &[missing.to_node()], &watch).unwrap_err();
        assert!(matches!(error, CopyError::From(ExportError::Missing { what: "directory", .. })), "{error:?}");
        block_on(from.directories.put(missing.clone())).unwrap();
        let error = copy(&from, &to, &[missing.to_node()], &watch).unwrap_err();
        assert!(matches!(error, CopyError::From(ExportError::Missing { what: "blob", .. })), "{error:?}");
        assert_eq!(block_on(to.directories.get(&missing.digest())).unwrap(), None);
    }

    #[test]
    fn an_interrupted_copy_leaves_nothing() {
        let (from, to) = (Store::memory(), Store::memory());
        let node = tree(&from);
        let watch = Watch { last: Cell::default(), give_up: true };
        assert!(matches!(copy(&from, &to, &[node], &watch), Err(CopyError::Interrupted)));
        assert!(!block_on(to.blobs.has(&B3Digest::of(b"top"))).unwrap());
    }

    #[test]
    fn everything_is_what_nothing_refers_to() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().display();
        let (blobs, directories) = (format!("file://{at}/blobs"), format!("redb://{at}/d.redb"));
        let from = Store::from_addrs(&blobs, &directories).unwrap();
        let node = tree(&from);
        std::fs::write(dir.path().join("alone"), "alone").unwrap();
        let alone = import_path(&from, &dir.path().join("alone")).unwrap();
        let mut all = everything(&LocalStore::from_addr(&blobs, &directories).unwrap().unwrap()).unwrap();
        all.sort_by_key(|node| matches!(node, Node::File { .. }));
        assert_eq!(all, [node, alone]);
    }
}
