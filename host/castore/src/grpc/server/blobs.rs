use std::sync::Arc;

use async_trait::async_trait;
use bytes::BytesMut;
use cofferdam_rpc::{Answers, Client, Outlet, Work};
use prost::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::{Request, Response, Status, Streaming};

use super::{
    super::{CHUNK_BYTES, MAX_MESSAGE_BYTES},
    Puts, digest, status,
};
use crate::{
    B3Digest, BlobService, Views,
    proto::{BlobChunk, PutBlobResponse, ReadBlobRequest, StatBlobRequest, StatBlobResponse, blob_service_server},
};

/// Serves a blob service.
pub(in super::super) struct Blobs {
    pub(super) views: Views,
    pub(super) work: Work,
    pub(super) max_blob_bytes: u64,
    pub(super) puts: Puts,
}

impl Blobs {
    fn blobs_of(&self, client: &Client) -> Arc<dyn BlobService> {
        self.views.of(&client.to_string()).blobs
    }
}

fn missing(digest: &B3Digest) -> Status {
    Status::not_found(format!("the blob {digest} is not in the store"))
}

#[async_trait]
impl blob_service_server::BlobService for Blobs {
    async fn stat(&self, request: Request<StatBlobRequest>) -> Result<Response<StatBlobResponse>, Status> {
        let client = Client::of(&request)?;
        let request = request.into_inner();
        let digest = digest("digest", &request.digest)?;
        let blobs = self.blobs_of(&client);
        let stat = async move {
            if !request.send_chunks {
                let has = blobs.has(&digest).await.map_err(|error| status(&error))?;
                return has.then(StatBlobResponse::default).ok_or_else(|| missing(&digest));
            }
            let chunks = blobs.chunks(&digest).await.map_err(|error| status(&error))?;
            let mut answer = StatBlobResponse { chunks: chunks.ok_or_else(|| missing(&digest))?, ..Default::default() };
            // The list of chunks is optional, and most clients accept no larger message.
            if answer.encoded_len() > MAX_MESSAGE_BYTES {
                answer.chunks = Vec::new();
            }
            Ok(answer)
        };
        self.work.run(&client, None, stat).await.map(Response::new)
    }

    type ReadStream = Answers<BlobChunk>;

    async fn read(&self, request: Request<ReadBlobRequest>) -> Result<Response<Self::ReadStream>, Status> {
        let client = Client::of(&request)?;
        let digest = digest("digest", &request.into_inner().digest)?;
        let blobs = self.blobs_of(&client);
        let read = |mut outlet: Outlet<BlobChunk>| async move {
            let opened = blobs.open_read(&digest).await.map_err(|error| status(&error))?;
            let mut reader = opened.ok_or_else(|| missing(&digest))?;
            loop {
                let mut data = BytesMut::with_capacity(CHUNK_BYTES);
                if reader.read_buf(&mut data).await.map_err(|error| status(&error))? == 0 {
                    return Ok(());
                }
                outlet.send(BlobChunk { data: data.freeze() }).await?;
            }
        };
        self.work.stream(client, None, read).await
    }

    async fn put(&self, request: Request<Streaming<BlobChunk>>) -> Result<Response<PutBlobResponse>, Status> {
        let client = Client::of(&request)?;
        let mut chunks = self.work.inlet(request.into_inner());
        let (blobs, max_blob_bytes) = (self.blobs_of(&client), self.max_blob_bytes);
        let (puts, owner) = (self.puts.clone(), client.clone());
        let put = async move {
            let mut admitted = puts.begin(&owner).map_err(|error| status(&error))?;
            let mut writer = blobs.open_write().await;
            let mut size: u64 = 0;
            while let Some(chunk) = chunks.next().await? {
                let bytes = chunk.data.len() as u64;
                admitted.more(bytes).map_err(|error| status(&error))?;
                size += bytes;
                if size > max_blob_bytes {
                    return Err(Status::out_of_range(format!(
                        "the blob has more than {max_blob_bytes} bytes, which is the limit of this server"
                    )));
                }
                writer.write_all(&chunk.data).await.map_err(|error| status(&error))?;
            }
            let digest = writer.close().await.map_err(|error| status(&error))?;
            blobs.commit().await.map_err(|error| status(&error))?;
            Ok(PutBlobResponse { digest: digest.as_slice().to_vec().into() })
        };
        self.work.run(&client, None, put).await.map(Response::new)
    }
}
