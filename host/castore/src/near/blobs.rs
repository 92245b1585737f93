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
    notes::Notes,
    room::Room,
    upload::{Pending, upload_all},
};
use crate::{
    B3Digest, BlobReader, BlobService, BlobWriter, Lease, LocalBlobService, Node,
    blobservice::{PENDING_BLOBS, local_io::LocalBlobReader},
    runtime::spawn,
};

/// Blobs on this machine, at most so many bytes of them, in front of a service that is far away.
///
/// What a [`batch`](BlobService::batch) has used stays near as long as the batch lives. While that is more than the
/// bound, the bound is exceeded.
pub struct NearBlobService {
    shared: Arc<Shared>,
    /// This service's own staging, and what is committed.
    near: Arc<dyn BlobService>,
    far: Arc<dyn BlobService>,
    /// Closed, pinned, and not yet committed.
    written: Arc<Mutex<HashSet<B3Digest>>>,
    /// Held by a commit, so that none returns while another one is still bringing what it counts on.
    committing: tokio::sync::Mutex<()>,
    /// What a batch keeps; `None` when this is none.
    used: Option<Mutex<HashSet<B3Digest>>>,
}

struct Shared {
    downloads: Arc<Downloads>,
    far: Arc<dyn BlobService>,
    policy: WritePolicy,
    /// What is to be written back.
    pending: Arc<Pending>,
    /// Writes it back as long as this is held; in a `Mutex` since nobody polls it.
    _uploads: Mutex<BoxFuture<'static, io::Result<()>>>,
}

impl NearBlobService {
    /// The near store in this directory, which is made when it is not there, with at most so many bytes.
    ///
    /// # Errors
    ///
    /// When the directory can't be made, read or swept.
    pub fn open(dir: &Path, max_bytes: u64, policy: WritePolicy, far: Arc<dyn BlobService>) -> io::Result<Self> {
        let local = Arc::new(LocalBlobService::open(&dir.join("blobs"))?);
        let notes = Arc::new(Notes::open(dir.join("blobs").join(PENDING_BLOBS))?);
        let near: Arc<dyn BlobService> = local.apart();
        let pending = Arc::new(Pending::new(notes.clone(), near.clone(), far.clone()));
        let room = Arc::new(Room::new(local, notes, max_bytes));
        // What another policy has left is written back in any case.
        let uploads = spawn(pending.clone().run()).boxed();
        let shared = Shared {
            downloads: Arc::new(Downloads::new(room, far.clone())),
            far: far.clone(),
            policy,
            pending,
            _uploads: Mutex::new(uploads),
        };
        Ok(Self {
            shared: Arc::new(shared),
            near,
            far,
            written: Arc::default(),
            committing: tokio::sync::Mutex::default(),
            used: None,
        })
    }

    /// Waits until the far store has all that is committed here.
    ///
    /// # Errors
    ///
    /// When it can't be written back.
    pub async fn flush(&self) -> io::Result<()> {
        self.shared.pending.clone().flush_on_threads().await
    }

    /// Waits for a sweep.
    #[cfg(test)]
    pub(super) async fn sweep_now(&self) -> io::Result<()> {
        let downloads = self.shared.downloads.clone();
        tokio::task::spawn_blocking(move || downloads.sweep_in_place()).await.map_err(io::Error::other)?
    }

    fn room(&self) -> &Room {
        &self.shared.downloads.room
    }

    /// Keeps a blob as long as this batch lives.
    fn keep(&self, digest: &B3Digest) {
        if let Some(used) = &self.used
            && used.lock().insert(*digest)
        {
            self.room().pin(digest);
        }
    }

    async fn open_near(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        // Staged here, or committed.
        match self.room().opened(digest, self.near.open_file(digest).await)? {
            None => self.shared.downloads.open_near(digest).await,
            found => Ok(found),
        }
    }

    async fn write_through(&self, written: &HashSet<B3Digest>) -> io::Result<()> {
        // What was found here may have been left by another policy.
        self.flush().await?;
        upload_all(&self.near, &self.far, written.iter().copied()).await?;
        self.far.commit().await?;
        self.near.commit().await
    }

