//! The messages of `snix.castore.v1`, and the conversions that check every rule of the format.

use bytes::Bytes;
pub use cofferdam_proto::snix::castore::v1::*;
use prost::{
    Message as _,
    encoding::{DecodeContext, decode_key, skip_field},
};

use crate::{
    B3Digest, DigestError, DirectoryError, NameError, Node, PathComponent, SymlinkTarget, TargetError, escape,
};

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

/// Counts the fields of an encoded directory: each entry is one.
pub(crate) fn count_entries(mut rest: &[u8]) -> Result<usize, DecodeError> {
    let mut count = 0;
    while !rest.is_empty() {
        let (tag, wire_type) = decode_key(&mut rest)?;
        skip_field(wire_type, tag, &mut rest, DecodeContext::default())?;
        count += 1;
    }
    Ok(count)
}

/// The canonical encoding, and the digest that it has.
impl crate::Directory {
    /// The canonical encoding: a `snix.castore.v1.Directory` message with its fields in order, without default values, and
    /// with sorted lists.
    pub fn encode(&self) -> Vec<u8> {
        Directory::from(self).encode_to_vec()
    }

    /// Decodes the canonical encoding.
    ///
    /// # Errors
    ///
    /// The bytes are not a valid message, break a rule, or are not the canonical encoding.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let directory = Self::try_from(Directory::decode(bytes)?)?;
        if directory.encode() == bytes { Ok(directory) } else { Err(DecodeError::NotCanonical) }
    }

    /// The digest of the canonical encoding.
    pub fn digest(&self) -> B3Digest {
        B3Digest::of(&self.encode())
    }

    /// The node that stands for this directory.
    pub fn to_node(&self) -> Node {
        Node::Directory { digest: self.digest(), size: self.size() }
    }
}

