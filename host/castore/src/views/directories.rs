use std::{io, mem, sync::Arc};

use async_trait::async_trait;
use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};

use super::{View, grants::Object};
use crate::{B3Digest, Directory, DirectoryMemory, DirectoryPutter, DirectoryService, blobservice::Kind};

/// Directories as a tenant sees them.
pub(super) struct ViewDirectoryService {
    pub(super) directories: Arc<dyn DirectoryService>,
    pub(super) view: Arc<View>,
}

impl ViewDirectoryService {
    fn shows(&self, digest: &B3Digest) -> io::Result<bool> {
        self.view.shows(Kind::Directory, digest)
    }

    /// The first directory in this one that the tenant doesn't see.
    fn hidden_in(&self, directory: &Directory) -> io::Result<Option<B3Digest>> {
        for (child, _) in directory.children() {
            if !self.shows(&child)? {
                return Ok(Some(child));
            }
        }
        Ok(None)
    }

    /// The directories below a root that the tenant sees, up to the first one that has one that it doesn't see.
    fn seen<'a>(
        &'a self,
        root: B3Digest,
        directories: impl FnOnce() -> BoxStream<'a, io::Result<Directory>>,
    ) -> BoxStream<'a, io::Result<Directory>> {
        match self.shows(&root) {
            Ok(true) => {}
            Ok(false) => return stream::empty().boxed(),
            Err(error) => return stream::once(async { Err(error) }).boxed(),
        }
        stream::unfold(Some((directories(), None)), move |state| async move {
            let (mut below, hidden) = state?;
            if let Some(hidden) = hidden {
                return Some((Err(missing(&hidden, &root)), None));
            }
            let checked = below.next().await?.and_then(|directory| Ok((self.hidden_in(&directory)?, directory)));
            Some(match checked {
                Ok((hidden, directory)) => (Ok(directory), Some((below, hidden))),
                Err(error) => (Err(error), None),
            })
        })
        .boxed()
    }
}

fn missing(digest: &B3Digest, root: &B3Digest) -> io::Error {
    let message = format!("the directory {digest}, which is below {root}, is not in the store");
    io::Error::new(io::ErrorKind::NotFound, message)
}

#[async_trait]
impl DirectoryService for ViewDirectoryService {
    async fn get(&self, digest: &B3Digest) -> io::Result<Option<Directory>> {
        if self.shows(digest)? { self.directories.get(digest).await } else { Ok(None) }
    }

    async fn put(&self, directory: Directory) -> io::Result<B3Digest> {
        let granted = Object::directory(&directory.encode());
        let digest = self.directories.put(directory).await?;
        self.view.grant(vec![granted], true)?;
        Ok(digest)
    }

    fn get_recursive(&self, root: &B3Digest) -> BoxStream<'_, io::Result<Directory>> {
        let root = *root;
        self.seen(root, move || self.directories.get_recursive(&root))
    }

    fn get_recursive_within(&self, root: &B3Digest, memory: &DirectoryMemory) -> BoxStream<'_, io::Result<Directory>> {
        let (root, memory) = (*root, memory.clone());
        self.seen(root, move || self.directories.get_recursive_within(&root, &memory))
    }

    async fn renew(&self, root: &B3Digest) -> io::Result<()> {
        if self.shows(root)? { self.directories.renew(root).await } else { Ok(()) }
    }

    fn put_multiple_start(&self) -> Box<dyn DirectoryPutter + '_> {
        let putter = self.directories.put_multiple_start();
        Box::new(ViewDirectoryPutter { putter, view: &self.view, put: Vec::new() })
    }
}

struct ViewDirectoryPutter<'a> {
    putter: Box<dyn DirectoryPutter + 'a>,
    view: &'a View,
    put: Vec<Object>,
}

#[async_trait]
impl DirectoryPutter for ViewDirectoryPutter<'_> {
    async fn put(&mut self, directory: Directory) -> io::Result<()> {
        let granted = Object::directory(&directory.encode());
        self.putter.put(directory).await?;
        self.put.push(granted);
        Ok(())
    }

    async fn close(&mut self) -> io::Result<B3Digest> {
        let root = self.putter.close().await?;
        // With this, the blobs that were granted before are durable, too.
        self.view.grant(mem::take(&mut self.put), true)?;
        Ok(root)
    }
}
