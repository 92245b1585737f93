//! The calls of the blob service of a peer.

use std::{
    io,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};
use tonic::Streaming;

use super::{
    super::{MAX_MESSAGE_BYTES, Package},
    download::{Download, Outlet},
    peer::{Peer, Readdressed},
    upload::Outgoing,
};
use crate::{
    B3Digest,
    proto::{BlobChunk, ReadBlobRequest, StatBlobRequest, StatBlobResponse, blob_service_client::BlobServiceClient},
    runtime::spawn,
};

#[derive(Debug, Clone)]
pub(super) struct BlobClient {
    peer: Peer,
    package: Arc<OnceLock<Package>>,
}

impl BlobClient {
    pub(super) fn new(peer: Peer) -> Self {
        Self { peer, package: Arc::default() }
    }

    /// A client for the package under which the peer has the service. The first call asks the peer.
    async fn client(&self) -> io::Result<BlobServiceClient<Readdressed>> {
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
        let asked = StatBlobRequest { digest: B3Digest::EMPTY.into(), ..Default::default() };
        let mut client = self.client_of(Package::Snix);
        self.peer.package_by(async { client.stat(asked).await.err() }).await
    }

    fn client_of(&self, package: Package) -> BlobServiceClient<Readdressed> {
        BlobServiceClient::new(self.peer.channel(package)).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// `None` when the peer has no such blob.
    pub(super) async fn stat(&self, digest: &B3Digest, send_chunks: bool) -> io::Result<Option<StatBlobResponse>> {
        let asked = StatBlobRequest { digest: (*digest).into(), send_chunks, send_bao: false };
        let this = self.clone();
        let answered = spawn(async move {
            let mut client = this.client().await?;
            this.peer.answer(client.stat(asked)).await
        });
        Ok(found(answered.await)?.map(tonic::Response::into_inner))
    }

    /// Starts to download a blob, and returns its first piece. `None` when the peer has no such blob.
    pub(super) async fn download(&self, digest: &B3Digest) -> io::Result<Option<(Bytes, Download<Bytes>)>> {
        let (this, digest) = (self.clone(), *digest);
        let mut download = Download::start(move |outlet| async move { this.fetch(digest, outlet).await });
        Ok(found(download.next().await)?.map(|first| (first.unwrap_or_default(), download)))
    }

    /// Holds the last piece back until the whole blob has been checked, so that a wrong blob never seems to end well.
    async fn fetch(self, digest: B3Digest, mut outlet: Outlet<Bytes>) -> io::Result<()> {
        let mut client = self.client().await?;
        let asked = ReadBlobRequest { digest: digest.into() };
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

    /// The next piece that is not empty. Empty ones do not extend the deadline.
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

    /// Sends a blob, and returns the digest that the peer answers.
    pub(super) async fn put(self, chunks: Outgoing<BlobChunk>) -> io::Result<Vec<u8>> {
        let answered = self.client().await?.put(chunks).await;
        Ok(answered.map_err(|status| self.peer.refused(&status))?.into_inner().digest.into())
    }

    pub(super) fn wrong(&self, what: impl std::fmt::Display) -> io::Error {
        self.peer.wrong(what)
    }

    pub(super) const fn peer(&self) -> &Peer {
        &self.peer
    }
}

/// `None` for a `NotFound` error.
fn found<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}
