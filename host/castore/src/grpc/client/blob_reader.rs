use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};
use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncSeek, ReadBuf};

use super::{blob_client::BlobClient, download::Download};
use crate::{B3Digest, blobservice::sealed_copy};

/// Reads a blob while it is downloaded, as long as it is read forwards; after that, from a checked copy on disk.
pub(super) struct GrpcBlobReader {
    client: BlobClient,
    digest: B3Digest,
    source: Source,
    /// Position of the next byte.
    position: u64,
    /// A seek that has been started.
    seek: Option<SeekFrom>,
}

enum Source {
    Stream { rest: Download<Bytes>, piece: Bytes, piece_position: u64 },
    Copying(BoxFuture<'static, io::Result<File>>),
    Copy(File),
}

impl GrpcBlobReader {
    /// `None` when the peer has no such blob.
    pub(super) async fn open(client: BlobClient, digest: B3Digest) -> io::Result<Option<Self>> {
        let Some((first, rest)) = client.download(&digest).await? else { return Ok(None) };
        let source = Source::Stream { rest, piece: first, piece_position: 0 };
        Ok(Some(Self { client, digest, source, position: 0, seek: None }))
    }

    /// A copy of the whole blob.
    fn poll_copy(&mut self, context: &mut Context<'_>) -> Poll<io::Result<&mut File>> {
        if let Source::Stream { .. } = self.source {
            self.source = Source::Copying(Box::pin(copy(self.client.clone(), self.digest)));
        }
        if let Source::Copying(copying) = &mut self.source {
            self.source = Source::Copy(ready!(copying.as_mut().poll(context))?);
        }
        match &mut self.source {
            Source::Copy(file) => Poll::Ready(Ok(file)),
            _ => Poll::Ready(Err(io::Error::other("the copy of the blob was lost"))),
        }
    }

    fn poll_seek(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(seek) = self.seek else { return Poll::Ready(Ok(())) };
        let target = match seek {
            SeekFrom::Start(target) => Some(target),
            SeekFrom::Current(by) => {
                let target = self.position.checked_add_signed(by);
                Some(target.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a seek to before the start"))?)
            }
            SeekFrom::End(_) => None,
        };
        self.position = match (&self.source, target) {
            // The skipped bytes are read all the same, for the digest.
            (Source::Stream { piece_position, .. }, Some(target)) if target >= *piece_position => target,
            _ => {
                let absolute = target.map_or(seek, SeekFrom::Start);
                ready!(self.poll_copy(context))?.seek(absolute)?
            }
        };
        self.seek = None;
        Poll::Ready(Ok(()))
    }
}

async fn copy(client: BlobClient, digest: B3Digest) -> io::Result<File> {
    match GrpcBlobReader::open(client, digest).await? {
        Some(reader) => sealed_copy(Box::new(reader)).await,
        None => {
            let message = format!("the peer no longer has the blob {digest}");
            Err(io::Error::new(io::ErrorKind::NotFound, message))
        }
    }
}

impl AsyncRead for GrpcBlobReader {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_seek(context))?;
        if let Source::Stream { rest, piece, piece_position } = &mut this.source {
            loop {
                let skip = (this.position - *piece_position).min(piece.len() as u64);
                piece.advance(usize::try_from(skip).unwrap_or(piece.len()));
                *piece_position += skip;
                if !piece.is_empty() {
                    break;
                }
                match ready!(rest.poll_next(context))? {
                    Some(next) => *piece = next,
                    None => return Poll::Ready(Ok(())),
                }
            }
            let read = piece.len().min(buffer.remaining());
            buffer.put_slice(&piece.split_to(read));
            *piece_position += read as u64;
            this.position += read as u64;
            return Poll::Ready(Ok(()));
        }
        let file = ready!(this.poll_copy(context))?;
        let read = loop {
            match file.read(buffer.initialize_unfilled()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read?,
            }
        };
        buffer.advance(read);
        this.position += read as u64;
        Poll::Ready(Ok(()))
    }
}

impl AsyncSeek for GrpcBlobReader {
    fn start_seek(mut self: Pin<&mut Self>, to: SeekFrom) -> io::Result<()> {
        self.seek = Some(to);
        Ok(())
    }

    fn poll_complete(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<u64>> {
        let this = self.get_mut();
        ready!(this.poll_seek(context))?;
        Poll::Ready(Ok(this.position))
    }
}
