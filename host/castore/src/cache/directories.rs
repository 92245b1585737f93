use std::{
    collections::{HashMap, HashSet},
    io::{self, ErrorKind},
    path::Path,
    sync::Arc,
};

use async_trait::async_trait;
use futures::{
    FutureExt as _, StreamExt as _, TryStreamExt as _,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use parking_lot::Mutex;

use super::{WritePolicy, trees::Trees};
use crate::{
    B3Digest, Directory, DirectoryMemory, DirectoryPutter, DirectoryService, directoryservice::put_tree, runtime::spawn,
};

/// A cache of directories in front of a remote service.
///
/// It holds whole trees only: those that were put or got as a whole. When they take too many bytes, all of them are
/// removed, unless some are still to be uploaded.
pub struct CacheDirectoryService {
    trees: Arc<Trees>,
    policy: WritePolicy,
    /// The task that writes back; it ends when this is dropped. The `Mutex` makes it `Sync`.
    _uploads: Mutex<BoxFuture<'static, io::Result<()>>>,
}

impl CacheDirectoryService {
    /// Opens the cache in this directory, and creates it if it is missing. Its file may take `max_bytes`.
    ///
    /// With [`WritePolicy::Back`], and with the blob cache in the same directory, a tree is uploaded once the remote store
    /// has all blobs that the tree refers to.
    ///
    /// # Errors
    ///
    /// The cache can't be created or is damaged.
    pub fn open(
        dir: &Path,
        max_bytes: u64,
        policy: WritePolicy,
        remote: Arc<dyn DirectoryService>,
    ) -> io::Result<Self> {
        let trees = Arc::new(Trees::open(dir, max_bytes, remote)?);
        // An earlier process with another policy may have left pending trees.
        let uploads = spawn(trees.clone().run()).boxed();
        Ok(Self { trees, policy, _uploads: Mutex::new(uploads) })
    }

    /// Waits until the remote service has all trees that were put here.
    ///
    /// # Errors
    ///
    /// A tree can't be uploaded. `WouldBlock` while the remote blob service lacks a blob:
    /// [`CacheBlobService::flush`](super::CacheBlobService::flush) comes first.
    pub async fn flush(&self) -> io::Result<()> {
        let trees = self.trees.clone();
        spawn(async move { trees.flush().await }).await
    }

    /// A tree from the remote store, which is cached on the way.
    fn fetch(&self, root: B3Digest, memory: &DirectoryMemory) -> BoxStream<'_, io::Result<Directory>> {
        let tree = HashMap::new();
        let directories = stream::try_unfold(
            (self.trees.remote.get_recursive_within(&root, memory), tree),
            move |(mut remote, mut tree)| async move {
                match remote.try_next().await? {
                    Some(directory) => {
                        tree.insert(directory.digest(), directory.clone());
                        Ok(Some((directory, (remote, tree))))
                    }
                    None if tree.is_empty() => Ok(None),
                    None => {
                        put_tree(&self.trees.cache, &root, &tree).await?;
                        self.trees.limit_size()?;
                        Ok(None)
                    }
                }
            },
        );
        directories.boxed()
    }
}

/// Yields a tree, from the cache if it has it.
struct Walk<'a> {
    from: BoxStream<'a, io::Result<Directory>>,
    is_remote: bool,
    seen: HashSet<B3Digest>,
}

impl Walk<'_> {
    async fn next(&mut self) -> io::Result<Option<Directory>> {
        while let Some(directory) = self.from.try_next().await? {
            if self.seen.insert(directory.digest()) {
                return Ok(Some(directory));
            }
        }
        Ok(None)
    }
}

#[async_trait]
impl DirectoryService for CacheDirectoryService {
    async fn get(&self, digest: &B3Digest) -> io::Result<Option<Directory>> {
        match self.trees.cache.get(digest).await {
            Ok(None) => self.trees.remote.get(digest).await,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => self.trees.remote.get(digest).await,
            found => found,
        }
    }

    async fn put(&self, directory: Directory) -> io::Result<B3Digest> {
        if self.policy == WritePolicy::Back {
            self.flush().await?;
            self.trees.check_blobs([&directory])?;
        }
        self.trees.remote.put(directory).await
    }

    fn get_recursive(&self, root: &B3Digest) -> BoxStream<'_, io::Result<Directory>> {
        self.get_recursive_within(root, &DirectoryMemory::unlimited())
    }

    fn get_recursive_within(&self, root: &B3Digest, memory: &DirectoryMemory) -> BoxStream<'_, io::Result<Directory>> {
        let (root, memory) = (*root, memory.clone());
        let cached = self.trees.cache.get_recursive_within(&root, &memory);
        let walk = Walk { from: cached, is_remote: false, seen: HashSet::new() };
        let directories = stream::try_unfold(walk, move |mut walk| {
            let memory = memory.clone();
            async move {
                let next = match walk.next().await {
                    Ok(None) if !walk.is_remote && walk.seen.is_empty() => None,
                    // It was just removed, or is damaged.
                    Err(error)
                        if !walk.is_remote && matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidData) =>
                    {
                        None
                    }
                    next => Some(next),
                };
                let next = match next {
                    Some(next) => next,
                    None => {
                        (walk.from, walk.is_remote) = (self.fetch(root, &memory), true);
                        walk.next().await
                    }
                };
                Ok(next?.map(|directory| (directory, walk)))
            }
        });
        directories.boxed()
    }

    fn put_multiple_start(&self) -> Box<dyn DirectoryPutter + '_> {
        let remote = match self.policy {
            WritePolicy::Through => Some(self.trees.remote.put_multiple_start()),
            WritePolicy::Back => None,
        };
        Box::new(CacheDirectoryPutter {
            trees: &self.trees,
            cache: self.trees.cache.put_multiple_start(),
            remote,
            root: None,
        })
    }
}

struct CacheDirectoryPutter<'a> {
    trees: &'a Trees,
    cache: Box<dyn DirectoryPutter + 'a>,
    /// With [`WritePolicy::Through`].
    remote: Option<Box<dyn DirectoryPutter + 'a>>,
    /// With [`WritePolicy::Back`]: the last directory that was put.
    root: Option<B3Digest>,
}

#[async_trait]
impl DirectoryPutter for CacheDirectoryPutter<'_> {
    async fn put(&mut self, directory: Directory) -> io::Result<()> {
        match &mut self.remote {
            Some(remote) => remote.put(directory.clone()).await?,
            None => self.root = Some(directory.digest()),
        }
        self.cache.put(directory).await
    }

    async fn close(&mut self) -> io::Result<B3Digest> {
        let root = match (&mut self.remote, &self.root) {
            (None, Some(root)) => {
                let _pending = self.trees.add_pending(root)?;
                self.cache.close().await?
            }
            (remote, _) => {
                if let Some(remote) = remote {
                    remote.close().await?;
                }
                self.cache.close().await?
            }
        };
        self.trees.pending.wake();
        self.trees.limit_size()?;
        Ok(root)
    }
}
