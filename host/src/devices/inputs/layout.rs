//! Inode numbers without a table: an inode's number is its place in a walk of the whole tree, parents first.
//!
//! ```text
//!   1 /            a directory's entry has    its directory's number
//!   2 ├─ bin                                + 1
//!   3 │  ├─ cc                              + 1 and all that lies below it, for each entry before it
//!   4 │  └─ ld
//!   5 └─ lib      (sizes in castore count all entries below, so no directory is read to number its siblings)
//! ```
//!
//! Most programs count them twice, so some numbers are unused.
//!
//! Number to path is a descent by binary search; nothing is kept for what the guest looks up, so there is nothing to
//! forget, and any number that a guest makes up is either an inode or none. Each path has an inode of its own even
//! where contents are equal: a directory must have just one path, and an overlay file system would take two files with
//! one inode and one link for the same file, and write to both.

use std::collections::HashMap;
use std::ffi::CString;
use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use cofferdam_castore::{B3Digest, Directory, Node};
use parking_lot::Mutex;

use super::wire::Host;

/// The number that FUSE gives to the root.
pub(super) const ROOT_INODE: u64 = 1;

/// A directory as the guest sees it. Directories with the same contents share one.
#[derive(Debug)]
pub(super) struct Dir {
    /// Sorted by name, and so by `offset` too.
    entries: Vec<Entry>,
    /// How many numbers its entries take, at any depth; not more than its size in castore.
    numbers: u64,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: CString,
    /// Its inode's number less that of its directory.
    offset: u64,
    pub(super) node: Node,
    /// A directory's entries, once they have been needed.
    dir: OnceLock<Arc<Dir>>,
}

impl Entry {
    /// Its inode's number in a directory of this number.
    pub(super) fn inode(&self, dir: u64) -> u64 {
        dir + self.offset
    }
}

impl Dir {
    fn new(directory: Directory) -> io::Result<Self> {
        let mut offset = 1;
        // Collecting results would reserve up to twice the room.
        let mut entries = Vec::with_capacity(directory.len());
        for (name, node) in directory.into_nodes() {
            let below = match node {
                Node::Directory { size, .. } => size,
                Node::File { .. } | Node::Symlink { .. } => 0,
            };
            let name = CString::new(name.as_bytes())?;
            entries.push(Entry { name, offset, node, dir: OnceLock::new() });
            // At most the directory's size, which it has summed up without overflow.
            offset += 1 + below;
        }
        Ok(Self { entries, numbers: offset - 1 })
    }

    pub(super) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    fn index_of(&self, name: &[u8]) -> Option<usize> {
        self.entries.binary_search_by(|entry| entry.name.to_bytes().cmp(name)).ok()
    }

    /// The last entry that does not begin after this offset.
    fn index_at(&self, offset: u64) -> Option<usize> {
        if offset > self.numbers {
            return None;
        }
        self.entries.partition_point(|entry| entry.offset <= offset).checked_sub(1)
    }
}

/// An inode, found.
#[derive(Debug, Clone)]
pub(super) struct Inode {
    pub(super) number: u64,
    /// The root is its own parent.
    pub(super) parent: u64,
    /// The directory that it is in, and its index there; `None` for the root.
    place: Option<(Arc<Dir>, usize)>,
}

impl Inode {
    /// `None` for the root.
    pub(super) fn entry(&self) -> Option<&Entry> {
        self.place.as_ref().map(|(dir, index)| &dir.entries[*index])
    }

    /// The entries after it in its directory.
    pub(super) fn next_siblings(&self) -> &[Entry] {
        self.place.as_ref().map_or(&[], |(dir, index)| &dir.entries[index + 1..])
    }
}

/// The tree, as much of it as has been needed.
#[derive(Debug)]
pub(super) struct Layout {
    host: Arc<Host>,
    root: OnceLock<Arc<Dir>>,
    appearance: OnceLock<Appearance>,
    dirs: Mutex<HashMap<B3Digest, Arc<Dir>>>,
}

