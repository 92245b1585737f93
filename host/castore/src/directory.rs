use std::collections::{BTreeMap, btree_map};

use crate::{B3Digest, Node, PathComponent};

/// Largest encoded directory, in bytes, that is exchanged with other programs: a million entries with short names.
pub(crate) const MAX_DIRECTORY_BYTES: usize = 64 * 1024 * 1024;

/// Named nodes, sorted by name.
///
/// ```
/// # use cofferdam_castore::{B3Digest, Directory, Node};
/// let contents = b"hello";
/// let node = Node::File { digest: B3Digest::of(contents), size: contents.len() as u64, executable: false };
/// let directory = Directory::try_from_iter([("hello.txt".try_into()?, node.clone())])?;
/// assert_eq!(directory.get(b"hello.txt"), Some(&node));
///
/// let encoded = directory.encode();
/// assert_eq!(B3Digest::of(&encoded), directory.digest());
/// assert_eq!(Directory::decode(&encoded)?, directory);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Directory {
    nodes: BTreeMap<PathComponent, Node>,
    size: u64,
}

/// The sizes that a parent may record for a directory: [`Directory::size`], and the size with entries counted once, which
/// other programs and older versions record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectorySizes {
    size: u64,
    counted_once: u64,
}

impl DirectorySizes {
    /// The recorded size if it is one of these, or else the right one.
    pub const fn expect(self, recorded: u64) -> u64 {
        if recorded == self.counted_once { recorded } else { self.size }
    }
}

/// Why an entry can't be added to a directory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DirectoryError {
    /// The directory already has an entry with this name.
    #[error("two entries have the name \"{0}\"; names in a directory are unique")]
    Duplicate(PathComponent),
    /// [`Directory::size`] no longer fits into 64 bits.
    #[error("with the entry \"{0}\" the directory has a size of more than 2^64-1")]
    SizeOverflow(PathComponent),
}

impl Directory {
    /// An empty directory.
    pub const fn new() -> Self {
        Self { nodes: BTreeMap::new(), size: 0 }
    }

    /// Creates a directory with these entries, in any order.
    ///
    /// # Errors
    ///
    /// As [`Directory::add`].
    pub fn try_from_iter(entries: impl IntoIterator<Item = (PathComponent, Node)>) -> Result<Self, DirectoryError> {
        let mut directory = Self::new();
        entries.into_iter().try_for_each(|(name, node)| directory.add(name, node))?;
        Ok(directory)
    }

    /// Adds an entry.
    ///
    /// # Errors
    ///
    /// The name is taken, or [`Directory::size`] would overflow. The directory is not changed.
    pub fn add(&mut self, name: PathComponent, node: Node) -> Result<(), DirectoryError> {
        let below = match node {
            Node::Directory { size, .. } => size,
            Node::File { .. } | Node::Symlink { .. } => 0,
        };
        let size = self.size.checked_add(2).and_then(|size| size.checked_add(below));
        match (self.nodes.entry(name), size) {
            (btree_map::Entry::Occupied(taken), _) => Err(DirectoryError::Duplicate(taken.key().clone())),
            (free, None) => Err(DirectoryError::SizeOverflow(free.key().clone())),
            (btree_map::Entry::Vacant(free), Some(size)) => {
                free.insert(node);
                self.size = size;
                Ok(())
            }
        }
    }

    /// The entries, sorted by name.
    pub fn nodes(&self) -> impl ExactSizeIterator<Item = (&PathComponent, &Node)> + Send {
        self.nodes.iter()
    }

    /// The entries, sorted by name.
    pub fn into_nodes(self) -> btree_map::IntoIter<PathComponent, Node> {
        self.nodes.into_iter()
    }

    /// The node of this name.
    pub fn get(&self, name: &[u8]) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// The size that a parent records: twice the number of entries, plus the sizes of the directories among them.
    ///
    /// The description of the format counts entries once. tvix and snix have counted them twice since August 2024, and
    /// refuse other sizes, so this crate has to do the same to get the same digests.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The sizes that a parent may record.
    pub fn sizes(&self) -> DirectorySizes {
        DirectorySizes { size: self.size, counted_once: self.size - self.nodes.len() as u64 }
    }

