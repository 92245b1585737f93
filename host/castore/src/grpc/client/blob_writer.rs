use std::{
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use async_trait::async_trait;
use bytes::BytesMut;
use tokio::io::AsyncWrite;

use super::{super::CHUNK_BYTES, blob_client::BlobClient, upload::Upload};
use crate::{B3Digest, BlobWriter, blobservice::written_after_close, proto::BlobChunk};

/// Sends a blob as it is written.
pub(super) struct GrpcBlobWriter {
    client: BlobClient,
    state: State,
}

enum State {
    Open(Box<Open>),
    Closed(B3Digest),
    Broken,
}

struct Open {
    hasher: blake3::Hasher,
    /// Written and not sent yet.
    buffer: BytesMut,
    /// Started with the first message.
    upload: Option<Upload<BlobChunk>>,
}

impl GrpcBlobWriter {
    pub(super) fn new(client: BlobClient) -> Self {
        let open = Open { hasher: blake3::Hasher::new(), buffer: BytesMut::new(), upload: None };
        Self { client, state: State::Open(Box::new(open)) }
    }

    /// Runs `work` on the open blob, which is broken if that fails.
    fn poll_open<T>(
        &mut self,
        work: impl FnOnce(&mut Open, &BlobClient) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let done = match &mut self.state {
            State::Open(open) => work(open, &self.client),
            State::Closed(_) => return Poll::Ready(Err(written_after_close())),
            State::Broken => return Poll::Ready(Err(broken())),
        };
        if matches!(done, Poll::Ready(Err(_))) {
            self.state = State::Broken;
        }
        done
    }
}

impl Open {
    fn upload(&mut self, client: &BlobClient) -> &mut Upload<BlobChunk> {
        let start = || Upload::start(client.peer(), |chunks| client.clone().put(chunks));
        self.upload.get_or_insert_with(start)
    }

    fn poll_send(&mut self, client: &BlobClient, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.buffer.is_empty() {
            return Poll::Ready(Ok(()));
        }
        ready!(self.upload(client).poll_ready(context))?;
        let data = self.buffer.split().freeze();
        self.upload(client).send(BlobChunk { data });
        Poll::Ready(Ok(()))
    }

    async fn finish(mut self, client: &BlobClient) -> io::Result<B3Digest> {
        poll_fn(|context| self.poll_send(client, context)).await?;
        self.upload(client);
        let answered = match self.upload {
            Some(upload) => upload.finish().await?,
            None => return Err(broken()),
        };
        let digest = B3Digest::from(self.hasher.finalize());
        if answered != digest.as_slice() {
            let answered = crate::escape(&answered);
            return Err(client.wrong(format_args!("the peer says {answered:?} is the digest of the blob {digest}")));
        }
        Ok(digest)
    }
}

fn broken() -> io::Error {
    io::Error::other("sending this blob failed: write it again")
}

impl AsyncWrite for GrpcBlobWriter {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_open(|open, client| {
            if open.buffer.len() >= CHUNK_BYTES {
                ready!(open.poll_send(client, context))?;
            }
            let taken = &bytes[..bytes.len().min(CHUNK_BYTES - open.buffer.len())];
            open.hasher.update(taken);
            open.buffer.extend_from_slice(taken);
            Poll::Ready(Ok(taken.len()))
        })
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.state {
            State::Closed(_) => Poll::Ready(Ok(())),
            _ => self.poll_open(|open, client| open.poll_send(client, context)),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(context)
    }
}

#[async_trait]
impl BlobWriter for GrpcBlobWriter {
    async fn close(&mut self) -> io::Result<B3Digest> {
        let digest = match std::mem::replace(&mut self.state, State::Broken) {
            State::Open(open) => open.finish(&self.client).await?,
            State::Closed(digest) => digest,
            State::Broken => return Err(broken()),
        };
        self.state = State::Closed(digest);
        Ok(digest)
    }
}
