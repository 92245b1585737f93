//! Downloads remote blobs: each once, and only the chunks that no cached blob has.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::{fd::AsRawFd as _, unix::fs::FileExt as _},
    sync::Arc,
};

use bytes::Bytes;
use futures::{
    FutureExt as _, StreamExt as _,
    future::{BoxFuture, Shared, WeakShared},
    stream,
};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::Semaphore,
};

use super::evict::Evictor;
use crate::{
    B3Digest, BlobService, BlobWriter,
    proto::stat_blob_response::ChunkMeta,
    runtime::{spawn, spawn_blocking},
};

/// Blobs that are downloaded at a time.
const CONCURRENT_DOWNLOADS: usize = 32;

/// Chunks of one blob that are downloaded at a time.
const CONCURRENT_CHUNKS: usize = 8;

/// Largest chunk that is held in memory. A blob with a larger one is downloaded as a whole.
const MAX_CHUNK_BYTES: u64 = 16 * 1024 * 1024;

/// Largest blob that is downloaded, so that an endless one does not fill the disk.
const MAX_BLOB_BYTES: u64 = 64 * 1024 * 1024 * 1024;

/// Chunks whose place is remembered: enough for 64 GiB at snix's usual average size.
const MAX_KNOWN_CHUNKS: usize = 256 * 1024;

const COPY_BYTES: usize = 256 * 1024;

/// What everyone who waits for a download gets.
type Outcome = Result<Option<Arc<File>>, (io::ErrorKind, String)>;

pub(super) struct Downloads {
    pub(super) evictor: Arc<Evictor>,
    /// Has the downloaded blobs staged until the next sweep commits them.
    pub(super) downloaded: Arc<dyn BlobService>,
    remote: Arc<dyn BlobService>,
    running: Mutex<HashMap<B3Digest, WeakShared<BoxFuture<'static, Outcome>>>>,
    permits: Semaphore,
    /// Where to find each chunk: a cached blob, and the position in it.
    known_chunks: Mutex<HashMap<B3Digest, (B3Digest, u64)>>,
}

impl Downloads {
    pub(super) fn new(evictor: Arc<Evictor>, remote: Arc<dyn BlobService>) -> Self {
        Self {
            downloaded: evictor.local.evictable_batch(),
            evictor,
            remote,
            running: Mutex::default(),
            permits: Semaphore::new(CONCURRENT_DOWNLOADS),
            known_chunks: Mutex::default(),
        }
    }

    /// The cached blob, committed or just downloaded.
    pub(super) async fn open_cached(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        match self.evictor.opened(digest, self.downloaded.open_file(digest).await)? {
            None => self.evictor.opened(digest, self.evictor.local.open_file(digest).await),
            found => Ok(found),
        }
    }

    /// The same, but `None` for a large blob that has not been checked yet.
    pub(super) async fn open_if_ready(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        self.evictor.opened(digest, self.downloaded.open_file_if_ready(digest).await)
    }

    /// Waits for the blob's download, which everyone who asks for it shares.
    pub(super) async fn open(self: &Arc<Self>, digest: &B3Digest) -> io::Result<Option<File>> {
        match self.join(digest).await {
            Ok(None) => Ok(None),
            // Opened anew, so that each caller gets an offset of its own.
            Ok(Some(file)) => {
                let file = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
                self.evictor.local.mark_used(digest, &file);
                Ok(Some(file))
            }
            Err((kind, message)) => Err(io::Error::new(kind, message)),
        }
    }

    /// Starts the download of a blob that no reader waits for yet, unless many downloads run.
    pub(super) fn begin(self: &Arc<Self>, digest: &B3Digest) {
        if self.permits.available_permits() > CONCURRENT_DOWNLOADS / 2 {
            let download = self.join(digest);
            // A failure means that there are no threads; then it is not begun.
            let _ = crate::runtime::detach(async move {
                let _ = download.await;
            });
        }
    }

