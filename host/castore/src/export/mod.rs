//! Export: writes a node of the store to the file system.
//!
//! Everything is written to a temporary directory beside the destination, and renamed at the end. So a failed export leaves
//! nothing, and the destination is complete as soon as it exists. Each file is created through the descriptor of its
//! directory, which only this export uses, so nothing is written elsewhere.

use std::{
    collections::{HashMap, HashSet, btree_map},
    fs::{self, File},
    io::{self, Read as _},
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _},
    path::{Path, PathBuf},
};

use futures::{TryStreamExt as _, executor::block_on};
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, openat, renameat, renameat2},
    sys::stat::{Mode, mkdirat},
    unistd::{UnlinkatFlags, linkat, symlinkat, unlinkat},
};

mod aside;

use crate::{B3Digest, Directory, Node, PathComponent, Store};
use aside::Aside;

/// Why a node could not be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The destination exists, and nothing is overwritten.
    #[error("{} exists already: name another path", .0.display())]
    Exists(PathBuf),
    /// The destination does not end with a file name, as in `/` and `a/..`.
    #[error("{} does not end with a file name for the export", .0.display())]
    Unnamed(PathBuf),
    /// The file system refused something.
    #[error("{}: can't {action}", path.display())]
    Write {
        /// Where, below the destination.
        path: PathBuf,
        /// What was tried, as in "create the directory".
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The store lacks something.
    #[error("{}: the {what} {digest} is not in the store", path.display())]
    Missing {
        /// Where it was needed, below the destination.
        path: PathBuf,
        /// "blob" or "directory".
        what: &'static str,
        /// Which one.
        digest: B3Digest,
    },
    /// A blob or directory of the store has another size than the node records.
    #[error("{}: the {what} {digest} has size {actual}, but its node records {expected}", path.display())]
    Size {
        /// Where it was needed, below the destination.
        path: PathBuf,
        /// "blob" or "directory".
        what: &'static str,
        /// Which one.
        digest: B3Digest,
        /// The recorded size.
        expected: u64,
        /// The actual size.
        actual: u64,
    },
    /// The caller interrupted the export.
    #[error("the export was interrupted")]
    Interrupted,
    /// The store failed.
    #[error("{}: can't be read from the store", path.display())]
    Store {
        /// Where it was needed, below the destination.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

const DIRECTORY_MODE: Mode = Mode::from_bits_retain(0o755);
const FILE_MODE: Mode = Mode::from_bits_retain(0o644);

/// Bytes of a file that are written before the export can be interrupted again.
const PIECE_BYTES: u64 = 64 * 1024 * 1024;

/// Writes a node to `dest`. `dest` must not exist, but its parent directory must. Files get mode 0644, or 0755 when
/// executable, and directories 0755, less the umask.
///
/// Blocks: call it from a thread that may.
///
/// # Errors
///
/// Names the path below `dest` where the export failed. It leaves nothing behind.
pub fn export(store: &Store, node: &Node, dest: &Path) -> Result<(), ExportError> {
    export_unless(store, node, dest, Existing::Refused, &|| false)
}

/// What becomes of something that is at the destination already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// It stays, and the export fails.
    Refused,
    /// It is removed when the export is complete, whatever it is.
    Replaced,
}

/// Like [`export`], but `interrupted` is called before each entry and each piece of a file, and ends the export when it
/// returns `true`.
///
/// # Errors
///
/// As [`export`], and [`ExportError::Interrupted`].
pub fn export_unless(
    store: &Store,
    node: &Node,
    dest: &Path,
    existing: Existing,
    interrupted: &dyn Fn() -> bool,
) -> Result<(), ExportError> {
    if existing == Existing::Refused && fs::symlink_metadata(dest).is_ok() {
        return Err(ExportError::Exists(dest.to_owned()));
    }
    let name = dest.file_name().ok_or_else(|| ExportError::Unnamed(dest.to_owned()))?;
    let parent = match dest.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let parent_dir = openat(AT_FDCWD, parent, flags, Mode::empty())
        .map_err(|errno| write_error(parent, "open the directory", errno))?;
    let mut exporter = Exporter { store, interrupted, directories: HashMap::new(), path: dest.to_owned() };
    if let Node::Directory { digest, .. } = node {
        exporter.directories = closure(store, digest, dest)?;
    }
    let aside = Aside::create(&parent_dir, parent)?;
    let content = Path::new("content");
    match node {
        Node::Directory { digest, size } => exporter.tree(&aside.dir, content, digest, *size)?,
        node => exporter.leaf(&aside.dir, content, node)?,
    }
    let name = Path::new(name);
    let renamed = match renameat2(&aside.dir, content, &parent_dir, name, RenameFlags::RENAME_NOREPLACE) {
        // NFS and other file systems know no flags.
        Err(Errno::EINVAL) => rename_without_flags(&aside.dir, content, &parent_dir, name, node),
        renamed => renamed,
    };
    let renamed = match renamed {
        Err(Errno::EEXIST) if existing == Existing::Replaced => exchange(&aside.dir, content, &parent_dir, name),
        renamed => renamed,
    };
    match renamed {
        Ok(()) => Ok(()),
        Err(Errno::EEXIST | Errno::ENOTEMPTY) => Err(ExportError::Exists(dest.to_owned())),
        Err(errno) => Err(write_error(dest, "rename the export", errno)),
    }
}

/// Replaces what is there, which is removed with the temporary directory.
fn exchange(aside: &OwnedFd, content: &Path, parent_dir: &OwnedFd, name: &Path) -> nix::Result<()> {
    match renameat2(aside, content, parent_dir, name, RenameFlags::RENAME_EXCHANGE) {
        Err(Errno::EINVAL) => {
            renameat(parent_dir, name, aside, "replaced")?;
            renameat(aside, content, parent_dir, name)
        }
        renamed => renamed,
    }
}

/// Replaces nothing either. A link never replaces a file, and a rename only replaces an empty directory, which is created
/// here.
fn rename_without_flags(
    aside: &OwnedFd,
    content: &Path,
    parent_dir: &OwnedFd,
    name: &Path,
    node: &Node,
) -> nix::Result<()> {
    if !matches!(node, Node::Directory { .. }) {
        // The first name is removed with the temporary directory.
        return linkat(aside, content, parent_dir, name, AtFlags::empty());
    }
    mkdirat(parent_dir, name, Mode::S_IRWXU)?;
    renameat(aside, content, parent_dir, name).inspect_err(|_| {
        // Fails if somebody has added a file there.
        let _ = unlinkat(parent_dir, name, UnlinkatFlags::RemoveDir);
    })
}

struct Exporter<'a> {
    store: &'a Store,
    interrupted: &'a dyn Fn() -> bool,
    /// All directories of the export.
    directories: HashMap<B3Digest, Directory>,
    /// The destination of the current entry.
    path: PathBuf,
}

