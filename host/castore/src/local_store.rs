//! A store in local files, which can be verified and garbage-collected, and which has named roots.
//!
//! ```text
//!   DIR/b3, DIR/staging, DIR/leases, DIR/format
//!                                     see `LocalBlobService`
//!   DIR/roots                         locked exclusively by a collection
//!   DIR/roots/NAME                    a node, as an `Entry` message
//! ```

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Write as _},
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    path::{Path, PathBuf},
    process,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use futures::executor::block_on;
use nix::fcntl::FlockArg;
use prost::Message as _;

use crate::{
    B3Digest, BlobService as _, LocalBlobService, NameError, Node, PathComponent, RedbDirectoryService, Store,
    blobservice::{Kind, decode_node, digest_of, encode_node, lock},
    directoryservice::Reachable,
    proto::Entry,
    views::Shared,
};

const ROOTS: &str = "roots";

/// Numbers the temporary files of one process.
static COUNT: AtomicU64 = AtomicU64::new(0);

/// Files whose names begin like this are not roots yet.
const HIDDEN: u8 = b'.';

/// A store with blobs in plain files and directories in a redb file.
#[derive(Debug)]
pub struct LocalStore {
    dir: PathBuf,
    blobs: LocalBlobService,
    directories: RedbDirectoryService,
}