    /// The download of this blob. It is cancelled when no reader waits for it.
    fn join(self: &Arc<Self>, digest: &B3Digest) -> Shared<BoxFuture<'static, Outcome>> {
        let mut running = self.running.lock();
        if let Some(download) = running.get(digest).and_then(WeakShared::upgrade) {
            return download;
        }
        // Forgets downloads that were given up.
        running.retain(|_, download| download.upgrade().is_some());
        let (downloads, digest) = (self.clone(), *digest);
        let task = spawn(self.clone().download(digest));
        let download = async move {
            let outcome = task.await;
            downloads.running.lock().remove(&digest);
            outcome.map(|file| file.map(Arc::new)).map_err(|error| (error.kind(), error.to_string()))
        };
        let download = download.boxed().shared();
        running.extend(download.downgrade().map(|weak| (digest, weak)));
        download
    }

    async fn download(self: Arc<Self>, digest: B3Digest) -> io::Result<Option<File>> {
        let _permit = self.permits.acquire().await.map_err(io::Error::other)?;
        // Another download may have ended since the caller looked.
        if let Some(file) = self.open_cached(&digest).await? {
            return Ok(Some(file));
        }
        let Some(chunks) = self.remote.chunks(&digest).await? else { return Ok(None) };
        let writer = self.downloaded.open_write().await;
        let mut incoming = IncomingBlob { digest, hasher: blake3::Hasher::new(), writer, bytes: 0 };
        if chunks.is_empty() || chunks.iter().any(|chunk| chunk.size > MAX_CHUNK_BYTES) {
            let Some(mut reader) = self.remote.open_read(&digest).await? else { return Ok(None) };
            let mut buffer = vec![0; COPY_BYTES];
            loop {
                match reader.read(&mut buffer).await? {
                    0 => break,
                    count => incoming.add(&buffer[..count]).await?,
                }
            }
        } else {
            let mut contents = stream::iter(chunks.clone())
                .map(|chunk| spawn(self.clone().chunk(digest, chunk)))
                .buffered(CONCURRENT_CHUNKS);
            while let Some(chunk) = contents.next().await.transpose()? {
                incoming.add(&chunk).await?;
            }
        }
        let bytes = incoming.bytes;
        let file = {
            // A sweep would commit the blob, and could evict it before anyone has opened it.
            let _staying = self.evictor.removing.read().await;
            incoming.close().await?;
            self.open_cached(&digest).await?
        };
        self.remember_chunks(&digest, &chunks);
        if self.evictor.add_bytes(bytes) {
            self.sweep();
        }
        Ok(file)
    }

    /// Begins to commit downloaded blobs and to evict others.
    pub(super) fn sweep(self: &Arc<Self>) {
        let downloads = self.clone();
        let sweep = move || {
            if let Err(error) = downloads.sweep_blocking() {
                tracing::warn!("can't keep the cache within its size: {error}");
            }
        };
        // A failure means that there are no threads, and so no downloads.
        let _ = spawn_blocking(sweep);
    }

    /// As [`sweep`](Self::sweep), but waits for it, blocking.
    pub(super) fn sweep_blocking(&self) -> io::Result<()> {
        futures::executor::block_on(self.downloaded.commit())?;
        self.evictor.sweep()
    }

    /// One chunk, from a cached blob or from the remote store.
    async fn chunk(self: Arc<Self>, blob: B3Digest, ChunkMeta { digest, size }: ChunkMeta) -> io::Result<Bytes> {
        let digest = B3Digest::try_from(digest.as_ref()).map_err(|error| damaged(&blob, &error.to_string()))?;
        if let Some(contents) = self.cached_chunk(&digest, size).await {
            return Ok(contents);
        }
        let Some(reader) = self.remote.open_read(&digest).await? else {
            return Err(damaged(&blob, &format!("its chunk {digest} is missing")));
        };
        let mut contents = Vec::new();
        reader.take(size + 1).read_to_end(&mut contents).await?;
        if contents.len() as u64 != size || B3Digest::of(&contents) != digest {
            return Err(damaged(&blob, &format!("its chunk {digest} has other contents or is not {size} bytes long")));
        }
        Ok(contents.into())
    }

    async fn cached_chunk(&self, digest: &B3Digest, size: u64) -> Option<Bytes> {
        let (blob, position) = *self.known_chunks.lock().get(digest)?;
        let file = self.open_cached(&blob).await.ok()??;
        let mut contents = vec![0; usize::try_from(size).ok()?];
        file.read_exact_at(&mut contents, position).ok()?;
        (B3Digest::of(&contents) == *digest).then(|| contents.into())
    }

    fn remember_chunks(&self, blob: &B3Digest, chunks: &[ChunkMeta]) {
        let mut known = self.known_chunks.lock();
        if known.len() + chunks.len() > MAX_KNOWN_CHUNKS {
            known.clear();
        }
        let mut position = 0;
        for chunk in chunks.iter().take(MAX_KNOWN_CHUNKS) {
            if let Ok(digest) = B3Digest::try_from(chunk.digest.as_ref()) {
                known.insert(digest, (*blob, position));
            }
            position += chunk.size;
        }
    }
}

/// A blob that is being downloaded. Dropped before it is closed, it leaves nothing.
struct IncomingBlob {
    digest: B3Digest,
    hasher: blake3::Hasher,
    writer: Box<dyn BlobWriter>,
    bytes: u64,
}

impl IncomingBlob {
    async fn add(&mut self, contents: &[u8]) -> io::Result<()> {
        self.hasher.update(contents);
        self.bytes += contents.len() as u64;
        if self.bytes > MAX_BLOB_BYTES {
            return Err(damaged(&self.digest, &format!("it has more than {MAX_BLOB_BYTES} bytes")));
        }
        self.writer.write_all(contents).await
    }

    async fn close(mut self) -> io::Result<()> {
        let actual = B3Digest::from(self.hasher.finalize());
        if actual != self.digest {
            return Err(damaged(&self.digest, &format!("its contents have the digest {actual}")));
        }
        self.writer.close().await.map(drop)
    }
}

fn damaged(blob: &B3Digest, what: &str) -> io::Error {
    let message = format!("the remote store's blob {blob} is damaged: {what}");
    io::Error::new(io::ErrorKind::InvalidData, message)
}
