use std::{
    collections::HashMap,
    fs::File,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::io::AsyncWrite;

use super::{View, grants::Object};
use crate::{
    B3Digest, BlobReader, BlobService, BlobWriter, Lease, Node, blobservice::Kind, proto::stat_blob_response::ChunkMeta,
};

/// Blobs as a tenant sees them.
pub(super) struct ViewBlobService {
    blobs: Arc<dyn BlobService>,
    view: Arc<View>,
    /// Blobs that were written through this service, and are not committed yet, with their sizes.
    written: Arc<Mutex<HashMap<B3Digest, u64>>>,
}

impl ViewBlobService {
    pub(super) fn new(blobs: Arc<dyn BlobService>, view: Arc<View>) -> Self {
        Self { blobs, view, written: Arc::default() }
    }

    fn shows(&self, digest: &B3Digest) -> io::Result<bool> {
        Ok(*digest == B3Digest::EMPTY
            || self.written.lock().contains_key(digest)
            || self.view.shows(Kind::Blob, digest)?)
    }
}

#[async_trait]
impl BlobService for ViewBlobService {
    async fn has(&self, digest: &B3Digest) -> io::Result<bool> {
        Ok(self.shows(digest)? && self.blobs.has(digest).await?)
    }

    async fn has_whole(&self, digest: &B3Digest, bytes: u64) -> io::Result<bool> {
        Ok(self.shows(digest)? && self.blobs.has_whole(digest, bytes).await?)
    }

    /// None: a tenant has no grants for chunks, so it reads the blob as a whole.
    async fn chunks(&self, digest: &B3Digest) -> io::Result<Option<Vec<ChunkMeta>>> {
        Ok(self.has(digest).await?.then(Vec::new))
    }

    async fn open_read(&self, digest: &B3Digest) -> io::Result<Option<Box<dyn BlobReader>>> {
        if self.shows(digest)? { self.blobs.open_read(digest).await } else { Ok(None) }
    }

    async fn open_write(&self) -> Box<dyn BlobWriter> {
        let writer = self.blobs.open_write_unseen().await;
        Box::new(ViewBlobWriter { writer, written: self.written.clone(), bytes: 0 })
    }

    async fn open_file(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        if self.shows(digest)? { self.blobs.open_file(digest).await } else { Ok(None) }
    }

    async fn open_file_if_ready(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        if self.shows(digest)? { self.blobs.open_file_if_ready(digest).await } else { Ok(None) }
    }

    fn is_remote(&self) -> bool {
        self.blobs.is_remote()
    }

    fn batch(&self) -> Arc<dyn BlobService> {
        Arc::new(Self::new(self.blobs.batch(), self.view.clone()))
    }

    fn lease(&self, nodes: &[Node]) -> io::Result<Lease> {
        self.blobs.lease(nodes)
    }

    async fn commit(&self) -> io::Result<()> {
        // They stay in `written` until they are granted: if this fails, the next commit tries again.
        let written = self.written.lock().clone();
        self.blobs.commit().await?;
        if written.is_empty() {
            return Ok(());
        }
        let granted = written.iter().map(|(digest, bytes)| Object { kind: Kind::Blob, digest: *digest, bytes: *bytes });
        self.view.grant(granted.collect(), false)?;
        self.written.lock().retain(|digest, _| !written.contains_key(digest));
        Ok(())
    }
}

struct ViewBlobWriter {
    writer: Box<dyn BlobWriter>,
    written: Arc<Mutex<HashMap<B3Digest, u64>>>,
    bytes: u64,
}

impl AsyncWrite for ViewBlobWriter {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut *self.writer).poll_write(context, bytes))?;
        self.bytes += written as u64;
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.writer).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.writer).poll_shutdown(context)
    }
}

#[async_trait]
impl BlobWriter for ViewBlobWriter {
    async fn close(&mut self) -> io::Result<B3Digest> {
        let digest = self.writer.close().await?;
        if digest != B3Digest::EMPTY {
            self.written.lock().insert(digest, self.bytes);
        }
        Ok(digest)
    }
}
