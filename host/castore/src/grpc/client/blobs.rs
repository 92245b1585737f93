use std::{
    io,
    sync::{Arc, OnceLock},
};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::time::{Instant, timeout_at};
use tonic::Streaming;

use super::{
    super::{MAX_MESSAGE_BYTES, Package},
    blob_reader::GrpcBlobReader,
    blob_writer::GrpcBlobWriter,
    download::{Download, Outlet},
    peer::{Peer, Readdressed},
    upload::Outgoing,
};
use crate::{
    B3Digest, BlobReader, BlobService, BlobWriter,
    proto::{
        BlobChunk, ReadBlobRequest, StatBlobRequest, StatBlobResponse, blob_service_client::BlobServiceClient,
        stat_blob_response::ChunkMeta,
    },
    runtime::spawn,
};

/// Blobs elsewhere, over gRPC.
///
/// What is put is there for all as soon as it is closed: a batch holds nothing back, and a commit has nothing to do. What
/// is read is checked against its digest before its end is told; a reader that does anything but go forward, or a file,
/// is a copy that is checked before it is used.
#[derive(Debug, Clone)]
pub struct GrpcBlobService {
    peer: Peer,
    package: Arc<OnceLock<Package>>,
}

impl GrpcBlobService {
    /// The blobs of this peer.
    pub fn new(peer: Peer) -> Self {
        Self { peer, package: Arc::default() }
    }

    /// The client for the name under which the peer has the service, which is found out once.
    pub(super) async fn client(&self) -> io::Result<BlobServiceClient<Readdressed>> {
        let package = match self.package.get() {
            Some(package) => *package,
            None => {
                let asked = self.ask_package().await?;
                *self.package.get_or_init(|| asked)
            }
        };
        Ok(self.client_of(package))
    }

    async fn ask_package(&self) -> io::Result<Package> {
        let asked = StatBlobRequest { digest: to_bytes(&B3Digest::EMPTY), ..Default::default() };
        let mut client = self.client_of(Package::Snix);
        self.peer.package_by(async { client.stat(asked).await.err() }).await
    }

    fn client_of(&self, package: Package) -> BlobServiceClient<Readdressed> {
        BlobServiceClient::new(self.peer.channel(package)).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// `None` when the peer has no such blob.
    async fn stat(&self, digest: &B3Digest, send_chunks: bool) -> io::Result<Option<StatBlobResponse>> {
        let asked = StatBlobRequest { digest: to_bytes(digest), send_chunks, send_bao: false };
        let service = self.clone();
        let answered = spawn(async move {
            let mut client = service.client().await?;
            service.peer.answer(client.stat(asked)).await
        });
        Ok(found(answered.await)?.map(tonic::Response::into_inner))
    }

    /// A blob from its start, and the first piece of it; `None` when the peer has no such blob.
    pub(super) async fn download(&self, digest: &B3Digest) -> io::Result<Option<(Bytes, Download<Bytes>)>> {
        let (service, digest) = (self.clone(), *digest);
        let mut download = Download::start(move |outlet| async move { service.fetch(digest, outlet).await });
        Ok(found(download.next().await)?.map(|first| (first.unwrap_or_default(), download)))
    }

    /// The last piece is held back until the whole has been checked: who has read it all has read what is right.
    async fn fetch(self, digest: B3Digest, mut outlet: Outlet<Bytes>) -> io::Result<()> {
        let mut client = self.client().await?;
        let asked = ReadBlobRequest { digest: to_bytes(&digest) };
        let mut chunks = self.peer.answer(client.read(asked)).await?.into_inner();
        let mut hasher = blake3::Hasher::new();
        let mut held = None;
        while let Some(piece) = self.next_piece(&mut chunks).await? {
            hasher.update(&piece);
            if hasher.count() > self.peer.max_blob_bytes {
                let limit = self.peer.max_blob_bytes;
                return Err(self.peer.wrong(format_args!("the blob {digest} goes on after {limit} bytes")));
            }
            if let Some(checked) = held.replace(piece) {
                let bytes = checked.len();
                outlet.send(checked, bytes).await?;
            }
        }
        let actual = B3Digest::from(hasher.finalize());
        if actual != digest {
            return Err(self.peer.wrong(format_args!("what came as the blob {digest} has the digest {actual}")));
        }
        match held {
            Some(last) => {
                let bytes = last.len();
                outlet.send(last, bytes).await
            }
            None => Ok(()),
        }
    }

    /// Messages that bring nothing are no sign of life.
    async fn next_piece(&self, chunks: &mut Streaming<BlobChunk>) -> io::Result<Option<Bytes>> {
        let deadline = Instant::now() + self.peer.idle_timeout;
        loop {
            match timeout_at(deadline, chunks.message()).await {
                Err(_) => return Err(self.peer.silent()),
                Ok(Err(status)) => return Err(self.peer.refused(&status)),
                Ok(Ok(Some(chunk))) if chunk.data.is_empty() => {}
                Ok(Ok(chunk)) => return Ok(chunk.map(|chunk| chunk.data)),
            }
        }
    }

    pub(super) fn wrong(&self, what: impl std::fmt::Display) -> io::Error {
        self.peer.wrong(what)
    }

    pub(super) const fn peer(&self) -> &Peer {
        &self.peer
    }
}

pub(super) fn to_bytes(digest: &B3Digest) -> Bytes {
    Bytes::copy_from_slice(digest.as_slice())
}

/// `None` where something is not found.
fn found<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}

#[async_trait]
impl BlobService for GrpcBlobService {
    async fn has(&self, digest: &B3Digest) -> io::Result<bool> {
        Ok(*digest == B3Digest::EMPTY || self.stat(digest, false).await?.is_some())
    }

    async fn chunks(&self, digest: &B3Digest) -> io::Result<Option<Vec<ChunkMeta>>> {
        let Some(stat) = self.stat(digest, true).await? else {
            return Ok((*digest == B3Digest::EMPTY).then(Vec::new));
        };
        let mut size: u64 = 0;
        for (index, chunk) in stat.chunks.iter().enumerate() {
            let wrong = |what: &str| self.wrong(format_args!("the blob {digest}: chunks[{index}].{what}"));
            B3Digest::try_from(chunk.digest.as_ref()).map_err(|error| wrong(&format!("digest: {error}")))?;
            size = size.checked_add(chunk.size).ok_or_else(|| wrong("size: all together are more than 2^64-1"))?;
        }
        Ok(Some(stat.chunks))
    }

    async fn open_read(&self, digest: &B3Digest) -> io::Result<Option<Box<dyn BlobReader>>> {
        if *digest == B3Digest::EMPTY {
            return Ok(Some(Box::new(io::Cursor::new([]))));
        }
        let opened = self.download(digest).await?;
        Ok(opened.map(|(first, rest)| Box::new(GrpcBlobReader::new(self.clone(), *digest, first, rest)) as _))
    }

    async fn open_write(&self) -> Box<dyn BlobWriter> {
        Box::new(GrpcBlobWriter::new(self.clone()))
    }

    fn is_far(&self) -> bool {
        true
    }

    fn batch(&self) -> Arc<dyn BlobService> {
        Arc::new(self.clone())
    }

    async fn commit(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Sends a blob; returns the digest that the peer answers.
pub(super) async fn put(service: GrpcBlobService, chunks: Outgoing<BlobChunk>) -> io::Result<Vec<u8>> {
    let answered = service.client().await?.put(chunks).await;
    Ok(answered.map_err(|status| service.peer.refused(&status))?.into_inner().digest.into())
}
