use std::{fs, io, mem, path::Path, sync::Arc};

use async_trait::async_trait;
use futures::stream::BoxStream;
use tokio::runtime::Handle;

use super::{
    super::{DirectoryPutter, DirectoryService, order::LeavesFirst, walk},
    database::SharedDatabase,
};
use crate::{B3Digest, Directory, DirectoryMemory};

/// Directories in a redb file, in the layout of snix: table `directory`, from digest to canonical encoding.
#[derive(Debug, Clone)]
pub struct RedbDirectoryService {
    pub(super) database: Arc<SharedDatabase>,
}

impl RedbDirectoryService {
    /// Opens the service of this file, which may be missing; its parent directory is created.
    ///
    /// # Errors
    ///
    /// The file is not a redb database, or its directory can't be created.
    pub fn open(path: &Path) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        Ok(Self { database: Arc::new(SharedDatabase::open(path)?) })
    }

    /// Runs an operation that may block: on a blocking thread if there is a tokio runtime. When the future is dropped, only
    /// this one operation goes on.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&SharedDatabase) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let Ok(runtime) = Handle::try_current() else { return work(&self.database) };
        let database = self.database.clone();
        runtime.spawn_blocking(move || work(&database)).await.map_err(io::Error::other)?
    }
}

#[async_trait]
impl DirectoryService for RedbDirectoryService {
    async fn get(&self, digest: &B3Digest) -> io::Result<Option<Directory>> {
        let digest = *digest;
        Ok(self.blocking(move |database| database.get_many(&[digest])).await?.pop().flatten())
    }

    async fn put(&self, directory: Directory) -> io::Result<B3Digest> {
        let encoded = directory.encode();
        let digest = B3Digest::of(&encoded);
        self.blocking(move |database| database.put_many(&digest, &[(digest, encoded)])).await?;
        Ok(digest)
    }

    fn get_recursive(&self, root: &B3Digest) -> BoxStream<'_, io::Result<Directory>> {
        self.get_recursive_within(root, &DirectoryMemory::unlimited())
    }

    fn get_recursive_within(&self, root: &B3Digest, memory: &DirectoryMemory) -> BoxStream<'_, io::Result<Directory>> {
        let memory = memory.clone();
        walk::breadth_first(root, move |digests| {
            let memory = memory.clone();
            self.blocking(move |database| database.get_many_within(&digests, &memory))
        })
    }

    async fn renew(&self, root: &B3Digest) -> io::Result<()> {
        let root = *root;
        self.blocking(move |database| database.renew(&root)).await
    }

    fn put_multiple_start(&self) -> Box<dyn DirectoryPutter + '_> {
        Box::new(RedbDirectoryPutter { service: self, order: LeavesFirst::default(), encoded: Vec::new() })
    }
}

/// Collects a tree, which one transaction adds in the end.
struct RedbDirectoryPutter<'a> {
    service: &'a RedbDirectoryService,
    order: LeavesFirst,
    encoded: Vec<(B3Digest, Vec<u8>)>,
}

#[async_trait]
impl DirectoryPutter for RedbDirectoryPutter<'_> {
    async fn put(&mut self, directory: Directory) -> io::Result<()> {
        let encoded = directory.encode();
        let digest = B3Digest::of(&encoded);
        if self.order.admit(digest, &directory)? {
            self.encoded.push((digest, encoded));
        }
        Ok(())
    }

    async fn close(&mut self) -> io::Result<B3Digest> {
        let root = self.order.close()?;
        let mut directories = mem::take(&mut self.encoded);
        // A B-tree fills best in the order of its keys.
        directories.sort_unstable_by_key(|(digest, _)| *digest);
        self.service.blocking(move |database| database.put_many(&root, &directories)).await?;
        Ok(root)
    }
}
