//! Cuts a blob into chunks and uploads them while it is being written.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use async_trait::async_trait;
use fastcdc::v2020::FastCDC;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _, future::BoxFuture, stream::FuturesOrdered};
use tokio::io::AsyncWrite;

use super::{
    CONCURRENT_REQUESTS, Objects,
    chunks::{self, AVERAGE_CHUNK_BYTES, MAX_CHUNK_BYTES, MIN_CHUNK_BYTES},
    spawn,
};
use crate::{
    B3Digest, BlobWriter,
    blobservice::{written_after_close, written_after_failure},
    proto::stat_blob_response::ChunkMeta,
};

/// Writes one blob. Keeps at most [`CONCURRENT_REQUESTS`] chunks in memory, and one that is not cut yet.
pub(super) struct ChunkingWriter {
    objects: Arc<Objects>,
    state: State,
}

enum State {
    Open(Box<Open>),
    Closed(B3Digest),
    /// An upload failed, or a call of `close` was dropped.
    Broken,
}

struct Open {
    hasher: blake3::Hasher,
    /// Contents that are not cut yet, at most [`MAX_CHUNK_BYTES`].
    buffer: Vec<u8>,
    uploads: FuturesOrdered<BoxFuture<'static, io::Result<ChunkMeta>>>,
    uploaded: Vec<ChunkMeta>,
}

impl ChunkingWriter {
    pub(super) fn new(objects: Arc<Objects>) -> Self {
        let open = Open {
            hasher: blake3::Hasher::new(),
            buffer: Vec::new(),
            uploads: FuturesOrdered::new(),
            uploaded: Vec::new(),
        };
        Self { objects, state: State::Open(Box::new(open)) }
    }
}

impl Open {
    /// Waits until another chunk may be uploaded.
    fn poll_capacity(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.uploads.len() >= CONCURRENT_REQUESTS {
            if let Some(chunk) = ready!(self.uploads.poll_next_unpin(context)) {
                self.uploaded.push(chunk?);
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Cuts the first chunk off the buffer, which contains [`MAX_CHUNK_BYTES`] or the rest of the blob, and uploads it.
    fn cut(&mut self, objects: &Arc<Objects>) {
        let chunker = FastCDC::new(&self.buffer, MIN_CHUNK_BYTES, AVERAGE_CHUNK_BYTES, MAX_CHUNK_BYTES);
        let (_, end) = chunker.cut(0, self.buffer.len());
        let rest = self.buffer.split_off(end);
        let chunk = std::mem::replace(&mut self.buffer, rest);
        self.uploads.push_back(spawn(chunks::put(objects.clone(), chunk)).boxed());
    }

    fn poll_write(
        &mut self,
        objects: &Arc<Objects>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.buffer.len() == MAX_CHUNK_BYTES {
            ready!(self.poll_capacity(context))?;
            self.cut(objects);
        }
        let bytes = &bytes[..bytes.len().min(MAX_CHUNK_BYTES - self.buffer.len())];
        self.hasher.update(bytes);
        self.buffer.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    async fn close(mut self, objects: Arc<Objects>) -> io::Result<B3Digest> {
        while !self.buffer.is_empty() {
            std::future::poll_fn(|context| self.poll_capacity(context)).await?;
            self.cut(&objects);
        }
        let mut chunks = self.uploaded;
        while let Some(chunk) = self.uploads.try_next().await? {
            chunks.push(chunk);
        }
        let digest = self.hasher.finalize().into();
        if chunks.len() > 1 {
            spawn(chunks::put_list(objects, digest, chunks)).await?;
        }
        Ok(digest)
    }
}

impl AsyncWrite for ChunkingWriter {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let Self { objects, state } = &mut *self;
        let written = match state {
            State::Open(open) => ready!(open.poll_write(objects, context, bytes)),
            State::Closed(_) => return Poll::Ready(Err(written_after_close())),
            State::Broken => return Poll::Ready(Err(written_after_failure())),
        };
        if written.is_err() {
            *state = State::Broken;
        }
        Poll::Ready(written)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[async_trait]
impl BlobWriter for ChunkingWriter {
    async fn close(&mut self) -> io::Result<B3Digest> {
        let digest = match std::mem::replace(&mut self.state, State::Broken) {
            State::Open(open) => open.close(self.objects.clone()).await?,
            State::Closed(digest) => digest,
            State::Broken => return Err(written_after_failure()),
        };
        self.state = State::Closed(digest);
        Ok(digest)
    }
}
