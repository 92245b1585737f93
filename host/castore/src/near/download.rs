//! Brings far blobs here: each once, and of its chunks those that other near blobs don't have.

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

use super::room::Room;
use crate::{
    B3Digest, BlobService, BlobWriter,
    proto::stat_blob_response::ChunkMeta,
    runtime::{spawn, spawn_blocking},
};

/// Most blobs that are downloaded at a time.
const CONCURRENT_DOWNLOADS: usize = 32;

/// Most chunks of one blob that are downloaded at a time.
const CONCURRENT_CHUNKS: usize = 8;

/// The largest chunk that is held in memory; a blob with a larger one is read as a whole.
const MAX_CHUNK_BYTES: u64 = 16 * 1024 * 1024;

/// Bytes of the largest blob that is taken: a far store that never ends must not fill the disk.
const MAX_BLOB_BYTES: u64 = 64 * 1024 * 1024 * 1024;

/// Most chunks whose place is known: 64 GiB at snix's usual average.
const MAX_KNOWN_CHUNKS: usize = 256 * 1024;

const COPY_BYTES: usize = 256 * 1024;

/// What all who wait for one download get.
type Outcome = Result<Option<Arc<File>>, (io::ErrorKind, String)>;

pub(super) struct Downloads {
    pub(super) room: Arc<Room>,
    /// Holds what was downloaded until it is committed.
    pub(super) fills: Arc<dyn BlobService>,
    far: Arc<dyn BlobService>,
    running: Mutex<HashMap<B3Digest, WeakShared<BoxFuture<'static, Outcome>>>>,
    permits: Semaphore,
    /// Where near blobs have which chunks: the blob, and the position in it.
    known: Mutex<HashMap<B3Digest, (B3Digest, u64)>>,
}

impl Downloads {
    pub(super) fn new(room: Arc<Room>, far: Arc<dyn BlobService>) -> Self {
        Self {
            fills: room.local.apart(),
            room,
            far,
            running: Mutex::default(),
            permits: Semaphore::new(CONCURRENT_DOWNLOADS),
            known: Mutex::default(),
        }
    }

    /// The near blob, whatever put it there.
    pub(super) async fn open_near(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        match self.room.opened(digest, self.fills.open_file(digest).await)? {
            None => self.room.opened(digest, self.room.local.open_file(digest).await),
            found => Ok(found),
        }
    }

    /// The same, unless it is still to be checked and large.
    pub(super) async fn open_at_hand(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        self.room.opened(digest, self.fills.open_file_at_hand(digest).await)
    }

    /// The blob, after the one download that is under way for all who want it.
    pub(super) async fn open(self: &Arc<Self>, digest: &B3Digest) -> io::Result<Option<File>> {
        match self.join(digest).await {
            Ok(None) => Ok(None),
            // Each gets an offset of its own.
            Ok(Some(file)) => {
                let file = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
                self.room.local.use_file(digest, &file);
                Ok(Some(file))
            }
            Err((kind, message)) => Err(io::Error::new(kind, message)),
        }
    }

    /// Begins to download a blob, unless there is enough to do for those who wait.
    pub(super) fn begin(self: &Arc<Self>, digest: &B3Digest) {
        if self.permits.available_permits() > CONCURRENT_DOWNLOADS / 2 {
            let download = self.join(digest);
            // Without threads it is not begun.
            let _ = crate::runtime::detach(async move {
                let _ = download.await;
            });
        }
    }

