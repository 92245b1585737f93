use std::{collections::HashMap, io, sync::Arc};

use async_trait::async_trait;
use futures::{future, stream::BoxStream};
use parking_lot::Mutex;

use super::{DirectoryPutter, DirectoryService, order::LeavesFirst, walk};
use crate::{B3Digest, Directory};

/// Directories in memory, for as long as the value lives.
#[derive(Debug, Clone, Default)]
pub struct MemoryDirectoryService {
    directories: Arc<Mutex<HashMap<B3Digest, Directory>>>,
}

#[async_trait]
impl DirectoryService for MemoryDirectoryService {
    async fn get(&self, digest: &B3Digest) -> io::Result<Option<Directory>> {
        Ok(self.directories.lock().get(digest).cloned())
    }

    async fn put(&self, directory: Directory) -> io::Result<B3Digest> {
        let digest = directory.digest();
        self.directories.lock().insert(digest, directory);
        Ok(digest)
    }

    fn get_recursive(&self, root: &B3Digest) -> BoxStream<'_, io::Result<Directory>> {
        walk::breadth_first(root, |digests| {
            let directories = self.directories.lock();
            future::ready(Ok(digests.iter().map(|digest| directories.get(digest).cloned()).collect()))
        })
    }

    fn put_multiple_start(&self) -> Box<dyn DirectoryPutter + '_> {
        Box::new(MemoryDirectoryPutter { service: self, order: LeavesFirst::default() })
    }
}

struct MemoryDirectoryPutter<'a> {
    service: &'a MemoryDirectoryService,
    order: LeavesFirst,
}

#[async_trait]
impl DirectoryPutter for MemoryDirectoryPutter<'_> {
    async fn put(&mut self, directory: Directory) -> io::Result<()> {
        let digest = directory.digest();
        if self.order.admit(digest, &directory)? {
            self.service.directories.lock().insert(digest, directory);
        }
        Ok(())
    }

    async fn close(&mut self) -> io::Result<B3Digest> {
        self.order.close()
    }
}
