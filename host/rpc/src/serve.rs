//! Services on listeners.
//!
//! ```text
//!   shutdown ─▶ no new connections, no new requests ─ drain ─▶ open requests are refused ─ CLOSE ─▶ connections are cut
//! ```

use std::time::Duration;

use futures::future::try_join_all;
use tokio_util::sync::CancellationToken;
use tonic::{Status, service::RoutesBuilder, transport::Server};
use tonic_health::ServingStatus;

use crate::{Clients, Guarded, Limits, Listener, MAX_QUESTION_BYTES, MemoryBudget, STREAM_WINDOW_BYTES, Takes};

/// Requests that one connection may have open.
const MAX_CONNECTION_REQUESTS: u32 = 128;

/// No stream is ever held back for the sake of another one.
const CONNECTION_WINDOW_BYTES: u32 = MAX_CONNECTION_REQUESTS * STREAM_WINDOW_BYTES;

/// How often, and how long, an HTTP/2 ping finds out that a client is gone.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// Age at which a connection takes no more requests. Open requests go on, and clients connect again: so no idle client keeps
/// others out for ever.
const MAX_CONNECTION_AGE: Duration = Duration::from_secs(60 * 60);

/// How long connections may take to close when all requests have ended.
const CLOSE: Duration = Duration::from_secs(5);

/// How to serve.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// How long a client may be silent, or not take what it asked for, before its request is given up.
    pub idle_timeout: Duration,
    /// How long a request may take from when its client is first waited for, beside a second for every 64 KiB that the
    /// client sends or takes.
    pub request_timeout: Duration,
    /// How long open requests may go on after the shutdown has begun.
    pub drain: Duration,
    /// Memory for messages while they arrive.
    pub memory: MemoryBudget,
    /// Who is let in.
    pub clients: Clients,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_secs(600),
            request_timeout: Duration::from_secs(4 * 60 * 60),
            drain: Duration::from_secs(10),
            memory: MemoryBudget::default(),
            clients: Clients::default(),
        }
    }
}

impl ServeOptions {
    /// The limits of a service whose methods take this.
    pub fn limits(&self, takes: fn(method: &str) -> Takes) -> Limits {
        Limits { memory: self.memory.clone(), takes, arrival_timeout: self.idle_timeout, status: Status::from }
    }
}

/// Why serving ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A listener failed, or its certificate or key can't be used.
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

/// Serves `routes` on every listener until `shutdown`, and beside them the health of each of `services` and reflection from
/// `descriptor_sets` (encoded `FileDescriptorSet`s).
///
/// After `shutdown` the services are reported as not serving. `stop` is cancelled when open requests have had
/// [`ServeOptions::drain`] to end.
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
    let reflection = || {
        descriptor_sets.iter().fold(
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET),
            |builder, set| builder.register_encoded_file_descriptor_set(set),
        )
    };
    let current = reflection().build_v1().map_err(ServeError::Reflection)?;
    let older = reflection().build_v1alpha().map_err(ServeError::Reflection)?;
    let (question, questions) =
        (options.limits(|_| Takes::Message(MAX_QUESTION_BYTES)), options.limits(|_| Takes::Stream(MAX_QUESTION_BYTES)));
    routes
        .add_service(Guarded::new(health, question))
        .add_service(Guarded::new(current, questions.clone()))
        .add_service(Guarded::new(older, questions));
    let routes = routes.routes();

    let serve = |listener: Listener| listener.serve(routes.clone(), options.clients.clone(), shutdown.clone());
    let serving = try_join_all(listeners.into_iter().map(serve));
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
pub(crate) fn limited_server() -> Server {
    Server::builder()
        .max_concurrent_streams(MAX_CONNECTION_REQUESTS)
        .max_connection_age(MAX_CONNECTION_AGE)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
}