    async fn write_back(&self, written: &HashSet<B3Digest>) -> io::Result<()> {
        if !written.is_empty() {
            self.shared.pending.notes.add(written)?;
        }
        self.near.commit().await?;
        self.shared.pending.notes.wake();
        Ok(())
    }

    /// Bytes that these blobs take here.
    async fn count_bytes(&self, digests: &HashSet<B3Digest>) -> io::Result<u64> {
        let mut bytes = 0;
        for digest in digests {
            if let Some(file) = self.near.open_file(digest).await? {
                bytes += file.metadata()?.len();
            }
        }
        Ok(bytes)
    }
}

#[async_trait]
impl BlobService for NearBlobService {
    async fn has(&self, digest: &B3Digest) -> io::Result<bool> {
        Ok(self.near.has(digest).await?
            || self.shared.downloads.fills.has(digest).await?
            || self.far.has(digest).await?)
    }

    async fn open_read(&self, digest: &B3Digest) -> io::Result<Option<Box<dyn BlobReader>>> {
        Ok(self.open_file(digest).await?.map(|file| Box::new(LocalBlobReader::new(file)) as _))
    }

    async fn open_write(&self) -> Box<dyn BlobWriter> {
        Box::new(NearBlobWriter {
            writer: self.near.open_write().await,
            shared: self.shared.clone(),
            written: self.written.clone(),
        })
    }

    async fn open_file(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        self.keep(digest);
        match self.open_near(digest).await? {
            None => self.shared.downloads.open(digest).await,
            found => Ok(found),
        }
    }

    async fn open_file_at_hand(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        let found = match self.room().opened(digest, self.near.open_file_at_hand(digest).await)? {
            None => self.shared.downloads.open_at_hand(digest).await?,
            found => found,
        };
        match found {
            Some(_) => self.keep(digest),
            None => self.shared.downloads.begin(digest),
        }
        Ok(found)
    }

    fn is_far(&self) -> bool {
        true
    }

    fn lease(&self, nodes: &[Node]) -> io::Result<Lease> {
        Ok(self.room().local.lease(nodes)?.and(self.far.lease(nodes)?))
    }

    fn batch(&self) -> Arc<dyn BlobService> {
        Arc::new(Self {
            shared: self.shared.clone(),
            near: self.shared.downloads.room.local.apart(),
            far: self.shared.far.batch(),
            written: Arc::default(),
            committing: tokio::sync::Mutex::default(),
            used: Some(Mutex::default()),
        })
    }

    async fn commit(&self) -> io::Result<()> {
        let _committing = self.committing.lock().await;
        // They stay there until they are committed, so that the next commit tries again where this one fails or is dropped.
        let written = self.written.lock().clone();
        let bytes = self.count_bytes(&written).await?;
        match self.shared.policy {
            WritePolicy::Through => self.write_through(&written).await?,
            WritePolicy::Back => self.write_back(&written).await?,
        }
        for digest in &written {
            self.written.lock().remove(digest);
            self.room().unpin(digest);
        }
        if self.room().grow(bytes) {
            self.shared.downloads.sweep();
        }
        Ok(())
    }
}

impl Drop for NearBlobService {
    fn drop(&mut self) {
        let used = self.used.take().map(Mutex::into_inner);
        used.into_iter().flatten().for_each(|digest| self.room().unpin(&digest));
        // A writer may still be open; what it adds then stays pinned as long as the store is open.
        std::mem::take(&mut *self.written.lock()).iter().for_each(|digest| self.room().unpin(digest));
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // What was downloaded is worth keeping, but no more than that.
        let _ = futures::executor::block_on(self.downloads.fills.commit());
    }
}

struct NearBlobWriter {
    writer: Box<dyn BlobWriter>,
    shared: Arc<Shared>,
    written: Arc<Mutex<HashSet<B3Digest>>>,
}

impl AsyncWrite for NearBlobWriter {
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
impl BlobWriter for NearBlobWriter {
    async fn close(&mut self) -> io::Result<B3Digest> {
        let room = &self.shared.downloads.room;
        // The blob may be here already, and must not go before it is pinned.
        let _staying = room.removing.read().await;
        let digest = self.writer.close().await?;
        if digest != B3Digest::EMPTY && self.written.lock().insert(digest) {
            room.pin(&digest);
        }
        Ok(digest)
    }
}
