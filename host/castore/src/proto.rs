//! The messages of `snix.castore.v1`, and the conversions that check every rule of the format.

use bytes::Bytes;

use crate::{
    B3Digest, DigestError, DirectoryError, NameError, Node, PathComponent, SymlinkTarget, TargetError, escape,
};

include!(concat!(env!("OUT_DIR"), "/snix.castore.v1.rs"));

/// `castore.proto` as an encoded `FileDescriptorSet`.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/castore.binpb"));

/// The rule that a directory message breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ValidateError {
    /// A field with a bad value.
    #[error("{list}[{index}]")]
    Entry {
        /// The list: `directories`, `files` or `symlinks`.
        list: &'static str,
        /// Where in the list, from 0.
        index: usize,
        /// Which field, and what is wrong.
        #[source]
        source: EntryError,
    },
    /// A list is not in the order of its names.
    #[error("{list}[{index}].name: \"{name}\" comes after \"{previous}\"; each list is sorted by name")]
    Unsorted {
        /// The list: `directories`, `files` or `symlinks`.
        list: &'static str,
        /// Where in the list, from 0.
        index: usize,
        /// The name there.
        name: String,
        /// The name before it.
        previous: String,
    },
    /// The entries can't be in one directory.
    #[error("{list}[{index}]")]
    Directory {
        /// The list: `directories`, `files` or `symlinks`.
        list: &'static str,
        /// Where in the list, from 0.
        index: usize,
        /// What is wrong.
        #[source]
        source: DirectoryError,
    },
}

/// The rule that an entry breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// The `entry` is not set.
    #[error("entry: is neither directory nor file nor symlink")]
    Absent,
    /// The name.
    #[error("name")]
    Name(#[source] NameError),
    /// A name where there must be none.
    #[error("name: \"{0}\" must be empty here")]
    Named(String),
    /// The digest.
    #[error("digest")]
    Digest(#[source] DigestError),
    /// The symbolic link's target.
    #[error("target")]
    Target(#[source] TargetError),
}

/// Why bytes are no directory.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Not a message.
    #[error("the bytes are not a snix.castore.v1.Directory")]
    Malformed(#[from] prost::DecodeError),
    /// A message that breaks a rule.
    #[error("the directory breaks a rule")]
    Invalid(#[from] ValidateError),
    /// A message that keeps the rules, in another encoding than the canonical one.
    #[error("the directory is not in its canonical encoding (unknown fields, or fields out of order)")]
    NotCanonical,
}

impl From<&crate::Directory> for Directory {
    fn from(directory: &crate::Directory) -> Self {
        let mut message = Self::default();
        for (name, node) in directory.nodes() {
            match Entry::new(name.clone().into(), node.clone()).entry {
                Some(entry::Entry::Directory(entry)) => message.directories.push(entry),
                Some(entry::Entry::File(entry)) => message.files.push(entry),
                Some(entry::Entry::Symlink(entry)) => message.symlinks.push(entry),
                None => unreachable!("Entry::new always sets the entry"),
            }
        }
        message
    }
}

impl From<crate::Directory> for Directory {
    fn from(directory: crate::Directory) -> Self {
        Self::from(&directory)
    }
}

impl TryFrom<Directory> for crate::Directory {
    type Error = ValidateError;

    fn try_from(message: Directory) -> Result<Self, ValidateError> {
        let mut directory = Self::new();
        add_list(&mut directory, "directories", message.directories.into_iter().map(entry::Entry::Directory))?;
        add_list(&mut directory, "files", message.files.into_iter().map(entry::Entry::File))?;
        add_list(&mut directory, "symlinks", message.symlinks.into_iter().map(entry::Entry::Symlink))?;
        Ok(directory)
    }
}

fn add_list(
    directory: &mut crate::Directory,
    list: &'static str,
    entries: impl Iterator<Item = entry::Entry>,
) -> Result<(), ValidateError> {
    let mut previous: Option<PathComponent> = None;
    for (index, entry) in entries.enumerate() {
        let (name, node) = Entry { entry: Some(entry) }.try_into_named().map_err(|source| ValidateError::Entry {
            list,
            index,
            source,
        })?;
        // Equal names are left to `add`, which says so more clearly.
        if let Some(previous) = previous.filter(|previous| *previous > name) {
            let (name, previous) = (escape(name.as_bytes()), escape(previous.as_bytes()));
            return Err(ValidateError::Unsorted { list, index, name, previous });
        }
        directory.add(name.clone(), node).map_err(|source| ValidateError::Directory { list, index, source })?;
        previous = Some(name);
    }
    Ok(())
}

impl Entry {
    /// The entry of a node that has a name.
    pub fn named(name: PathComponent, node: Node) -> Self {
        Self::new(name.into(), node)
    }

    /// The entry of a node that has no name; its `name` is empty.
    pub fn unnamed(node: Node) -> Self {
        Self::new(Bytes::new(), node)
    }

    fn new(name: Bytes, node: Node) -> Self {
        let digest_bytes = |digest: B3Digest| Bytes::copy_from_slice(digest.as_slice());
        let entry = match node {
            Node::Directory { digest, size } => {
                entry::Entry::Directory(DirectoryEntry { name, digest: digest_bytes(digest), size })
            }
            Node::File { digest, size, executable } => {
                entry::Entry::File(FileEntry { name, digest: digest_bytes(digest), size, executable })
            }
            Node::Symlink { target } => entry::Entry::Symlink(SymlinkEntry { name, target: target.into() }),
        };
        Self { entry: Some(entry) }
    }

    /// The name and the node of an entry.
    ///
    /// # Errors
    ///
    /// When a field breaks a rule, an empty name included.
    pub fn try_into_named(self) -> Result<(PathComponent, Node), EntryError> {
        let (name, node) = self.split()?;
        Ok((name.try_into().map_err(EntryError::Name)?, node))
    }

    /// The node of an entry that has no name.
    ///
    /// # Errors
    ///
    /// When a field breaks a rule or the name is not empty.
    pub fn try_into_unnamed(self) -> Result<Node, EntryError> {
        let (name, node) = self.split()?;
        if name.is_empty() { Ok(node) } else { Err(EntryError::Named(escape(&name))) }
    }

    fn split(self) -> Result<(Bytes, Node), EntryError> {
        let digest = |bytes: Bytes| B3Digest::try_from(bytes.as_ref()).map_err(EntryError::Digest);
        Ok(match self.entry.ok_or(EntryError::Absent)? {
            entry::Entry::Directory(entry) => {
                (entry.name, Node::Directory { digest: digest(entry.digest)?, size: entry.size })
            }
            entry::Entry::File(entry) => {
                let node = Node::File { digest: digest(entry.digest)?, size: entry.size, executable: entry.executable };
                (entry.name, node)
            }
            entry::Entry::Symlink(entry) => (
                entry.name,
                Node::Symlink { target: SymlinkTarget::try_from(entry.target).map_err(EntryError::Target)? },
            ),
        })
    }
}