/// A directory whose entries are being written.
struct Level {
    dir: OwnedFd,
    nodes: btree_map::IntoIter<PathComponent, Node>,
}

impl Exporter<'_> {
    /// Writes a directory and everything below it. Depth costs descriptors, but no stack.
    fn tree(&mut self, into: &OwnedFd, name: &Path, digest: &B3Digest, size: u64) -> Result<(), ExportError> {
        let mut levels = vec![self.level(into, name, digest, size)?];
        while let Some(Level { dir, nodes }) = levels.last_mut() {
            let Some((name, node)) = nodes.next() else {
                levels.pop();
                if !levels.is_empty() {
                    self.path.pop();
                }
                continue;
            };
            if (self.interrupted)() {
                return Err(ExportError::Interrupted);
            }
            let name = Path::new(std::ffi::OsStr::from_bytes(name.as_bytes()));
            self.path.push(name);
            if let Node::Directory { digest, size } = node {
                let level = self.level(dir, name, &digest, size)?;
                levels.push(level);
            } else {
                self.leaf(dir, name, &node)?;
                self.path.pop();
            }
        }
        Ok(())
    }

    fn level(&self, into: &OwnedFd, name: &Path, digest: &B3Digest, size: u64) -> Result<Level, ExportError> {
        let directory = self.directories.get(digest).ok_or_else(|| self.missing("directory", digest))?;
        self.check_size("directory", digest, size, directory.sizes().expect(size))?;
        mkdirat(into, name, DIRECTORY_MODE).map_err(|errno| self.failed("create the directory", errno))?;
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let dir = openat(into, name, flags, Mode::empty()).map_err(|errno| self.failed("open the directory", errno))?;
        Ok(Level { dir, nodes: directory.clone().into_nodes() })
    }

    fn leaf(&self, into: &OwnedFd, name: &Path, node: &Node) -> Result<(), ExportError> {
        match node {
            Node::Symlink { target } => {
                symlinkat(target.as_bytes(), into, name).map_err(|errno| self.failed("create the symbolic link", errno))
            }
            Node::File { digest, size, executable } => self.file(into, name, digest, *size, *executable),
            Node::Directory { .. } => unreachable!("directories are levels"),
        }
    }

    fn file(
        &self,
        into: &OwnedFd,
        name: &Path,
        digest: &B3Digest,
        size: u64,
        executable: bool,
    ) -> Result<(), ExportError> {
        let found = block_on(self.store.blobs.open_file(digest))
            .map_err(|source| ExportError::Store { path: self.path.clone(), source })?;
        let mut blob = found.ok_or_else(|| self.missing("blob", digest))?;
        let mode = if executable { DIRECTORY_MODE } else { FILE_MODE };
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(into, name, flags, mode).map_err(|errno| self.failed("create the file", errno))?;
        let mut file = File::from(file);
        let mut copied = 0;
        loop {
            if (self.interrupted)() {
                return Err(ExportError::Interrupted);
            }
            let piece = io::copy(&mut (&mut blob).take(PIECE_BYTES), &mut file);
            let piece = piece.map_err(|source| self.failed("write the file", source))?;
            copied += piece;
            if piece < PIECE_BYTES {
                break;
            }
        }
        self.check_size("blob", digest, size, copied)
    }

    fn check_size(&self, what: &'static str, digest: &B3Digest, expected: u64, actual: u64) -> Result<(), ExportError> {
        if actual == expected {
            return Ok(());
        }
        Err(ExportError::Size { path: self.path.clone(), what, digest: *digest, expected, actual })
    }

    fn missing(&self, what: &'static str, digest: &B3Digest) -> ExportError {
        ExportError::Missing { path: self.path.clone(), what, digest: *digest }
    }

    fn failed(&self, action: &'static str, source: impl Into<io::Error>) -> ExportError {
        write_error(&self.path, action, source)
    }
}

