//! A store for others.
//!
//! ```text
//!   shutdown ─▶ no new connections, no new requests ─ DRAIN ─▶ what still runs is refused ─▶ all connections are closed
//! ```

mod blobs;
mod directories;
mod gate;
mod intake;
mod listener;
mod mount;
mod share;
mod work;

use std::{io, time::Duration};

use cofferdam_proto::CASTORE_DESCRIPTOR_SET;
use futures::future::try_join_all;
use tokio_util::sync::CancellationToken;
use tonic::{Status, service::RoutesBuilder, transport::Server};
use tonic_health::ServingStatus;

pub use gate::{Gate, Gated};
pub use intake::Intake;
pub use listener::{Listener, Tls};
pub(super) use mount::{TvixBlobs, TvixDirectories};
pub use share::{Shares, Short, Turn};

use super::{MAX_BLOB_BYTES, MAX_MESSAGE_BYTES, STREAM_WINDOW_BYTES, chain};
use crate::{
    B3Digest, Store,
    directory::MAX_DIRECTORY_BYTES,
    proto::{blob_service_server::BlobServiceServer, directory_service_server::DirectoryServiceServer},
};
use blobs::Blobs;
use directories::Directories;
use intake::{MAX_QUESTION_BYTES, Takes};
use work::Work;

/// What castore's services are called, as health checks ask for them.
pub const SERVICES: [&str; 4] = [
    "snix.castore.v1.BlobService",
    "snix.castore.v1.DirectoryService",
    "tvix.castore.v1.BlobService",
    "tvix.castore.v1.DirectoryService",
];

/// Requests that one connection may have open.
const MAX_CONNECTION_REQUESTS: u32 = 128;

/// No stream is ever held back for the sake of another one.
const CONNECTION_WINDOW_BYTES: u32 = MAX_CONNECTION_REQUESTS * STREAM_WINDOW_BYTES;

/// How often, and how long, an HTTP/2 ping finds out that a client is gone.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// Age at which a connection takes no more requests; those that are open go on, and clients connect again. So none that is
/// idle keeps others out for ever.
const MAX_CONNECTION_AGE: Duration = Duration::from_secs(60 * 60);

/// How long connections may take to close when all requests have ended.
const CLOSE: Duration = Duration::from_secs(5);

/// How to serve.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// How long a client may be silent, or not take what it asked for, before its request is given up.
    pub idle_timeout: Duration,
    /// How long a request may take from when its client is waited for first, beside a second for every 64 KiB that the
    /// client sends or takes.
    pub request_timeout: Duration,
    /// How long open requests may go on after the shutdown has begun.
    pub drain: Duration,
    /// Bytes of the largest blob that is taken.
    pub max_blob_bytes: u64,
    /// What pays for the bytes of messages that arrive.
    pub intake: Intake,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_secs(600),
            request_timeout: Duration::from_secs(4 * 60 * 60),
            drain: Duration::from_secs(10),
            max_blob_bytes: MAX_BLOB_BYTES,
            intake: Intake::default(),
        }
    }
}

/// Why serving ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A listener failed, or its certificate or key is none.
    #[error("can't serve on {listener}")]
    Listener {
        /// Which one.
        listener: String,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
    /// The services can't be described.
    #[error("can't describe the services for reflection")]
    Reflection(#[source] tonic_reflection::server::Error),
}

/// Serves a store, health and reflection on these listeners until `shutdown`.
///
/// What a client has put is durable before it is told so.
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
    add_services(&mut routes, store, options, stop.clone());
    serve_routes(routes, &SERVICES, &[CASTORE_DESCRIPTOR_SET], listeners, options, shutdown, stop).await
}

/// Adds castore's services under both names. They give up what they are doing when `stop` is cancelled.
pub fn add_services(routes: &mut RoutesBuilder, store: &Store, options: &ServeOptions, stop: CancellationToken) {
    let (blobs, directories) = services(store, options, stop);
    routes
        .add_service(TvixBlobs(blobs.clone()))
        .add_service(TvixDirectories(directories.clone()))
        .add_service(blobs)
        .add_service(directories);
}