/// What the guest sees that is not in castore.
#[derive(Debug)]
pub(super) struct Appearance {
    /// Of what is read-only, in seconds since the epoch.
    pub(super) time: u64,
    /// The inodes at and below each path of which the build has a writable copy.
    writable: Vec<Range<u64>>,
}

impl Appearance {
    /// Whether the build has a writable copy of an inode.
    pub(super) fn is_writable(&self, number: u64) -> bool {
        self.writable.iter().any(|range| range.contains(&number))
    }
}

impl Layout {
    pub(super) fn new(host: Arc<Host>) -> Self {
        Self { host, root: OnceLock::new(), appearance: OnceLock::new(), dirs: Mutex::default() }
    }

    /// The root. Asked for when it is first needed and not before: a machine boots without inputs.
    fn root(&self) -> io::Result<&Arc<Dir>> {
        if let Some(root) = self.root.get() {
            return Ok(root);
        }
        let root = Arc::new(Dir::new(self.host.root()?)?);
        Ok(self.root.get_or_init(|| root))
    }

    /// No inode has a greater number.
    pub(super) fn last_inode(&self) -> io::Result<u64> {
        Ok(self.root()?.numbers.saturating_add(1))
    }

    /// How the inputs appear. Asked for when it is first needed, too.
    pub(super) fn appearance(&self) -> io::Result<&Appearance> {
        if let Some(appearance) = self.appearance.get() {
            return Ok(appearance);
        }
        let (time, paths) = self.host.appearance()?;
        let writable = paths.iter().filter_map(|path| self.numbers_at(path).transpose()).collect::<io::Result<_>>()?;
        Ok(self.appearance.get_or_init(|| Appearance { time, writable }))
    }

    /// The numbers of all inodes at and below a path, through no symlink.
    fn numbers_at(&self, path: &[u8]) -> io::Result<Option<Range<u64>>> {
        let mut inode = self.inode(ROOT_INODE)?;
        for name in path.split(|byte| *byte == b'/') {
            let is_directory = inode.entry().is_none_or(|entry| matches!(entry.node, Node::Directory { .. }));
            match if is_directory { self.lookup(inode.number, name)? } else { None } {
                Some(found) => inode = found,
                None => return Ok(None),
            }
        }
        let below = match inode.entry().map(|entry| &entry.node) {
            Some(Node::Directory { size, .. }) => *size,
            _ => 0,
        };
        Ok(Some(inode.number..inode.number + 1 + below))
    }

    /// Finds an inode by its number: `ENOENT` when there is none.
    pub(super) fn inode(&self, number: u64) -> io::Result<Inode> {
        let mut inode = Inode { number: ROOT_INODE, parent: ROOT_INODE, place: None };
        let mut dir = Arc::clone(self.root()?);
        let mut offset = number.checked_sub(ROOT_INODE).ok_or_else(no_such_inode)?;
        while offset > 0 {
            let index = dir.index_at(offset).ok_or_else(no_such_inode)?;
            offset -= dir.entries[index].offset;
            inode = child(&inode, &dir, index);
            if offset > 0 {
                dir = self.open(&dir.entries[index])?;
            }
        }
        Ok(inode)
    }

    /// The entries of a directory. `ENOTDIR` for anything else.
    pub(super) fn dir(&self, inode: &Inode) -> io::Result<Arc<Dir>> {
        match inode.entry() {
            None => self.root().map(Arc::clone),
            Some(entry) => self.open(entry),
        }
    }

    /// Finds a directory's entry by name; `None` when it has none of this name.
    pub(super) fn lookup(&self, parent: u64, name: &[u8]) -> io::Result<Option<Inode>> {
        let parent = self.inode(parent)?;
        let dir = self.dir(&parent)?;
        Ok(dir.index_of(name).map(|index| child(&parent, &dir, index)))
    }

