//! Reads a blob chunk by chunk.
//!
//! ```text
//!   from the start, in order:   chunk ─verify─▶ hash ─▶ reader … last chunk ─verify─▶ hash = blob's digest? ─▶ reader
//!   from elsewhere:             all chunks ─▶ hash = blob's digest? then chunk ─verify─▶ reader
//! ```
//!
//! Each chunk is checked against the list, but the list itself may be wrong: a blob's digest does not follow from those of
//! its chunks. So the last chunk is held back until all of them have been hashed. After a seek before that, the reader first
//! hashes all chunks.

use std::{
    io::{self, SeekFrom},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};
use futures::{
    StreamExt as _,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use tokio::io::{AsyncRead, AsyncSeek, ReadBuf};

use super::{CONCURRENT_REQUESTS, Objects, chunks, chunks::Chunk, damaged, spawn};
use crate::B3Digest;

pub(super) struct ChunkedReader {
    blob: Blob,
    trust: Trust,
    position: u64,
    /// The contents from `position` to the end of its chunk.
    ready: Bytes,
    /// The following chunks.
    coming: Option<BoxStream<'static, io::Result<Bytes>>>,
}

#[derive(Clone)]
struct Blob {
    objects: Arc<Objects>,
    digest: B3Digest,
    chunks: Arc<[Chunk]>,
}

/// Whether the list of chunks has been checked against the blob's digest.
enum Trust {
    /// Not yet. Everything up to the end of `ready` has been hashed.
    Hashing(Box<blake3::Hasher>),
    /// All chunks are being hashed.
    Checking(BoxFuture<'static, io::Result<()>>),
    Verified,
}

impl Blob {
    fn size(&self) -> u64 {
        self.chunks.last().map_or(0, Chunk::end)
    }

    /// The chunks from this position on. The first one is not cut.
    fn fetch(&self, position: u64) -> BoxStream<'static, io::Result<Bytes>> {
        let Self { objects, digest, chunks } = self.clone();
        let first = chunks.partition_point(|chunk| chunk.end() <= position);
        stream::iter(first..chunks.len())
            .map(move |index| spawn(chunks::get_listed(objects.clone(), digest, chunks[index])))
            .buffered(CONCURRENT_REQUESTS)
            .boxed()
    }

    fn check(&self, hasher: &blake3::Hasher) -> io::Result<()> {
        let actual = B3Digest::from(hasher.finalize());
        if actual == self.digest {
            return Ok(());
        }
        Err(damaged(&format!("the chunks of the blob {} give the digest {actual}", self.digest)))
    }

    async fn check_all(self) -> io::Result<()> {
        let mut hasher = blake3::Hasher::new();
        let mut contents = self.fetch(0);
        while let Some(chunk) = contents.next().await.transpose()? {
            hasher.update(&chunk);
        }
        self.check(&hasher)
    }
}

impl ChunkedReader {
    pub(super) fn new(objects: Arc<Objects>, digest: B3Digest, chunks: Vec<Chunk>) -> Self {
        Self {
            blob: Blob { objects, digest, chunks: chunks.into() },
            trust: Trust::Hashing(Box::default()),
            position: 0,
            ready: Bytes::new(),
            coming: None,
        }
    }

    /// Waits for more contents in `ready`, unless the end is reached.
    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.ready.is_empty() && self.position < self.blob.size() {
            if let Trust::Checking(check) = &mut self.trust {
                match ready!(check.as_mut().poll(context)) {
                    Ok(()) => self.trust = Trust::Verified,
                    Err(error) => {
                        self.trust = Trust::Hashing(Box::default());
                        return Poll::Ready(Err(error));
                    }
                }
            }
            let Some(coming) = &mut self.coming else {
                if self.position > 0 && matches!(self.trust, Trust::Hashing(_)) {
                    self.trust = Trust::Checking(Box::pin(self.blob.clone().check_all()));
                } else {
                    self.coming = Some(self.blob.fetch(self.position));
                }
                continue;
            };
            let chunk = match ready!(coming.poll_next_unpin(context)) {
                Some(Ok(chunk)) => self.admit(chunk),
                Some(Err(error)) => Err(error),
                None => Err(io::ErrorKind::UnexpectedEof.into()),
            };
            match chunk {
                Ok(chunk) => self.ready = chunk,
                Err(error) => {
                    self.forget();
                    return Poll::Ready(Err(error));
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Hashes the chunk at the position, and cuts off its part before the position.
    fn admit(&mut self, mut chunk: Bytes) -> io::Result<Bytes> {
        let chunks = &self.blob.chunks;
        let listed = chunks[chunks.partition_point(|chunk| chunk.end() <= self.position)];
        if let Trust::Hashing(hasher) = &mut self.trust {
            hasher.update(&chunk);
            if listed.end() == self.blob.size() {
                self.blob.check(hasher)?;
                self.trust = Trust::Verified;
            }
        }
        chunk.advance((self.position - listed.start) as usize);
        Ok(chunk)
    }

    /// Drops the downloaded chunks. Hashing starts again.
    fn forget(&mut self) {
        self.ready = Bytes::new();
        self.coming = None;
        if !matches!(self.trust, Trust::Verified) {
            self.trust = Trust::Hashing(Box::default());
        }
    }
}

impl AsyncRead for ChunkedReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.poll_ready(context))?;
        let count = self.ready.len().min(buffer.remaining());
        buffer.put_slice(&self.ready.split_to(count));
        self.position += count as u64;
        Poll::Ready(Ok(()))
    }
}

impl AsyncSeek for ChunkedReader {
    fn start_seek(mut self: Pin<&mut Self>, to: SeekFrom) -> io::Result<()> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(offset) => self.blob.size().checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        let position = position.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        if position != self.position {
            self.forget();
            self.position = position;
        }
        Ok(())
    }

    fn poll_complete(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<u64>> {
        Poll::Ready(Ok(self.position))
    }
}
