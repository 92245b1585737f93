use crate::{B3Digest, SymlinkTarget};

/// A file, a directory or a symbolic link, without its name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Node {
    /// A directory.
    Directory {
        /// The digest of its canonical encoding; see [`Directory::digest`](crate::Directory::digest).
        digest: B3Digest,
        /// See [`Directory::size`](crate::Directory::size).
        size: u64,
    },
    /// A regular file.
    File {
        /// The digest of its contents.
        digest: B3Digest,
        /// The length of its contents in bytes.
        size: u64,
        /// Whether its owner may execute it (0o100).
        executable: bool,
    },
    /// A symbolic link.
    Symlink {
        /// What it points to.
        target: SymlinkTarget,
    },
}
