//! Servers that do what a test tells them.

use std::pin::Pin;

use async_trait::async_trait;
use futures::{Stream, StreamExt as _, future::BoxFuture, stream};
use tempfile::TempDir;
use tonic::{Request, Response, Status, Streaming, service::RoutesBuilder};

use super::super::{EncodedDirectory, testing::serve_routes_on_socket};
use crate::proto::{
    BlobChunk, GetDirectoryRequest, PutBlobResponse, PutDirectoryResponse, ReadBlobRequest, StatBlobRequest,
    StatBlobResponse,
    blob_service_server::{self, BlobServiceServer},
    directory_service_server::{self, DirectoryServiceServer},
};

pub(super) type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

type Fake<A, B> = Box<dyn Fn(A) -> B + Send + Sync>;

/// Messages, and then a clean end.
pub(super) fn all<T: Send + 'static>(messages: Vec<T>) -> Answers<T> {
    stream::iter(messages.into_iter().map(Ok)).boxed()
}

/// Messages, and then nothing more for ever.
pub(super) fn hang_after<T: Send + 'static>(messages: Vec<T>) -> Answers<T> {
    all(messages).chain(stream::pending()).boxed()
}

/// The same message for ever.
pub(super) fn for_ever<T: Clone + Send + 'static>(message: T) -> Answers<T> {
    stream::repeat(message).map(Ok).boxed()
}

pub(super) struct FakeBlobs {
    pub(super) stat: Fake<StatBlobRequest, Result<StatBlobResponse, Status>>,
    pub(super) read: Fake<ReadBlobRequest, Answers<BlobChunk>>,
    pub(super) put: Fake<Streaming<BlobChunk>, BoxFuture<'static, Result<PutBlobResponse, Status>>>,
}

impl Default for FakeBlobs {
    fn default() -> Self {
        Self {
            stat: Box::new(|_| Ok(StatBlobResponse::default())),
            read: Box::new(|_| all(Vec::new())),
            put: Box::new(|_| Box::pin(std::future::pending())),
        }
    }
}

impl FakeBlobs {
    pub(super) fn reading(read: impl Fn() -> Answers<BlobChunk> + Send + Sync + 'static) -> Self {
        Self { read: Box::new(move |_| read()), ..Self::default() }
    }

    pub(super) fn serve(self) -> (String, TempDir) {
        let mut routes = RoutesBuilder::default();
        routes.add_service(BlobServiceServer::new(self));
        serve_routes_on_socket(routes)
    }
}

#[async_trait]
impl blob_service_server::BlobService for FakeBlobs {
    type ReadStream = Answers<BlobChunk>;

    async fn stat(&self, request: Request<StatBlobRequest>) -> Result<Response<StatBlobResponse>, Status> {
        (self.stat)(request.into_inner()).map(Response::new)
    }

    async fn read(&self, request: Request<ReadBlobRequest>) -> Result<Response<Self::ReadStream>, Status> {
        Ok(Response::new((self.read)(request.into_inner())))
    }

    async fn put(&self, request: Request<Streaming<BlobChunk>>) -> Result<Response<PutBlobResponse>, Status> {
        (self.put)(request.into_inner()).await.map(Response::new)
    }
}

pub(super) struct FakeDirectories {
    pub(super) get: Fake<GetDirectoryRequest, Answers<EncodedDirectory>>,
    pub(super) put: Fake<Streaming<EncodedDirectory>, BoxFuture<'static, Result<PutDirectoryResponse, Status>>>,
}

impl FakeDirectories {
    pub(super) fn getting(get: impl Fn() -> Answers<EncodedDirectory> + Send + Sync + 'static) -> Self {
        // The first question of a client is for the empty directory.
        let get = move |request: GetDirectoryRequest| {
            if request == super::get(super::bytes(&crate::B3Digest::EMPTY), false) {
                return all(vec![EncodedDirectory::default()]);
            }
            get()
        };
        Self { get: Box::new(get), put: Box::new(|_| Box::pin(std::future::pending())) }
    }

    pub(super) fn serve(self) -> (String, TempDir) {
        let mut routes = RoutesBuilder::default();
        let limit = crate::directory::MAX_DIRECTORY_BYTES * 2;
        routes.add_service(DirectoryServiceServer::new(self).max_decoding_message_size(limit));
        serve_routes_on_socket(routes)
    }
}

#[async_trait]
impl directory_service_server::DirectoryService for FakeDirectories {
    type GetStream = Answers<EncodedDirectory>;

    async fn get(&self, request: Request<GetDirectoryRequest>) -> Result<Response<Self::GetStream>, Status> {
        Ok(Response::new((self.get)(request.into_inner())))
    }

    async fn put(
        &self,
        request: Request<Streaming<EncodedDirectory>>,
    ) -> Result<Response<PutDirectoryResponse>, Status> {
        (self.put)(request.into_inner()).await.map(Response::new)
    }
}
