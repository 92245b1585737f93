//! Import: a path of the host becomes a node of the store.
//!
//! ```text
//!   directory ──list──▶ symlinks ─────────────────────────────┐
//!       ▲          ├──▶ files, in batches ──read──▶ blobs ────┼──▶ tree (leaves become whole, then their parents)
//!       └── jobs ◀─┴──── subdirectories                       │         │
//!            (last in, first out; a few threads)              ▼         ▼ when the root is whole
//!                                               blobs.commit(), then all directories, leaves first
//! ```
//!
//! Every step down goes through the descriptor of the directory above and follows no symbolic link, so a tree that is
//! changed meanwhile may give an error but never something from outside of it.

use std::{io, path::Path, path::PathBuf, thread};

use nix::{
    fcntl::{AT_FDCWD, AtFlags},
    sys::stat::{FileStat, SFlag, fstatat},
};

mod files;
mod jobs;
#[cfg(test)]
mod tests;
mod tree;

use crate::{Node, Store, TargetError};

/// Most threads that import one path.
const MAX_THREADS: usize = 8;

/// Why a path could not be imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The file system refused something, or what was there has gone meanwhile.
    #[error("{}: can't {action}", path.display())]
    Read {
        /// Where.
        path: PathBuf,
        /// What was tried, as in "open the file".
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A kind of file that castore has no node for.
    #[error("{} is a {kind}; only directories, regular files and symbolic links can be imported: remove it", path.display())]
    Unsupported {
        /// Where.
        path: PathBuf,
        /// What is there.
        kind: UnsupportedKind,
    },
    /// The file was written to while it was read, or is another one now.
    #[error("{} changed while it was being imported; import it again when nothing writes to it", .0.display())]
    Changed(PathBuf),
    /// A symbolic link that castore can't hold.
    #[error("{}: can't hold this symbolic link", path.display())]
    Target {
        /// Where.
        path: PathBuf,
        /// Which rule its target breaks.
        #[source]
        source: TargetError,
    },
    /// The store could not take it.
    #[error("{}: the store can't take it", path.display())]
    Store {
        /// What was being imported.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A kind of file that has no node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnsupportedKind {
    /// A named pipe.
    Fifo,
    /// A Unix socket.
    Socket,
    /// A block device.
    BlockDevice,
    /// A character device.
    CharacterDevice,
    /// None that Linux documents.
    Unknown,
}

impl std::fmt::Display for UnsupportedKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Fifo => "fifo",
            Self::Socket => "socket",
            Self::BlockDevice => "block device",
            Self::CharacterDevice => "character device",
            Self::Unknown => "file of unknown kind",
        })
    }
}

/// Imports what is at this path, durably. A symbolic link is imported as one, at the root too.
///
/// Blocks: call it from a thread that may.
///
/// # Errors
///
/// Names the path below `path` where it failed; nothing of it stays in the store.
pub fn import_path(store: &Store, path: &Path) -> Result<Node, ImportError> {
    let stat =
        fstatat(AT_FDCWD, path, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(|errno| read_error(path, "look at it", errno))?;
    let store = &store.batch();
    let threads = thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
    let node = match Kind::of(&stat) {
        Kind::Symlink => files::read_symlink(AT_FDCWD, path, path)?,
        Kind::File => {
            let node = files::Importer::new(store).import(AT_FDCWD, path, path)?;
            commit_blobs(store, path)?;
            node
        }
        Kind::Directory => {
            let directories = jobs::run(store, path, threads)?;
            commit_blobs(store, path)?;
            put_directories(store, directories)
                .map_err(|source| ImportError::Store { path: path.to_owned(), source })?
        }
        Kind::Unsupported(kind) => return Err(ImportError::Unsupported { path: path.to_owned(), kind }),
    };
    Ok(node)
}

fn commit_blobs(store: &Store, path: &Path) -> Result<(), ImportError> {
    block_on(store.blobs.commit()).map_err(|source| ImportError::Store { path: path.to_owned(), source })
}

/// Adds directories that come leaves first; the node of the last one.
pub(crate) fn put_directories(store: &Store, directories: Vec<crate::Directory>) -> io::Result<Node> {
    let size = directories.last().map_or(0, crate::Directory::size);
    let mut putter = store.directories.put_multiple_start();
    let digest = block_on(async {
        for directory in directories {
            putter.put(directory).await?;
        }
        putter.close().await
    })?;
    Ok(Node::Directory { digest, size })
}

/// What kind of file it is, as far as this import is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Directory,
    File,
    Symlink,
    Unsupported(UnsupportedKind),
}

impl Kind {
    fn of(stat: &FileStat) -> Self {
        match SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT {
            SFlag::S_IFDIR => Self::Directory,
            SFlag::S_IFREG => Self::File,
            SFlag::S_IFLNK => Self::Symlink,
            SFlag::S_IFIFO => Self::Unsupported(UnsupportedKind::Fifo),
            SFlag::S_IFSOCK => Self::Unsupported(UnsupportedKind::Socket),
            SFlag::S_IFBLK => Self::Unsupported(UnsupportedKind::BlockDevice),
            SFlag::S_IFCHR => Self::Unsupported(UnsupportedKind::CharacterDevice),
            _ => Self::Unsupported(UnsupportedKind::Unknown),
        }
    }
}

fn read_error(path: &Path, action: &'static str, source: impl Into<io::Error>) -> ImportError {
    ImportError::Read { path: path.to_owned(), action, source: source.into() }
}

/// Waits for a service. Works on threads of an async runtime and on others.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    futures::executor::block_on(future)
}
