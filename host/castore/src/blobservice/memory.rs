use std::{
    collections::HashMap,
    fs::File,
    io::{self, Cursor},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::io::AsyncWrite;

use super::{BlobReader, BlobService, BlobWriter};
use crate::B3Digest;

type Blobs = Arc<Mutex<HashMap<B3Digest, Bytes>>>;

/// Blobs in memory, for as long as the value lives.
#[derive(Debug, Default)]
pub struct MemoryBlobService {
    blobs: Blobs,
    /// Where a batch's blobs go when it is committed.
    committed: Option<Blobs>,
}

impl MemoryBlobService {
    fn get(&self, digest: &B3Digest) -> Option<Bytes> {
        if *digest == B3Digest::EMPTY {
            return Some(Bytes::new());
        }
        let places = [Some(&self.blobs), self.committed.as_ref()];
        places.into_iter().flatten().find_map(|blobs| blobs.lock().get(digest).cloned())
    }
}

#[async_trait]
impl BlobService for MemoryBlobService {
    async fn has(&self, digest: &B3Digest) -> io::Result<bool> {
        Ok(self.get(digest).is_some())
    }

    async fn open_read(&self, digest: &B3Digest) -> io::Result<Option<Box<dyn BlobReader>>> {
        Ok(self.get(digest).map(|blob| Box::new(Cursor::new(blob)) as _))
    }

    async fn open_write(&self) -> Box<dyn BlobWriter> {
        Box::new(MemoryBlobWriter { blobs: self.blobs.clone(), state: State::Open(Vec::new()) })
    }

    async fn open_file_if_ready(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        self.open_file(digest).await
    }

    fn batch(&self) -> Arc<dyn BlobService> {
        let committed = self.committed.as_ref().unwrap_or(&self.blobs);
        Arc::new(Self { blobs: Blobs::default(), committed: Some(committed.clone()) })
    }

    async fn commit(&self) -> io::Result<()> {
        if let Some(committed) = &self.committed {
            committed.lock().extend(self.blobs.lock().drain());
        }
        Ok(())
    }
}

struct MemoryBlobWriter {
    blobs: Blobs,
    state: State,
}

enum State {
    Open(Vec<u8>),
    Closed(B3Digest),
}

impl AsyncWrite for MemoryBlobWriter {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(match &mut self.state {
            State::Open(contents) => {
                contents.extend_from_slice(bytes);
                Ok(bytes.len())
            }
            State::Closed(_) => Err(super::written_after_close()),
        })
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[async_trait]
impl BlobWriter for MemoryBlobWriter {
    async fn close(&mut self) -> io::Result<B3Digest> {
        let contents = match &mut self.state {
            State::Open(contents) => std::mem::take(contents),
            State::Closed(digest) => return Ok(*digest),
        };
        let digest = B3Digest::of(&contents);
        self.blobs.lock().insert(digest, contents.into());
        self.state = State::Closed(digest);
        Ok(digest)
    }
}
