use std::{io, sync::Arc};

use async_trait::async_trait;

use super::{blob_client::BlobClient, blob_reader::GrpcBlobReader, blob_writer::GrpcBlobWriter, peer::Peer};
use crate::{B3Digest, BlobReader, BlobService, BlobWriter, proto::stat_blob_response::ChunkMeta};

/// The blobs of a peer, over gRPC.
///
/// A batch holds nothing back, and a commit has nothing to do: everyone finds a blob as soon as it is closed. Everything
/// that is read is checked against its digest before its end. A file, or a reader that seeks backwards, uses a copy of the
/// whole blob that has been checked.
#[derive(Debug, Clone)]
pub struct GrpcBlobService {
    client: BlobClient,
}

impl GrpcBlobService {
    /// The blobs of this peer.
    pub fn new(peer: Peer) -> Self {
        Self { client: BlobClient::new(peer) }
    }
}

#[async_trait]
impl BlobService for GrpcBlobService {
    async fn has(&self, digest: &B3Digest) -> io::Result<bool> {
        Ok(*digest == B3Digest::EMPTY || self.client.stat(digest, false).await?.is_some())
    }

    async fn chunks(&self, digest: &B3Digest) -> io::Result<Option<Vec<ChunkMeta>>> {
        let Some(stat) = self.client.stat(digest, true).await? else {
            return Ok((*digest == B3Digest::EMPTY).then(Vec::new));
        };
        let mut size: u64 = 0;
        for (index, chunk) in stat.chunks.iter().enumerate() {
            let wrong = |what: &str| self.client.wrong(format_args!("the blob {digest}: chunks[{index}].{what}"));
            B3Digest::try_from(chunk.digest.as_ref()).map_err(|error| wrong(&format!("digest: {error}")))?;
            size = size.checked_add(chunk.size).ok_or_else(|| wrong("size: all together are more than 2^64-1"))?;
        }
        Ok(Some(stat.chunks))
    }

    async fn open_read(&self, digest: &B3Digest) -> io::Result<Option<Box<dyn BlobReader>>> {
        if *digest == B3Digest::EMPTY {
            return Ok(Some(Box::new(io::Cursor::new([]))));
        }
        Ok(GrpcBlobReader::open(self.client.clone(), *digest).await?.map(|reader| Box::new(reader) as _))
    }

    async fn open_write(&self) -> Box<dyn BlobWriter> {
        Box::new(GrpcBlobWriter::new(self.client.clone()))
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn batch(&self) -> Arc<dyn BlobService> {
        Arc::new(self.clone())
    }

    async fn commit(&self) -> io::Result<()> {
        Ok(())
    }
}
