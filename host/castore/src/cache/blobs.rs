use std::{
    collections::HashSet,
    fs::File,
    io,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use async_trait::async_trait;
use futures::{FutureExt as _, future::BoxFuture};
use parking_lot::Mutex;
use tokio::io::AsyncWrite;

use super::{
    WritePolicy,
    download::Downloads,
    evict::Evictor,
    pending::Pending,
    upload::{WriteBack, upload_all},
};
use crate::{
    B3Digest, BlobReader, BlobService, BlobWriter, Lease, LocalBlobService, Node,
    blobservice::{LocalBlobReader, PENDING_BLOBS},
    runtime::spawn,
};

/// A cache of blobs, of limited size, in front of a remote service.
///
/// Blobs that a [`batch`](BlobService::batch) has used stay cached as long as the batch lives, even if they take more bytes
/// than allowed.
pub struct CacheBlobService {
    shared: Arc<Shared>,
    /// The committed blobs, and those that this service has staged.
    cache: Arc<dyn BlobService>,
    remote: Arc<dyn BlobService>,
    /// Blobs that were written and pinned, and are not committed yet.
    written: Arc<Mutex<HashSet<B3Digest>>>,
    /// Locked by a commit, so that no other one returns before the blobs that both rely on are uploaded.
    committing: tokio::sync::Mutex<()>,
    /// In a batch: the blobs that it has used and pinned.
    used: Option<Mutex<HashSet<B3Digest>>>,
}

struct Shared {
    downloads: Arc<Downloads>,
    remote: Arc<dyn BlobService>,
    policy: WritePolicy,
    write_back: Arc<WriteBack>,
    /// The task that writes back; it ends when this is dropped. The `Mutex` makes it `Sync`.
    _uploads: Mutex<BoxFuture<'static, io::Result<()>>>,
}

impl CacheBlobService {
    /// Opens the cache in this directory, and creates it if it is missing. Its blobs may take `max_bytes`.
    ///
    /// # Errors
    ///
    /// The directory can't be created, read or cleaned.
    pub fn open(dir: &Path, max_bytes: u64, policy: WritePolicy, remote: Arc<dyn BlobService>) -> io::Result<Self> {
        let local = Arc::new(LocalBlobService::open(&dir.join("blobs"))?);
        let pending = Arc::new(Pending::open(dir.join("blobs").join(PENDING_BLOBS))?);
        let cache: Arc<dyn BlobService> = local.evictable_batch();
        let write_back = Arc::new(WriteBack::new(pending.clone(), cache.clone(), remote.clone()));
        let evictor = Arc::new(Evictor::new(local, pending, max_bytes));
        // An earlier process with another policy may have left pending blobs.
        let uploads = spawn(write_back.clone().run()).boxed();
        let shared = Shared {
            downloads: Arc::new(Downloads::new(evictor, remote.clone())),
            remote: remote.clone(),
            policy,
            write_back,
            _uploads: Mutex::new(uploads),
        };
        Ok(Self {
            shared: Arc::new(shared),
            cache,
            remote,
            written: Arc::default(),
            committing: tokio::sync::Mutex::default(),
            used: None,
        })
    }

    /// Waits until the remote store has all blobs that are committed here.
    ///
    /// # Errors
    ///
    /// A blob can't be uploaded.
    pub async fn flush(&self) -> io::Result<()> {
        self.shared.write_back.clone().flush_on_threads().await
    }

    /// Sweeps, and waits for it.
    #[cfg(test)]
    pub(super) async fn sweep_now(&self) -> io::Result<()> {
        let downloads = self.shared.downloads.clone();
        tokio::task::spawn_blocking(move || downloads.sweep_blocking()).await.map_err(io::Error::other)?
    }

    fn evictor(&self) -> &Evictor {
        &self.shared.downloads.evictor
    }

    /// Keeps a blob as long as this batch lives.
    fn keep(&self, digest: &B3Digest) {
        if let Some(used) = &self.used
            && used.lock().insert(*digest)
        {
            self.evictor().pin(digest);
        }
    }

    async fn open_cached(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        // This service may have it staged.
        match self.evictor().opened(digest, self.cache.open_file(digest).await)? {
            None => self.shared.downloads.open_cached(digest).await,
            found => Ok(found),
        }
    }

    async fn write_through(&self, written: &HashSet<B3Digest>) -> io::Result<()> {
        // Blobs that were found in the cache may still be pending.
        self.flush().await?;
        upload_all(&self.cache, &self.remote, written.iter().copied()).await?;
        self.remote.commit().await?;
        self.cache.commit().await
    }

    async fn write_back(&self, written: &HashSet<B3Digest>) -> io::Result<()> {
        if !written.is_empty() {
            self.shared.write_back.pending.add(written)?;
        }
        self.cache.commit().await?;
        self.shared.write_back.pending.wake();
        Ok(())
    }

    /// Bytes that these blobs take in the cache.
    async fn count_bytes(&self, digests: &HashSet<B3Digest>) -> io::Result<u64> {
        let mut bytes = 0;
        for digest in digests {
            if let Some(file) = self.cache.open_file(digest).await? {
                bytes += file.metadata()?.len();
            }
        }
        Ok(bytes)
    }
}

#[async_trait]
impl BlobService for CacheBlobService {
    async fn has(&self, digest: &B3Digest) -> io::Result<bool> {
        Ok(self.cache.has(digest).await?
            || self.shared.downloads.downloaded.has(digest).await?
            || self.remote.has(digest).await?)
    }

    async fn open_read(&self, digest: &B3Digest) -> io::Result<Option<Box<dyn BlobReader>>> {
        Ok(self.open_file(digest).await?.map(|file| Box::new(LocalBlobReader::new(file)) as _))
    }

    async fn open_write(&self) -> Box<dyn BlobWriter> {
        Box::new(CacheBlobWriter {
            writer: self.cache.open_write().await,
            shared: self.shared.clone(),
            written: self.written.clone(),
        })
    }

    async fn open_file(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        self.keep(digest);
        match self.open_cached(digest).await? {
            None => self.shared.downloads.open(digest).await,
            found => Ok(found),
        }
    }

    async fn open_file_if_ready(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        let found = match self.evictor().opened(digest, self.cache.open_file_if_ready(digest).await)? {
            None => self.shared.downloads.open_if_ready(digest).await?,
            found => found,
        };
        match found {
            Some(_) => self.keep(digest),
            None => self.shared.downloads.begin(digest),
        }
        Ok(found)
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn lease(&self, nodes: &[Node]) -> io::Result<Lease> {
        Ok(self.evictor().local.lease(nodes)?.and(self.remote.lease(nodes)?))
    }

    fn batch(&self) -> Arc<dyn BlobService> {
        Arc::new(Self {
            shared: self.shared.clone(),
            cache: self.shared.downloads.evictor.local.evictable_batch(),
            remote: self.shared.remote.batch(),
            written: Arc::default(),
            committing: tokio::sync::Mutex::default(),
            used: Some(Mutex::default()),
        })
    }

    async fn commit(&self) -> io::Result<()> {
        let _committing = self.committing.lock().await;
        // They stay in `written` until they are committed: if this commit fails or is dropped, the next one tries again.
        let written = self.written.lock().clone();
        let bytes = self.count_bytes(&written).await?;
        match self.shared.policy {
            WritePolicy::Through => self.write_through(&written).await?,
            WritePolicy::Back => self.write_back(&written).await?,
        }
        for digest in &written {
            self.written.lock().remove(digest);
            self.evictor().unpin(digest);
        }
        if self.evictor().add_bytes(bytes) {
            self.shared.downloads.sweep();
        }
        Ok(())
    }
}

impl Drop for CacheBlobService {
    fn drop(&mut self) {
        let used = self.used.take().map(Mutex::into_inner);
        used.into_iter().flatten().for_each(|digest| self.evictor().unpin(&digest));
        // A writer may still be open; the blob that it adds later stays pinned as long as the store is open.
        std::mem::take(&mut *self.written.lock()).iter().for_each(|digest| self.evictor().unpin(digest));
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Keeps what was downloaded if possible; otherwise it is downloaded again.
        let _ = futures::executor::block_on(self.downloads.downloaded.commit());
    }
}

struct CacheBlobWriter {
    writer: Box<dyn BlobWriter>,
    shared: Arc<Shared>,
    written: Arc<Mutex<HashSet<B3Digest>>>,
}

impl AsyncWrite for CacheBlobWriter {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.writer).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.writer).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.writer).poll_shutdown(context)
    }
}

#[async_trait]
impl BlobWriter for CacheBlobWriter {
    async fn close(&mut self) -> io::Result<B3Digest> {
        let evictor = &self.shared.downloads.evictor;
        // The blob may be cached already, and must not be evicted before it is pinned.
        let _staying = evictor.removing.read().await;
        let digest = self.writer.close().await?;
        if digest != B3Digest::EMPTY && self.written.lock().insert(digest) {
            evictor.pin(&digest);
        }
        Ok(digest)
    }
}