pub(super) fn services(
    store: &Store,
    options: &ServeOptions,
    stop: CancellationToken,
) -> (Gated<BlobServiceServer<Blobs>>, Gated<DirectoryServiceServer<Directories>>) {
    let work = Work::new(options, stop);
    let blobs = Blobs { blobs: store.blobs.clone(), work: work.clone(), max_blob_bytes: options.max_blob_bytes };
    let directories = Directories::new(store.clone(), work);
    let blobs = BlobServiceServer::new(blobs).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let directories = DirectoryServiceServer::new(directories).max_decoding_message_size(MAX_DIRECTORY_BYTES);
    (
        options.intake.guard(blobs, |path| takes(path, MAX_MESSAGE_BYTES), options.idle_timeout),
        options.intake.guard(directories, |path| takes(path, MAX_DIRECTORY_BYTES), options.idle_timeout),
    )
}

/// What castore's method of this path takes; put takes messages of `largest` bytes.
fn takes(path: &str, largest: usize) -> Takes {
    if path.ends_with("/Put") { Takes::Stream(largest) } else { Takes::One(MAX_QUESTION_BYTES) }
}

/// Serves these services, and beside them health for each of `services` and reflection from `descriptor_sets`, on every
/// listener until `shutdown`. Whoever watches the health of one is told so then. Cancels `stop` when the open requests have
/// had [`ServeOptions::drain`] to end.
///
/// # Errors
///
/// See [`ServeError`].
pub async fn serve_routes(
    mut routes: RoutesBuilder,
    services: &[&str],
    descriptor_sets: &[&[u8]],
    listeners: Vec<Listener>,
    options: &ServeOptions,
    shutdown: CancellationToken,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let (reporter, health) = tonic_health::server::health_reporter();
    for service in services {
        reporter.set_service_status(*service, ServingStatus::Serving).await;
    }
    let question = |_: &str| Takes::One(MAX_QUESTION_BYTES);
    routes.add_service(options.intake.guard(health, question, options.idle_timeout));
    let questions = |_: &str| Takes::Stream(MAX_QUESTION_BYTES);
    let reflection = || {
        descriptor_sets.iter().fold(
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET),
            |builder, set| builder.register_encoded_file_descriptor_set(set),
        )
    };
    let current = reflection().build_v1().map_err(ServeError::Reflection)?;
    let older = reflection().build_v1alpha().map_err(ServeError::Reflection)?;
    routes
        .add_service(options.intake.guard(current, questions, options.idle_timeout))
        .add_service(options.intake.guard(older, questions, options.idle_timeout));
    let routes = routes.routes();

    let serving = try_join_all(listeners.into_iter().map(|listener| listener.serve(routes.clone(), shutdown.clone())));
    let end = async {
        shutdown.cancelled().await;
        for service in services {
            reporter.set_service_status(*service, ServingStatus::NotServing).await;
        }
        tokio::time::sleep(options.drain).await;
        stop.cancel();
        tokio::time::sleep(CLOSE).await;
    };
    tokio::select! {
        served = serving => served.map(drop),
        () = end => Ok(()),
    }
}

/// A server that takes nothing without a limit.
fn limited_server() -> Server {
    Server::builder()
        .max_concurrent_streams(MAX_CONNECTION_REQUESTS)
        .max_connection_age(MAX_CONNECTION_AGE)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
}

/// What a client is told of an error of the store's. Never that something is not found: the store says that in another
/// way, and a file that it lacks is no blob that it lacks.
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

/// The digest in a request's field.
fn digest(field: &str, bytes: &[u8]) -> Result<B3Digest, Status> {
    bytes.try_into().map_err(|error| Status::invalid_argument(format!("{field}: {error}")))
}
