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
use crate::{B3Digest, Directory, DirectoryPutter, DirectoryService, directoryservice::put_tree, runtime::spawn};

/// Directories on this machine in front of a service that is far away.
///
/// Here are whole trees only, the ones that were put or got as such. When they take more than their bound, all go, unless
/// the far service is still to get some.
pub struct NearDirectoryService {
    trees: Arc<Trees>,
    policy: WritePolicy,
    /// Writes back as long as this is held; in a `Mutex` since nobody polls it.
    _uploads: Mutex<BoxFuture<'static, io::Result<()>>>,
}

impl NearDirectoryService {
    /// The near store in this directory, which is made when it is not there. Its file may have so many bytes.
    ///
    /// With [`WritePolicy::Back`] the far service gets a tree when the far blob service has all blobs that it refers to,
    /// if the near blobs are in the same directory.
    ///
    /// # Errors
    ///
    /// When it can't be made or is damaged.
    pub fn open(dir: &Path, max_bytes: u64, policy: WritePolicy, far: Arc<dyn DirectoryService>) -> io::Result<Self> {
        let trees = Arc::new(Trees::open(dir, max_bytes, far)?);
        // What another policy has left is written back in any case.
        let uploads = spawn(trees.clone().run()).boxed();
        Ok(Self { trees, policy, _uploads: Mutex::new(uploads) })
    }

    /// Waits until the far service has all that was put here.
    ///
    /// # Errors
    ///
    /// `WouldBlock` while the far blob service lacks a blob: [`NearBlobService::flush`](super::NearBlobService::flush) comes
    /// first. When it can't be written back.
    pub async fn flush(&self) -> io::Result<()> {
        let trees = self.trees.clone();
        spawn(async move { trees.flush().await }).await
    }

    /// A tree from the far store, which the near one has from now on.
    fn fetch(&self, root: B3Digest) -> BoxStream<'_, io::Result<Directory>> {
        let tree = HashMap::new();
        let directories =
            stream::try_unfold((self.trees.far.get_recursive(&root), tree), move |(mut far, mut tree)| async move {
                match far.try_next().await? {
                    Some(directory) => {
                        tree.insert(directory.digest(), directory.clone());
                        Ok(Some((directory, (far, tree))))
                    }
                    None if tree.is_empty() => Ok(None),
                    None => {
                        put_tree(&self.trees.near, &root, &tree).await?;
                        self.trees.keep_within_bound()?;
                        Ok(None)
                    }
                }
            });
        directories.boxed()
    }
}

/// A tree on its way out, from the near store as long as that has it.
struct Walk<'a> {
    from: BoxStream<'a, io::Result<Directory>>,
    is_far: bool,
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
impl DirectoryService for NearDirectoryService {
    async fn get(&self, digest: &B3Digest) -> io::Result<Option<Directory>> {
        match self.trees.near.get(digest).await {
            Ok(None) => self.trees.far.get(digest).await,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => self.trees.far.get(digest).await,
            found => found,
        }
    }

    async fn put(&self, directory: Directory) -> io::Result<B3Digest> {
        if self.policy == WritePolicy::Back {
            self.flush().await?;
            self.trees.check_blobs([&directory])?;
        }
        self.trees.far.put(directory).await
    }

    fn get_recursive(&self, root: &B3Digest) -> BoxStream<'_, io::Result<Directory>> {
        let root = *root;
        let walk = Walk { from: self.trees.near.get_recursive(&root), is_far: false, seen: HashSet::new() };
        let directories = stream::try_unfold(walk, move |mut walk| async move {
            let next = match walk.next().await {
                Ok(None) if !walk.is_far && walk.seen.is_empty() => None,
                // It has just gone, or is damaged.
                Err(error) if !walk.is_far && matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidData) => {
                    None
                }
                next => Some(next),
            };
            let next = match next {
                Some(next) => next,
                None => {
                    (walk.from, walk.is_far) = (self.fetch(root), true);
                    walk.next().await
                }
            };
            Ok(next?.map(|directory| (directory, walk)))
        });
        directories.boxed()
    }

    fn put_multiple_start(&self) -> Box<dyn DirectoryPutter + '_> {
        let far = match self.policy {
            WritePolicy::Through => Some(self.trees.far.put_multiple_start()),
            WritePolicy::Back => None,
        };
        Box::new(NearDirectoryPutter {
            trees: &self.trees,
            near: self.trees.near.put_multiple_start(),
            far,
            root: None,
        })
    }
}

struct NearDirectoryPutter<'a> {
    trees: &'a Trees,
    near: Box<dyn DirectoryPutter + 'a>,
    /// Gets it at once.
    far: Option<Box<dyn DirectoryPutter + 'a>>,
    /// The last directory that was put.
    root: Option<B3Digest>,
}

#[async_trait]
impl DirectoryPutter for NearDirectoryPutter<'_> {
    async fn put(&mut self, directory: Directory) -> io::Result<()> {
        match &mut self.far {
            Some(far) => far.put(directory.clone()).await?,
            None => self.root = Some(directory.digest()),
        }
        self.near.put(directory).await
    }

    async fn close(&mut self) -> io::Result<B3Digest> {
        let root = match (&mut self.far, &self.root) {
            (None, Some(root)) => {
                let _noted = self.trees.note(root)?;
                self.near.close().await?
            }
            (far, _) => {
                if let Some(far) = far {
                    far.close().await?;
                }
                self.near.close().await?
            }
        };
        self.trees.notes.wake();
        self.trees.keep_within_bound()?;
        Ok(root)
    }
}