    /// The number of entries.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Digest and size of each directory in this one, sorted by name.
    pub fn children(&self) -> impl Iterator<Item = (B3Digest, u64)> + Send {
        self.nodes.values().filter_map(|node| match node {
            Node::Directory { digest, size } => Some((*digest, *size)),
            Node::File { .. } | Node::Symlink { .. } => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        proto,
        testing::{arb_directory, file, name, symlink},
    };

    #[test]
    fn the_empty_directory_has_the_digest_of_no_bytes() {
        let directory = Directory::new();
        assert_eq!(directory.encode(), b"");
        assert_eq!(directory.digest(), B3Digest::EMPTY);
        assert_eq!(directory.digest().to_hex(), "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262");
    }

    #[test]
    fn the_encoding_is_the_canonical_protobuf_one() {
        let directory = Directory::try_from_iter([
            (name("z"), file(b"", false)),
            (name("a"), file(b"x", true)),
            (name("l"), symlink("t")),
            (name("d"), Directory::new().to_node()),
        ])
        .unwrap();
        // Written by hand: tag, length and value; fields that are zero or false are absent.
        let expected = [
            b"\x0a\x25\x0a\x01d\x12\x20".as_slice(),
            B3Digest::EMPTY.as_slice(),
            b"\x12\x29\x0a\x01a\x12\x20",
            B3Digest::of(b"x").as_slice(),
            b"\x18\x01\x20\x01",
            b"\x12\x25\x0a\x01z\x12\x20",
            B3Digest::EMPTY.as_slice(),
            b"\x1a\x06\x0a\x01l\x12\x01t",
        ]
        .concat();
        assert_eq!(directory.encode(), expected);
        assert_eq!(directory.digest(), B3Digest::of(&expected));
        assert_eq!(Directory::decode(&expected).unwrap(), directory);
    }

    #[test]
    fn the_size_counts_all_entries_at_any_depth_twice() {
        let leaf = Directory::try_from_iter([(name("a"), symlink("t")), (name("b"), file(b"x", false))]).unwrap();
        let middle = Directory::try_from_iter([(name("leaf"), leaf.to_node()), (name("x"), symlink("t"))]).unwrap();
        let root = Directory::try_from_iter([
            (name("empty"), Directory::new().to_node()),
            (name("one"), middle.to_node()),
            (name("two"), middle.to_node()),
        ])
        .unwrap();
        assert_eq!((leaf.size(), middle.size(), root.size()), (4, 8, 2 * (3 + 2 * 4)));
        assert_eq!(root.children().map(|(_, size)| size).collect::<Vec<_>>(), [0, 8, 8]);
        // What snix-castore of December 2025 prints for a directory that holds one whose only entry is a symlink.
        let leaf = Directory::try_from_iter([(name("l"), symlink("x"))]).unwrap();
        let middle = Directory::try_from_iter([(name("b"), leaf.to_node())]).unwrap();
        let root = Directory::try_from_iter([(name("a"), middle.to_node())]).unwrap();
        assert_eq!(root.digest().to_string(), "blake3-01uFZW/MgJPZPL2ATyIz2g/dC1OiOc4XQpZ5YfAf5YM=");
    }

    #[test]
    fn a_taken_name_and_an_overflow_are_refused_and_change_nothing() {
        let huge = |size| Node::Directory { digest: B3Digest::EMPTY, size };
        let mut directory = Directory::try_from_iter([(name("a"), huge(u64::MAX - 4))]).unwrap();
        assert_eq!(directory.add(name("a"), symlink("t")), Err(DirectoryError::Duplicate(name("a"))));
        assert_eq!(directory.add(name("b"), huge(1)), Err(DirectoryError::SizeOverflow(name("b"))));
        assert_eq!((directory.len(), directory.size()), (1, u64::MAX - 2));
        directory.add(name("b"), symlink("t")).unwrap();
        assert_eq!(directory.add(name("c"), symlink("t")), Err(DirectoryError::SizeOverflow(name("c"))));
    }

    #[test]
    fn other_encodings_of_a_directory_are_refused() {
        let unknown_field = b"\x22\x00";
        assert!(matches!(Directory::decode(unknown_field), Err(proto::DecodeError::NotCanonical)));
        let symlinks_first =
            [b"\x1a\x06\x0a\x01l\x12\x01t\x12\x25\x0a\x01z\x12\x20", B3Digest::EMPTY.as_slice()].concat();
        assert!(matches!(Directory::decode(&symlinks_first), Err(proto::DecodeError::NotCanonical)));
        assert!(matches!(Directory::decode(b"\xff"), Err(proto::DecodeError::Malformed(_))));
    }

    proptest! {
        #[test]
        fn encoding_and_decoding_gives_the_same_directory(directory in arb_directory()) {
            prop_assert_eq!(Directory::decode(&directory.encode()).unwrap(), directory);
        }

        #[test]
        fn any_bytes_decode_or_fail_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
            if let Ok(directory) = Directory::decode(&bytes) {
                prop_assert_eq!(directory.encode(), bytes);
            }
        }
    }
}
