//! Near directories, and how the far service gets them after the blobs that they refer to.

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

use super::notes::{Notes, uploads};
use crate::{
    B3Digest, Directory, DirectoryService, Node, RedbDirectoryService,
    blobservice::{PENDING_BLOBS, PENDING_TREES, check_layout},
    directoryservice::put_tree,
};

pub(super) struct Trees {
    pub(super) near: RedbDirectoryService,
    pub(super) far: Arc<dyn DirectoryService>,
    path: PathBuf,
    max_bytes: u64,
    /// Roots that the far service lacks. Locked shared from the note until the tree is there.
    pub(super) notes: Notes,
    /// Blobs that the far blob service lacks.
    blobs: Notes,
    uploading: Mutex<()>,
}

impl Trees {
    pub(super) fn open(dir: &Path, max_bytes: u64, far: Arc<dyn DirectoryService>) -> io::Result<Self> {
        let (path, blobs) = (dir.join("directories.redb"), dir.join("blobs"));
        check_layout(&blobs)?;
        Ok(Self {
            near: RedbDirectoryService::open(&path)?,
            far,
            path,
            max_bytes,
            notes: Notes::open(blobs.join(PENDING_TREES))?,
            blobs: Notes::open(blobs.join(PENDING_BLOBS))?,
            uploading: Mutex::default(),
        })
    }

    /// Notes a tree that will be near before the result is dropped.
    pub(super) fn note(&self, root: &B3Digest) -> io::Result<Flock<File>> {
        let lock = self.notes.lock(FlockArg::LockShared)?;
        self.notes.add([root])?;
        Ok(lock)
    }

    /// Begins anew when there are too many.
    pub(super) fn keep_within_bound(&self) -> io::Result<()> {
        if !fs::metadata(&self.path).is_ok_and(|metadata| metadata.len() > self.max_bytes) {
            return Ok(());
        }
        // Whoever puts something does this next.
        let Ok(_alone) = self.notes.lock(FlockArg::LockExclusiveNonblock) else { return Ok(()) };
        if self.notes.list()?.is_empty() { fs::remove_file(&self.path) } else { Ok(()) }
    }

    /// Uploads for ever what is noted.
    pub(super) async fn run(self: Arc<Self>) -> io::Result<()> {
        let mut others = uploads();
        loop {
            let uploaded = self.flush().await;
            self.notes.wait_after(uploaded, &mut others).await;
        }
    }

    /// Uploads all that is noted.
    pub(super) async fn flush(&self) -> io::Result<()> {
        let _uploading = self.uploading.lock().await;
        for root in self.notes.list()? {
            let tree: Vec<_> = self.near.get_recursive(&root).try_collect().await?;
            if tree.is_empty() {
                // It is being put, or its putting was cut short.
                let _alone = self.notes.lock(FlockArg::LockExclusive)?;
                if self.near.get(&root).await?.is_none() {
                    self.notes.remove(&root)?;
                }
                continue;
            }
            self.check_blobs(&tree)?;
            let tree: HashMap<_, _> = tree.into_iter().map(|directory| (directory.digest(), directory)).collect();
            put_tree(&*self.far, &root, &tree).await?;
            self.notes.remove(&root)?;
        }
        self.keep_within_bound()
    }

    /// Whether the far service may have these: not as long as the far blob service lacks what they refer to.
    pub(super) fn check_blobs<'a>(&self, directories: impl IntoIterator<Item = &'a Directory>) -> io::Result<()> {
        let pending: HashSet<_> = self.blobs.list()?.into_iter().collect();
        let nodes = directories.into_iter().flat_map(Directory::nodes);
        for (_, node) in nodes {
            if let Node::File { digest, .. } = node
                && pending.contains(digest)
            {
                let message =
                    format!("the blob {digest} is not in the far store yet: try again when it has been written back");
                return Err(io::Error::new(io::ErrorKind::WouldBlock, message));
            }
        }
        Ok(())
    }
}