/// Why a root can't be added or removed.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// The name is not valid.
    #[error("a root can't have this name")]
    Name(#[source] NameError),
    /// The name begins with a dot.
    #[error("the name \"{0}\" of a root begins with a dot")]
    Hidden(PathComponent),
    /// There is no root with this name.
    #[error("there is no root \"{0}\"")]
    Unknown(PathComponent),
    /// The node, or something below it, is missing.
    #[error("the {what} {digest} is not in the store")]
    Missing {
        /// "blob" or "directory".
        what: &'static str,
        /// Which one.
        digest: B3Digest,
    },
    /// The file system or the store failed.
    #[error("{}: can't {action}", path.display())]
    Store {
        /// Where.
        path: PathBuf,
        /// What was tried, as in "write the root".
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl LocalStore {
    /// Opens the store with these two addresses. `None` when they are not `file:///…` and `redb:///…`.
    ///
    /// # Errors
    ///
    /// The store can't be opened.
    pub fn from_addr(blobs: &str, directories: &str) -> io::Result<Option<Self>> {
        let (Some(dir), Some(file)) = (blobs.strip_prefix("file://"), directories.strip_prefix("redb://")) else {
            return Ok(None);
        };
        if !dir.starts_with('/') || !file.starts_with('/') {
            return Ok(None);
        }
        Self::open(Path::new(dir), Path::new(file)).map(Some)
    }

    /// Opens the store with its blobs in the directory `dir` and its directories in `file`.
    ///
    /// # Errors
    ///
    /// As [`LocalBlobService::open`] and [`RedbDirectoryService::open`].
    pub fn open(dir: &Path, file: &Path) -> io::Result<Self> {
        let (blobs, directories) = (LocalBlobService::open(dir)?, RedbDirectoryService::open(file)?);
        Ok(Self { dir: dir.to_owned(), blobs, directories })
    }

    /// The store for everyone else in this process. Both take turns within the process, and don't wait for locks of files.
    pub fn store(&self) -> Store {
        Store { blobs: Arc::new(self.blobs.clone()), directories: Arc::new(self.directories.clone()) }
    }

    /// The directory of the blobs.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn blobs(&self) -> &LocalBlobService {
        &self.blobs
    }

    pub(crate) fn directories(&self) -> &RedbDirectoryService {
        &self.directories
    }

    /// All committed blobs and their sizes.
    pub(crate) fn stored_blobs(&self) -> io::Result<Vec<(B3Digest, u64)>> {
        let mut blobs = Vec::new();
        for fan_out in LocalBlobService::fan_outs(&self.dir)? {
            for entry in fs::read_dir(fan_out)? {
                let entry = entry?;
                if let Some(digest) = digest_of(&entry.path()) {
                    blobs.push((digest, entry.metadata()?.len()));
                }
            }
        }
        Ok(blobs)
    }

    /// The directory of roots, which is created if it is missing.
    pub(crate) fn roots_dir(&self) -> io::Result<PathBuf> {
        let dir = self.dir.join(ROOTS);
        fs::create_dir_all(&dir)?;
        Ok(dir)
    }

    /// Removes the leftovers of killed processes. The directory of roots must be locked.
    pub(crate) fn sweep_roots(dir: &Path) -> io::Result<()> {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if entry.file_name().as_bytes().first() == Some(&HIDDEN) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// All named roots, sorted by name.
    ///
    /// # Errors
    ///
    /// Names the file that can't be read.
    pub fn roots(&self) -> io::Result<Vec<(PathComponent, Node)>> {
        let mut roots = Vec::new();
        let entries = match fs::read_dir(self.dir.join(ROOTS)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(roots),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let Ok(name) = PathComponent::try_from(entry.file_name().into_vec()) else { continue };
            if name.as_bytes().first() == Some(&HIDDEN) {
                continue;
            }
            let encoded = match fs::read(entry.path()) {
                // It was just removed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                encoded => encoded?,
            };
            roots.push((name, decode_node(Entry::decode(&*encoded), &entry.path())?));
        }
        roots.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(roots)
    }

    /// These nodes and everything below them, and the first directory that is missing, if one is.
    ///
    /// # Errors
    ///
    /// The directories can't be read.
    pub fn everything_below(&self, nodes: &[Node]) -> io::Result<(Shared, Option<B3Digest>)> {
        let mut reachable = Reachable::default();
        self.directories.reach(nodes, &mut reachable)?;
        let blobs = reachable.blobs.into_iter().map(|digest| (Kind::Blob, digest));
        let directories = reachable.directories.into_iter().map(|digest| (Kind::Directory, digest));
        Ok((blobs.chain(directories).collect(), reachable.missing.into_iter().min()))
    }

    /// Adds a root, durably: protects a node and everything below it from garbage collection. Replaces an earlier root with
    /// this name. Waits for a collection to end.
    ///
    /// # Errors
    ///
    /// The node is incomplete, or the root can't be written. Nothing has changed.
    pub fn add_root(&self, name: &str, node: &Node) -> Result<(), RootError> {
        let (_, path) = self.root_path(name)?;
        let failed = |action| {
            let path = path.clone();
            move |source| RootError::Store { path, action, source }
        };
        let dir = self.roots_dir().map_err(failed("create the directory of roots"))?;
        let _no_collection = lock(&dir, FlockArg::LockShared).map_err(failed("lock the directory of roots"))?;
        self.check_complete(node)?;
        let new = dir.join(format!(".{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        let write = || {
            let mut file = File::create(&new)?;
            file.write_all(&encode_node(node))?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(&dir)?.sync_all()
        };
        write().map_err(failed("write the root"))
    }

    /// Removes a root.
    ///
    /// # Errors
    ///
    /// There is no such root, or it can't be removed.
    pub fn remove_root(&self, name: &str) -> Result<(), RootError> {
        let (name, path) = self.root_path(name)?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(RootError::Unknown(name)),
            removed => removed.map_err(|source| RootError::Store { path, action: "remove the root", source }),
        }
    }

    fn root_path(&self, name: &str) -> Result<(PathComponent, PathBuf), RootError> {
        let name = PathComponent::try_from(name).map_err(RootError::Name)?;
        if name.as_bytes().first() == Some(&HIDDEN) {
            return Err(RootError::Hidden(name));
        }
        let path = self.dir.join(ROOTS).join(OsStr::from_bytes(name.as_bytes()));
        Ok((name, path))
    }

    fn check_complete(&self, node: &Node) -> Result<(), RootError> {
        let failed = |source| RootError::Store { path: self.dir.clone(), action: "read from it", source };
        let mut reachable = Reachable::default();
        self.directories.reach(std::slice::from_ref(node), &mut reachable).map_err(failed)?;
        if let Some(digest) = reachable.missing.iter().next() {
            return Err(RootError::Missing { what: "directory", digest: *digest });
        }
        for digest in &reachable.blobs {
            if !block_on(self.blobs.has(digest)).map_err(failed)? {
                return Err(RootError::Missing { what: "blob", digest: *digest });
            }
        }
        Ok(())
    }
}
