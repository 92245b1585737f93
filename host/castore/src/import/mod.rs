//! Import: adds files of the host to the store.
//!
//! ```text
//!   directory ──list──▶ symlinks ─────────────────────────────┐
//!       ▲          ├──▶ files, in batches ──read──▶ blobs ────┼──▶ tree (leaves become whole, then their parents)
//!       └── jobs ◀─┴──── subdirectories                       │         │
//!            (last in, first out; a few threads)              ▼         ▼ when the root is whole
//!                                               blobs.commit(), then all directories, leaves first
//! ```
//!
//! Each entry is opened through the descriptor of its directory, without following symbolic links. So a tree that changes
//! meanwhile may cause an error, but never brings in files from outside.

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

/// Maximum number of threads for one import.
const MAX_THREADS: usize = 8;

/// Why a path could not be imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The file system refused something, or the file has gone meanwhile.
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
    /// castore has no node for this kind of file.
    #[error("{} is a {kind}; only directories, regular files and symbolic links can be imported: remove it", path.display())]
    Unsupported {
        /// Where.
        path: PathBuf,
        /// Its kind.
        kind: UnsupportedKind,
    },
    /// The file was written to or replaced while it was read.
    #[error("{} changed while it was being imported: import it again when nothing writes to it", .0.display())]
    Changed(PathBuf),
    /// castore can't store this symbolic link.
    #[error("{}: can't store this symbolic link", path.display())]
    Target {
        /// Where.
        path: PathBuf,
        /// The rule that its target breaks.
        #[source]
        source: TargetError,
    },
    /// The store failed.
    #[error("{}: can't be stored", path.display())]
    Store {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A kind of file without a node.
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
    /// A kind that Linux does not document.
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

/// What a root lost, since castore can't hold it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lost {
    /// Device nodes, fifos and sockets that were left out.
    pub devices: u64,
    /// Files that were set-user-ID or set-group-ID.
    pub set_id: u64,
}

/// The bits of a mode that make a file set-user-ID or set-group-ID.
pub(crate) const SET_ID: u32 = 0o6000;

/// Imports a file, directory or symbolic link, durably. A symbolic link is never followed, even if `path` is one.
///
/// Blocks: call it from a thread that may.
///
/// # Errors
///
/// Names the path below `path` where the import failed. It leaves nothing in the store.
pub fn import_path(store: &Store, path: &Path) -> Result<Node, ImportError> {
    import_with(store, path, &Options::default()).map(|(node, _)| node)
}

/// Whether to leave out an entry.
pub type LeaveOut<'a> = dyn Fn(&Path, bool) -> bool + Sync + 'a;

/// Observes an import: so many more files are in the store, and so many more bytes of files.
pub type Observe<'a> = dyn Fn(u64, u64) + Sync + 'a;

/// How a path is imported, beside [`import_path`]'s way.
#[derive(Default)]
pub struct Options<'a> {
    /// Leave out device nodes, fifos and sockets, which are an error otherwise.
    pub without_devices: bool,
    /// Leave out entries for which this is true. Gets the entry's path, and whether it is a directory.
    pub leave_out: Option<&'a LeaveOut<'a>>,
    /// Called from several threads while files are imported.
    pub observe: Option<&'a Observe<'a>>,
}

/// Imports a path as these options say.
///
/// # Errors
///
/// As [`import_path`].
pub fn import_with(store: &Store, path: &Path, options: &Options<'_>) -> Result<(Node, Lost), ImportError> {
    let stat =
        fstatat(AT_FDCWD, path, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(|errno| read_error(path, "look at it", errno))?;
    let store = &store.batch();
    let threads = thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
    let node = match Kind::of(&stat) {
        Kind::Symlink => files::read_symlink(AT_FDCWD, path, path)?,
        Kind::File => {
            let (node, _) = files::Importer::new(store, options.observe).import(AT_FDCWD, path, path)?;
            commit_blobs(store, path)?;
            node
        }
        Kind::Directory => {
            let (directories, lost) = jobs::run(store, path, threads, options)?;
            commit_blobs(store, path)?;
            let node = put_directories(store, directories)
                .map_err(|source| ImportError::Store { path: path.to_owned(), source })?;
            return Ok((node, lost));
        }
        Kind::Unsupported(kind) => return Err(ImportError::Unsupported { path: path.to_owned(), kind }),
    };
    Ok((node, Lost::default()))
}

fn commit_blobs(store: &Store, path: &Path) -> Result<(), ImportError> {
    block_on(store.blobs.commit()).map_err(|source| ImportError::Store { path: path.to_owned(), source })
}

/// Adds directories, which are sorted leaves first. Returns the node of the last one, the root.
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

/// The kind of a file.
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

/// Waits for a service, on any thread.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    futures::executor::block_on(future)
}
