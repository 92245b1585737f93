//! Address directories, and how the remote service gets them after the blobs that they refer to.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use futures::TryStreamExt as _;
use nix::fcntl::{Flock, FlockArg};
use tokio::sync::Mutex;

use super::pending::{Pending, watch_uploads};
use crate::{
    B3Digest, Directory, DirectoryService, Node, RedbDirectoryService,
    blobservice::{PENDING_BLOBS, PENDING_TREES, check_layout},
    directoryservice::put_tree,
};

pub(super) struct Trees {
    pub(super) cache: RedbDirectoryService,
    pub(super) remote: Arc<dyn DirectoryService>,
    path: PathBuf,
    max_bytes: u64,
    /// Roots that the remote service lacks. Locked shared from adding a root until its tree is cached.
    pub(super) pending: Pending,
    /// Blobs that the remote blob service lacks.
    pending_blobs: Pending,
    uploading: Mutex<()>,
}

impl Trees {
    pub(super) fn open(dir: &Path, max_bytes: u64, remote: Arc<dyn DirectoryService>) -> io::Result<Self> {
        let (path, blobs) = (dir.join("directories.redb"), dir.join("blobs"));
        check_layout(&blobs)?;
        Ok(Self {
            cache: RedbDirectoryService::open(&path)?,
            remote,
            path,
            max_bytes,
            pending: Pending::open(blobs.join(PENDING_TREES))?,
            pending_blobs: Pending::open(blobs.join(PENDING_BLOBS))?,
            uploading: Mutex::default(),
        })
    }

    /// Adds a root to the pending ones. Its tree has to be cached before the result is dropped.
    pub(super) fn add_pending(&self, root: &B3Digest) -> io::Result<Flock<File>> {
        let lock = self.pending.lock(FlockArg::LockShared)?;
        self.pending.add([root])?;
        Ok(lock)
    }

    /// Removes all directories when they take too many bytes.
    pub(super) fn limit_size(&self) -> io::Result<()> {
        if !fs::metadata(&self.path).is_ok_and(|metadata| metadata.len() > self.max_bytes) {
            return Ok(());
        }
        // Somebody puts a tree, and will do this afterwards.
        let Ok(_alone) = self.pending.lock(FlockArg::LockExclusiveNonblock) else { return Ok(()) };
        if self.pending.list()?.is_empty() { fs::remove_file(&self.path) } else { Ok(()) }
    }

    /// Uploads pending trees for ever.
    pub(super) async fn run(self: Arc<Self>) -> io::Result<()> {
        let mut uploads = watch_uploads();
        loop {
            let uploaded = self.flush().await;
            self.pending.wait_after(uploaded, &mut uploads).await;
        }
    }

    /// Uploads all pending trees.
    pub(super) async fn flush(&self) -> io::Result<()> {
        let _uploading = self.uploading.lock().await;
        for root in self.pending.list()? {
            let tree: Vec<_> = self.cache.get_recursive(&root).try_collect().await?;
            if tree.is_empty() {
                // It is being put, or was never put to the end.
                let _alone = self.pending.lock(FlockArg::LockExclusive)?;
                if self.cache.get(&root).await?.is_none() {
                    self.pending.remove(&root)?;
                }
                continue;
            }
            self.check_blobs(&tree)?;
            let tree: HashMap<_, _> = tree.into_iter().map(|directory| (directory.digest(), directory)).collect();
            put_tree(&*self.remote, &root, &tree).await?;
            self.pending.remove(&root)?;
        }
        self.limit_size()
    }

    /// `WouldBlock` while the remote blob service lacks a blob that these directories refer to.
    pub(super) fn check_blobs<'a>(&self, directories: impl IntoIterator<Item = &'a Directory>) -> io::Result<()> {
        let pending: HashSet<_> = self.pending_blobs.list()?.into_iter().collect();
        let nodes = directories.into_iter().flat_map(Directory::nodes);
        for (_, node) in nodes {
            if let Node::File { digest, .. } = node
                && pending.contains(digest)
            {
                let message = format!(
                    "the remote store does not have the blob {digest} yet: try again when it has been written back"
                );
                return Err(io::Error::new(io::ErrorKind::WouldBlock, message));
            }
        }
        Ok(())
    }
}