impl From<&crate::Directory> for Directory {
    fn from(directory: &crate::Directory) -> Self {
        let mut message = Self::default();
        for (name, node) in directory.nodes() {
            match join(name.clone().into(), node.clone()) {
                entry::Entry::Directory(entry) => message.directories.push(entry),
                entry::Entry::File(entry) => message.files.push(entry),
                entry::Entry::Symlink(entry) => message.symlinks.push(entry),
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

/// An [`Entry`] from and to a [`Node`].
pub trait EntryExt: Sized {
    /// The entry of a node that has a name.
    fn named(name: PathComponent, node: Node) -> Self;

    /// The entry of a node that has no name; its `name` is empty.
    fn unnamed(node: Node) -> Self;

    /// The name and the node of an entry.
    ///
    /// # Errors
    ///
    /// When a field breaks a rule, an empty name included.
    fn try_into_named(self) -> Result<(PathComponent, Node), EntryError>;

    /// The node of an entry that has no name.
    ///
    /// # Errors
    ///
    /// When a field breaks a rule or the name is not empty.
    fn try_into_unnamed(self) -> Result<Node, EntryError>;
}

impl EntryExt for Entry {
    fn named(name: PathComponent, node: Node) -> Self {
        Self { entry: Some(join(name.into(), node)) }
    }

    fn unnamed(node: Node) -> Self {
        Self { entry: Some(join(Bytes::new(), node)) }
    }

    fn try_into_named(self) -> Result<(PathComponent, Node), EntryError> {
        let (name, node) = split(self)?;
        Ok((name.try_into().map_err(EntryError::Name)?, node))
    }

    fn try_into_unnamed(self) -> Result<Node, EntryError> {
        let (name, node) = split(self)?;
        if name.is_empty() { Ok(node) } else { Err(EntryError::Named(escape(&name))) }
    }
}

fn join(name: Bytes, node: Node) -> entry::Entry {
    let digest_bytes = |digest: B3Digest| Bytes::copy_from_slice(digest.as_slice());
    match node {
        Node::Directory { digest, size } => {
            entry::Entry::Directory(DirectoryEntry { name, digest: digest_bytes(digest), size })
        }
        Node::File { digest, size, executable } => {
            entry::Entry::File(FileEntry { name, digest: digest_bytes(digest), size, executable })
        }
        Node::Symlink { target } => entry::Entry::Symlink(SymlinkEntry { name, target: target.into() }),
    }
}

fn split(entry: Entry) -> Result<(Bytes, Node), EntryError> {
    let digest = |bytes: Bytes| B3Digest::try_from(bytes.as_ref()).map_err(EntryError::Digest);
    Ok(match entry.entry.ok_or(EntryError::Absent)? {
        entry::Entry::Directory(entry) => {
            (entry.name, Node::Directory { digest: digest(entry.digest)?, size: entry.size })
        }
        entry::Entry::File(entry) => {
            let node = Node::File { digest: digest(entry.digest)?, size: entry.size, executable: entry.executable };
            (entry.name, node)
        }
        entry::Entry::Symlink(entry) => {
            (entry.name, Node::Symlink { target: SymlinkTarget::try_from(entry.target).map_err(EntryError::Target)? })
        }
    })
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;
    use crate::testing::{file, name};

    const NAME: &str = "n";

    fn directory_entry(name: &str, size: u64) -> DirectoryEntry {
        DirectoryEntry { name: name.to_owned().into(), digest: vec![0; 32].into(), size }
    }

    fn file_entry(name: &str) -> FileEntry {
        FileEntry { name: name.to_owned().into(), digest: vec![0; 32].into(), size: 1, executable: false }
    }

    fn symlink_entry(name: &str, target: &'static [u8]) -> SymlinkEntry {
        SymlinkEntry { name: name.to_owned().into(), target: target.into() }
    }

    /// The error with all its causes, in one line.
    fn refused(message: Directory) -> String {
        let error = crate::Directory::try_from(message).unwrap_err();
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        text
    }

    #[test]
    fn each_list_must_be_sorted() {
        let directories = vec![directory_entry("b", 0), directory_entry("a", 0)];
        let expected = "directories[1].name: \"a\" comes after \"b\"; each list is sorted by name";
        assert_eq!(refused(Directory { directories, ..Default::default() }), expected);
        let files = vec![file_entry("b"), file_entry("a")];
        assert!(refused(Directory { files, ..Default::default() }).starts_with("files[1].name"));
        let symlinks = vec![symlink_entry("b", b"t"), symlink_entry("a", b"t")];
        assert!(refused(Directory { symlinks, ..Default::default() }).starts_with("symlinks[1].name"));
    }

    #[test]
    fn names_are_unique_within_and_across_lists() {
        let files = vec![file_entry(NAME), file_entry(NAME)];
        let expected = "files[1]: two entries have the name \"n\"; names in a directory are unique";
        assert_eq!(refused(Directory { files, ..Default::default() }), expected);
        let message = Directory {
            directories: vec![directory_entry(NAME, 0)],
            files: vec![file_entry(NAME)],
            ..Default::default()
        };
        assert!(refused(message).starts_with("files[0]: two entries"));
        let message = Directory {
            files: vec![file_entry("a"), file_entry(NAME)],
            symlinks: vec![symlink_entry(NAME, b"t")],
            ..Default::default()
        };
        assert!(refused(message).starts_with("symlinks[0]: two entries"));
    }

    #[test]
    fn names_digests_and_targets_keep_their_rules() {
        let with_file = |entry| refused(Directory { files: vec![entry], ..Default::default() });
        assert_eq!(with_file(file_entry("a/b")), "files[0]: name: the name \"a/b\" holds a slash");
        assert_eq!(with_file(file_entry("")), "files[0]: name: the name \"\" is empty");
        let short = FileEntry { digest: vec![0; 31].into(), ..file_entry(NAME) };
        assert_eq!(with_file(short), "files[0]: digest: a digest has 32 bytes, not 31");
        let long = DirectoryEntry { digest: vec![0; 33].into(), ..directory_entry(NAME, 0) };
        let message = refused(Directory { directories: vec![long], ..Default::default() });
        assert_eq!(message, "directories[0]: digest: a digest has 32 bytes, not 33");
        let message = refused(Directory { symlinks: vec![symlink_entry(NAME, b"")], ..Default::default() });
        assert_eq!(message, "symlinks[0]: target: the target \"\" is empty");
    }

    #[test]
    fn sizes_may_not_overflow() {
        let message = Directory {
            directories: vec![directory_entry("a", u64::MAX - 2), directory_entry("b", 1)],
            ..Default::default()
        };
        let expected = "directories[1]: with the entry \"b\" the directory has a size of more than 2^64-1";
        assert_eq!(refused(message), expected);
        let message = Directory {
            directories: vec![directory_entry("a", u64::MAX - 2)],
            files: vec![file_entry("f")],
            ..Default::default()
        };
        assert!(refused(message).starts_with("files[0]: with the entry"));
    }

    #[test]
    fn entries_have_a_name_exactly_where_one_is_due() {
        let node = file(b"x", true);
        assert_eq!(Entry::named(name(NAME), node.clone()).try_into_named(), Ok((name(NAME), node.clone())));
        assert_eq!(Entry::unnamed(node.clone()).try_into_unnamed(), Ok(node.clone()));
        let error = Entry::named(name(NAME), node.clone()).try_into_unnamed().unwrap_err();
        assert_eq!(error, EntryError::Named(NAME.to_owned()));
        assert!(matches!(Entry::unnamed(node).try_into_named(), Err(EntryError::Name(_))));
        assert_eq!(Entry::default().try_into_unnamed(), Err(EntryError::Absent));
    }
}