    fn open(&self, entry: &Entry) -> io::Result<Arc<Dir>> {
        let Node::Directory { digest, size } = entry.node else {
            return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
        };
        if let Some(dir) = entry.dir.get() {
            return Ok(Arc::clone(dir));
        }
        let dir = self.read(&digest)?;
        if dir.numbers > size {
            // The host has checked this; numbers would overlap.
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(Arc::clone(entry.dir.get_or_init(|| dir)))
    }

    fn read(&self, digest: &B3Digest) -> io::Result<Arc<Dir>> {
        let dirs = || self.dirs.lock();
        if let Some(dir) = dirs().get(digest) {
            return Ok(Arc::clone(dir));
        }
        let dir = Arc::new(Dir::new(self.host.directory(digest)?)?);
        Ok(Arc::clone(dirs().entry(*digest).or_insert(dir)))
    }
}

fn child(parent: &Inode, dir: &Arc<Dir>, index: usize) -> Inode {
    let number = dir.entries[index].inode(parent.number);
    Inode { number, parent: parent.number, place: Some((Arc::clone(dir), index)) }
}

fn no_such_inode() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOENT)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use cofferdam_castore::Store;
    use futures::future::{BoxFuture, FutureExt as _};
    use proptest::prelude::*;

    use super::super::testing::{directory, serve, symlink};
    use super::*;

    /// A tree by its shape alone; equal shapes are one directory at several places.
    #[derive(Debug, Clone)]
    enum Shape {
        Leaf,
        Dir(Vec<Shape>),
    }

    fn shape() -> impl Strategy<Value = Shape> {
        Just(Shape::Leaf).prop_recursive(5, 60, 5, |inner| proptest::collection::vec(inner, 0..5).prop_map(Shape::Dir))
    }

    fn named(index: usize) -> String {
        format!("n{index}")
    }

    fn stored<'a>(store: &'a Store, shape: &'a Shape) -> BoxFuture<'a, Node> {
        async move {
            let Shape::Dir(children) = shape else { return symlink("target") };
            let mut nodes = Vec::new();
            for (index, child) in children.iter().enumerate() {
                nodes.push((named(index), stored(store, child).await));
            }
            let entries: Vec<_> = nodes.iter().map(|(name, node)| (name.as_str(), node.clone())).collect();
            directory(store, &entries).await
        }
        .boxed()
    }

    /// Walks by name and checks that each number is greater than the last one, and that it leads back to the same place.
    fn check(layout: &Layout, parent: u64, shapes: &[Shape], seen: &mut BTreeSet<u64>) {
        for (index, shape) in shapes.iter().enumerate() {
            let inode = layout.lookup(parent, named(index).as_bytes()).unwrap().unwrap();
            assert!(Some(&inode.number) > seen.last() && inode.parent == parent, "{inode:?}");
            let again = layout.inode(inode.number).unwrap();
            assert_eq!(again.parent, parent);
            assert_eq!(again.entry().unwrap().name.to_bytes(), named(index).as_bytes());
            seen.insert(inode.number);
            if let Shape::Dir(children) = shape {
                check(layout, inode.number, children, seen);
            }
        }
    }

    proptest! {
        #[test]
        fn numbers_and_paths_are_one_to_one(shapes in proptest::collection::vec(shape(), 0..5)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let store = Store::memory();
                let mut nodes = Vec::new();
                for (index, shape) in shapes.iter().enumerate() {
                    nodes.push((named(index), stored(&store, shape).await));
                }
                let entries: Vec<_> = nodes.iter().map(|(name, node)| (name.as_str(), node.clone())).collect();
                let (host, _) = serve(&store, &entries).await;
                let layout = Layout::new(host);
                let mut seen = BTreeSet::from([ROOT_INODE]);
                check(&layout, ROOT_INODE, &shapes, &mut seen);
                for number in (0..=layout.last_inode().unwrap() + 1).chain([u64::MAX]) {
                    match layout.inode(number) {
                        Ok(inode) => assert!(seen.remove(&number) && inode.number == number),
                        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOENT)),
                    }
                }
                assert!(seen.is_empty(), "{seen:?}");
            });
        }
    }
}