/// The root directory and all directories below it. Errors name `path`, the place of the root. A remote store can send all
/// of them in one answer.
pub(crate) fn closure(
    store: &Store,
    root: &B3Digest,
    path: &Path,
) -> Result<HashMap<B3Digest, Directory>, ExportError> {
    let found = block_on(store.directories.get_recursive(root).try_collect::<Vec<_>>());
    let found = found.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => find_missing(store, root, path, source),
        _ => ExportError::Store { path: path.to_owned(), source },
    })?;
    Ok(found.into_iter().map(|directory| (directory.digest(), directory)).collect())
}

/// Finds out which directory below the root is missing, and where. If none is, the error is `otherwise`.
fn find_missing(store: &Store, root: &B3Digest, path: &Path, otherwise: io::Error) -> ExportError {
    let mut seen = HashSet::from([*root]);
    let mut waiting = vec![(path.to_owned(), *root)];
    while let Some((path, digest)) = waiting.pop() {
        match block_on(store.directories.get(&digest)) {
            Ok(None) => return ExportError::Missing { path, what: "directory", digest },
            Err(source) => return ExportError::Store { path, source },
            Ok(Some(directory)) => {
                for (name, node) in directory.nodes() {
                    if let Node::Directory { digest, .. } = node
                        && seen.insert(*digest)
                    {
                        waiting.push((path.join(std::ffi::OsStr::from_bytes(name.as_bytes())), *digest));
                    }
                }
            }
        }
    }
    ExportError::Store { path: path.to_owned(), source: otherwise }
}

fn write_error(path: &Path, action: &'static str, source: impl Into<io::Error>) -> ExportError {
    ExportError::Write { path: path.to_owned(), action, source: source.into() }
}

#[cfg(test)]
mod tests;
