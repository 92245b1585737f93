use std::collections::{BTreeMap, btree_map};

use prost::Message as _;

use crate::{B3Digest, Node, PathComponent, proto};

/// Named nodes, in the order of their names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Directory {
    nodes: BTreeMap<PathComponent, Node>,
    size: u64,
}

/// Why an entry can't be added to a directory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DirectoryError {
    /// The directory has an entry of this name.
    #[error("two entries have the name \"{0}\"; names in a directory are unique")]
    Duplicate(PathComponent),
    /// The number of entries below the directory no longer fits into 64 bits.
    #[error("with the entry \"{0}\" the directory holds more than 2^64-1 entries")]
    SizeOverflow(PathComponent),
}

impl Directory {
    /// An empty directory.
    pub const fn new() -> Self {
        Self { nodes: BTreeMap::new(), size: 0 }
    }

    /// A directory of these entries, in any order.
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
    /// Leaves the directory as it was when the name is taken or [`Directory::size`] would overflow.
    pub fn add(&mut self, name: PathComponent, node: Node) -> Result<(), DirectoryError> {
        let below = match node {
            Node::Directory { size, .. } => size,
            Node::File { .. } | Node::Symlink { .. } => 0,
        };
        let size = self.size.checked_add(1).and_then(|size| size.checked_add(below));
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

    /// The entries below the directory, at any depth.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The entries in the directory itself.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The digest of the canonical encoding.
    pub fn digest(&self) -> B3Digest {
        B3Digest::of(&self.encode())
    }

    /// The node that stands for this directory.
    pub fn to_node(&self) -> Node {
        Node::Directory { digest: self.digest(), size: self.size }
    }

    /// The directories in this one, sorted by name: digest and size.
    pub fn children(&self) -> impl Iterator<Item = (B3Digest, u64)> + Send {
        self.nodes.values().filter_map(|node| match node {
            Node::Directory { digest, size } => Some((*digest, *size)),
            Node::File { .. } | Node::Symlink { .. } => None,
        })
    }

    /// The canonical encoding: a `snix.castore.v1.Directory` with fields in order, defaults left out, lists sorted.
    pub fn encode(&self) -> Vec<u8> {
        proto::Directory::from(self).encode_to_vec()
    }

    /// The directory that has exactly this canonical encoding.
    ///
    /// # Errors
    ///
    /// When the bytes are no message, break a rule, or are another encoding of a directory.
    pub fn decode(bytes: &[u8]) -> Result<Self, proto::DecodeError> {
        let directory = Self::try_from(proto::Directory::decode(bytes)?)?;
        if directory.encode() == bytes { Ok(directory) } else { Err(proto::DecodeError::NotCanonical) }
    }
}
