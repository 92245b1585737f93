//! Serves a store over gRPC.

mod blobs;
mod directories;
mod mount;
mod puts;

use std::io;

use cofferdam_proto::CASTORE_DESCRIPTOR_SET;
use cofferdam_rpc::{Guarded, Listener, MAX_QUESTION_BYTES, ServeError, Takes, Work, serve_routes};
use tokio_util::sync::CancellationToken;
use tonic::{Status, service::RoutesBuilder};

pub use puts::{Admission, Put, Puts};

pub(super) use mount::{TvixBlobs, TvixDirectories};

use super::{MAX_BLOB_BYTES, MAX_MESSAGE_BYTES, chain};
use crate::{
    B3Digest, Store, Views,
    directory::MAX_DIRECTORY_BYTES,
    proto::{blob_service_server::BlobServiceServer, directory_service_server::DirectoryServiceServer},
};
use blobs::Blobs;
use directories::Directories;

/// The names of castore's services, for health checks.
pub const SERVICES: [&str; 4] = [
    "snix.castore.v1.BlobService",
    "snix.castore.v1.DirectoryService",
    "tvix.castore.v1.BlobService",
    "tvix.castore.v1.DirectoryService",
];

/// How to serve a store.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Options of every gRPC server.
    pub rpc: cofferdam_rpc::ServeOptions,
    /// Limit of a blob that clients put, in bytes.
    pub max_blob_bytes: u64,
    /// Who may put; by default everybody.
    pub puts: Puts,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self { rpc: cofferdam_rpc::ServeOptions::default(), max_blob_bytes: MAX_BLOB_BYTES, puts: Puts::default() }
    }
}

/// Serves a store, health and reflection on these listeners until `shutdown`.
///
/// A put is answered only when its contents are durable.
///
/// # Errors
///
/// See [`ServeError`].
pub async fn serve(
    store: &Store,
    listeners: Vec<Listener>,
    options: &ServeOptions,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let stop = CancellationToken::new();
    let mut routes = RoutesBuilder::default();
    add_services(&mut routes, &Views::whole(store.clone()), options, stop.clone());
    serve_routes(routes, &SERVICES, &[CASTORE_DESCRIPTOR_SET], listeners, &options.rpc, shutdown, stop).await
}

/// Adds castore's services under snix's and tvix's names, in which each client is a tenant. Cancelling `stop` aborts their
/// requests.
pub fn add_services(routes: &mut RoutesBuilder, views: &Views, options: &ServeOptions, stop: CancellationToken) {
    let (blobs, directories) = services(views, options, stop);
    routes
        .add_service(TvixBlobs(blobs.clone()))
        .add_service(TvixDirectories(directories.clone()))
        .add_service(blobs)
        .add_service(directories);
}

pub(super) fn services(
    views: &Views,
    options: &ServeOptions,
    stop: CancellationToken,
) -> (Guarded<BlobServiceServer<Blobs>>, Guarded<DirectoryServiceServer<Directories>>) {
    let work = Work::new(&options.rpc, stop);
    let blobs = Blobs {
        views: views.clone(),
        work: work.clone(),
        max_blob_bytes: options.max_blob_bytes,
        puts: options.puts.clone(),
    };
    let directories = Directories::new(views.clone(), work, &options.rpc.clients, options.puts.clone());
    let blobs = BlobServiceServer::new(blobs).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let directories = DirectoryServiceServer::new(directories).max_decoding_message_size(MAX_DIRECTORY_BYTES);
    (
        Guarded::new(blobs, options.rpc.limits(|method| takes(method, MAX_MESSAGE_BYTES))),
        Guarded::new(directories, options.rpc.limits(|method| takes(method, MAX_DIRECTORY_BYTES))),
    )
}

/// The messages that a method of castore accepts: `Put` a stream of messages of at most `put_bytes` each, the others one short
/// question.
fn takes(method: &str, put_bytes: usize) -> Takes {
    if method == "Put" { Takes::Stream(put_bytes) } else { Takes::Message(MAX_QUESTION_BYTES) }
}

/// Translates an error of the store for a client. The result is never `NOT_FOUND`: the store reports missing blobs and
/// directories in its return values, so an error of this kind means that one of its own files is missing.
fn status(error: &io::Error) -> Status {
    let message = chain(error);
    match error.kind() {
        io::ErrorKind::InvalidInput => Status::invalid_argument(message),
        io::ErrorKind::InvalidData => Status::data_loss(message),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Status::resource_exhausted(message),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::NotConnected => {
            Status::unavailable(message)
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Status::permission_denied(message),
        _ => Status::internal(message),
    }
}

/// Parses the digest in a field of a request.
fn digest(field: &str, bytes: &[u8]) -> Result<B3Digest, Status> {
    bytes.try_into().map_err(|error| Status::invalid_argument(format!("{field}: {error}")))
}
