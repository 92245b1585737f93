use crate::{B3Digest, SymlinkTarget};

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Node {
    /// A directory.
    Directory {
        /// Of its canonical encoding; see [`crate::Directory::digest`].
        digest: B3Digest,
        /// Entries below it, at any depth.
        size: u64,
    },
    /// A regular file.
    File {
        /// Of its contents.
        digest: B3Digest,
        /// Bytes in its contents.
        size: u64,
        /// Whether its owner may execute it (0o100).
        executable: bool,
    },
    /// A symbolic link.
    Symlink {
        /// Where it points.
        target: SymlinkTarget,
    },
}