    /// The download of this blob; it ends when nobody waits for it any longer.
    fn join(self: &Arc<Self>, digest: &B3Digest) -> Shared<BoxFuture<'static, Outcome>> {
        let mut running = self.running.lock();
        if let Some(download) = running.get(digest).and_then(WeakShared::upgrade) {
            return download;
        }
        // What was given up by all who waited.
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
        // It may have come since the caller looked.
        if let Some(file) = self.open_near(&digest).await? {
            return Ok(Some(file));
        }
        let Some(chunks) = self.far.chunks(&digest).await? else { return Ok(None) };
        let writer = self.fills.open_write().await;
        let mut fill = Fill { digest, hasher: blake3::Hasher::new(), writer, bytes: 0 };
        if chunks.is_empty() || chunks.iter().any(|chunk| chunk.size > MAX_CHUNK_BYTES) {
            let Some(mut reader) = self.far.open_read(&digest).await? else { return Ok(None) };
            let mut buffer = vec![0; COPY_BYTES];
            loop {
                match reader.read(&mut buffer).await? {
                    0 => break,
                    count => fill.add(&buffer[..count]).await?,
                }
            }
        } else {
            let mut contents = stream::iter(chunks.clone())
                .map(|chunk| spawn(self.clone().chunk(digest, chunk)))
                .buffered(CONCURRENT_CHUNKS);
            while let Some(chunk) = contents.next().await.transpose()? {
                fill.add(&chunk).await?;
            }
        }
        let bytes = fill.bytes;
        fill.close().await?;
        self.know(&digest, &chunks);
        if self.room.grow(bytes) {
            self.sweep();
        }
        self.open_near(&digest).await
    }

    /// Begins to publish what was downloaded, and to make room.
    pub(super) fn sweep(self: &Arc<Self>) {
        let downloads = self.clone();
        let sweep = move || {
            if let Err(error) = downloads.sweep_in_place() {
                tracing::warn!("can't keep the near store within its bound: {error}");
            }
        };
        // Without threads there are no downloads either.
        let _ = spawn_blocking(sweep);
    }

    /// Blocks.
    pub(super) fn sweep_in_place(&self) -> io::Result<()> {
        futures::executor::block_on(self.fills.commit())?;
        self.room.sweep()
    }

    /// One chunk, from a near blob that has it or from the far store.
    async fn chunk(self: Arc<Self>, blob: B3Digest, ChunkMeta { digest, size }: ChunkMeta) -> io::Result<Bytes> {
        let digest = B3Digest::try_from(digest.as_ref()).map_err(|error| damaged(&blob, &error.to_string()))?;
        if let Some(contents) = self.near_chunk(&digest, size).await {
            return Ok(contents);
        }
        let Some(reader) = self.far.open_read(&digest).await? else {
            return Err(damaged(&blob, &format!("its chunk {digest} is missing")));
        };
        let mut contents = Vec::new();
        reader.take(size + 1).read_to_end(&mut contents).await?;
        if contents.len() as u64 != size || B3Digest::of(&contents) != digest {
            return Err(damaged(&blob, &format!("its chunk {digest} of {size} bytes is something else")));
        }
        Ok(contents.into())
    }

    async fn near_chunk(&self, digest: &B3Digest, size: u64) -> Option<Bytes> {
        let (blob, position) = *self.known.lock().get(digest)?;
        let file = self.open_near(&blob).await.ok()??;
        let mut contents = vec![0; usize::try_from(size).ok()?];
        file.read_exact_at(&mut contents, position).ok()?;
        (B3Digest::of(&contents) == *digest).then(|| contents.into())
    }

    fn know(&self, blob: &B3Digest, chunks: &[ChunkMeta]) {
        let mut known = self.known.lock();
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

/// A blob that is coming in. Dropped before it is closed, it leaves nothing.
struct Fill {
    digest: B3Digest,
    hasher: blake3::Hasher,
    writer: Box<dyn BlobWriter>,
    bytes: u64,
}

impl Fill {
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
            return Err(damaged(&self.digest, &format!("it came with the digest {actual}")));
        }
        self.writer.close().await.map(drop)
    }
}

fn damaged(blob: &B3Digest, what: &str) -> io::Error {
    let message = format!("the far store's blob {blob} is damaged: {what}");
    io::Error::new(io::ErrorKind::InvalidData, message)
}
