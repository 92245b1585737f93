//! Whether a store has all of some trees, in little memory: one directory after the other is read, looked through and dropped.

use std::{
    collections::HashSet,
    io::{self, ErrorKind},
};

use cofferdam_castore::{B3Digest, Node, Store, directoryservice::DirectoryMemory};
use futures::{TryStreamExt as _, stream::FuturesUnordered};

/// Most memory for directories at a time, as [`DirectoryMemory`] counts it: at least one with 50,000 files.
pub(super) const MAX_DIRECTORY_MEMORY_BYTES: u64 = 64 << 20;

/// Most directories in all trees, each counted wherever it is named. A walk remembers their digests.
const MAX_DIRECTORIES: usize = 1 << 17;

/// Most entries in them.
const MAX_ENTRIES: usize = 1 << 22;

/// How many blobs are asked for at a time; it matters for a store that is not on this machine.
const CONCURRENT_QUESTIONS: usize = 64;

/// What may still be looked at.
struct Left {
    directories: usize,
    entries: usize,
}

impl Left {
    fn take(&mut self, directories: usize, entries: usize) -> io::Result<()> {
        let left = self.directories.checked_sub(directories).zip(self.entries.checked_sub(entries));
        let (directories, entries) = left.ok_or(ErrorKind::QuotaExceeded)?;
        *self = Self { directories, entries };
        Ok(())
    }
}

/// Whether a store has these nodes and everything below them.
///
/// # Errors
///
/// `QuotaExceeded` for trees that are too large to be looked for in little memory, or those of the store.
pub(super) async fn has_all(store: &Store, nodes: &[Node]) -> io::Result<bool> {
    let mut left = Left { directories: MAX_DIRECTORIES, entries: MAX_ENTRIES };
    for node in nodes {
        let has = match node {
            Node::File { digest, .. } => store.blobs.has(digest).await?,
            Node::Directory { digest, .. } => match has_tree(store, digest, &mut left).await {
                Err(error) if error.kind() == ErrorKind::NotFound => false,
                has => has?,
            },
            Node::Symlink { .. } => true,
        };
        if !has {
            return Ok(false);
        }
    }
    Ok(true)
}

async fn has_tree(store: &Store, root: &B3Digest, left: &mut Left) -> io::Result<bool> {
    let memory = DirectoryMemory::limited(MAX_DIRECTORY_MEMORY_BYTES);
    let mut directories = store.directories.get_recursive_within(root, &memory);
    let mut is_there = false;
    while let Some(directory) = directories.try_next().await? {
        is_there = true;
        left.take(directory.children().count(), directory.len())?;
        let blobs = directory.nodes().filter_map(|(_, node)| match node {
            Node::File { digest, .. } => Some(*digest),
            _ => None,
        });
        if !has_blobs(store, blobs.collect()).await? {
            return Ok(false);
        }
        memory.give_back(directory.encode().len(), directory.len());
    }
    Ok(is_there)
}

async fn has_blobs(store: &Store, blobs: HashSet<B3Digest>) -> io::Result<bool> {
    let mut blobs = blobs.into_iter();
    let ask = |digest: B3Digest| async move { store.blobs.has(&digest).await };
    let mut asked: FuturesUnordered<_> = blobs.by_ref().take(CONCURRENT_QUESTIONS).map(ask).collect();
    while let Some(has) = asked.try_next().await? {
        if !has {
            return Ok(false);
        }
        asked.extend(blobs.next().map(ask));
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::Arc};

    use cofferdam_castore::{Directory, PathComponent, directoryservice::RedbDirectoryService};

    use super::*;
    use crate::devices::inputs;

    fn name(name: &str) -> PathComponent {
        name.as_bytes().try_into().unwrap()
    }

    fn symlinks(count: usize, target: &str) -> Directory {
        let target: cofferdam_castore::SymlinkTarget = target.try_into().unwrap();
        let entries = (0..count).map(|number| (name(&number.to_string()), Node::Symlink { target: target.clone() }));
        Directory::try_from_iter(entries).unwrap()
    }

    /// Puts a directory with these, each named by its number.
    async fn put(store: &Store, below: Vec<Directory>) -> Node {
        let mut entries = Vec::new();
        for (number, directory) in below.into_iter().enumerate() {
            entries.push((name(&number.to_string()), directory.to_node()));
            store.directories.put(directory).await.unwrap();
        }
        let root = Directory::try_from_iter(entries).unwrap();
        store.directories.put(root.clone()).await.unwrap();
        root.to_node()
    }

    #[tokio::test]
    async fn a_tree_that_is_much_larger_than_its_memory_is_looked_through() {
        let (place, memory) = (tempfile::tempdir().unwrap(), MAX_DIRECTORY_MEMORY_BYTES);
        let store = Store {
            directories: Arc::new(RedbDirectoryService::open(&place.path().join("directories")).unwrap()),
            ..Store::memory()
        };
        // Each takes at least 4 MiB.
        let tree = put(&store, (0..20).map(|number| symlinks(10_000, &number.to_string())).collect()).await;
        assert!(has_all(&store, std::slice::from_ref(&tree)).await.unwrap());
        let inputs = BTreeMap::from([(name("tree"), tree)]);
        let kept = inputs::resolve(&store, &inputs, DirectoryMemory::limited(memory)).await;
        assert!(kept.is_err(), "this tests nothing: the tree fits into memory");
        let large = put(&store, vec![symlinks(200_000, "t")]).await;
        assert_eq!(has_all(&store, &[large]).await.unwrap_err().kind(), ErrorKind::QuotaExceeded);
    }

    #[tokio::test]
    async fn directories_are_bounded_however_they_share_what_is_below_them() {
        let store = Store::memory();
        let entries =
            |node: &Node| (0..512).map(|number| (name(&number.to_string()), node.clone())).collect::<Vec<_>>();
        let leaf = Directory::new();
        store.directories.put(leaf.clone()).await.unwrap();
        let mut node = leaf.to_node();
        for _ in 0..3 {
            let directory = Directory::try_from_iter(entries(&node)).unwrap();
            store.directories.put(directory.clone()).await.unwrap();
            node = directory.to_node();
        }
        assert!(has_all(&store, std::slice::from_ref(&node)).await.unwrap());
        let many = vec![node; MAX_DIRECTORIES / 512];
        assert_eq!(has_all(&store, &many).await.unwrap_err().kind(), ErrorKind::QuotaExceeded);
    }

    #[tokio::test]
    async fn whatever_is_missing_is_found() {
        let store = Store::memory();
        let file = |contents: &str| Node::File {
            digest: B3Digest::of(contents.as_bytes()),
            size: contents.len() as u64,
            executable: false,
        };
        let mut writer = store.blobs.open_write().await;
        tokio::io::AsyncWriteExt::write_all(&mut writer, b"there").await.unwrap();
        writer.close().await.unwrap();
        let with = |node| Directory::try_from_iter([(name("a"), node)]).unwrap();
        for (node, is_there) in [
            (file("there"), true),
            (file("missing"), false),
            (put(&store, vec![with(file("there"))]).await, true),
            (put(&store, vec![with(file("missing"))]).await, false),
            (put(&store, vec![with(with(file("there")).to_node()), with(symlinks(1, "t").to_node())]).await, false),
            (symlinks(2, "t").to_node(), false),
        ] {
            assert_eq!(has_all(&store, std::slice::from_ref(&node)).await.unwrap(), is_there, "{node:?}");
        }
    }
}
