//! Plain Nix: a connection's bytes are those of one of Nix's protocols.
//!
//! ```text
//!   nix ── ssh, or a program ──▶ cofferdam nix-daemon --stdio ── gRPC: a stream of bytes each way ──▶ NixService
//!                                cofferdam nix-store --serve                                             │ a thread
//!     Session, Serve: hello, operations ──┬─ paths: StorePaths, the store                               ◀┘
//!                                         ├─ BuildPaths ─▶ Graph, Plan ─▶ derivations, some at a time ─┐
//!                                         └─ BuildDerivation ─▶ BuildRequest ◀─────────────────────────┘
//!                                                                 └─▶ scheduler ─▶ outputs ─▶ StorePaths
//! ```
//!
//! The stream brings the client's identity, its share of connections, and flow control. The protocol is one conversation after
//! the other, so each session has a thread, which may block; [`SESSIONS`] bounds them.

mod add;
mod build;
mod building;
mod builds;
mod cache;
mod checks;
mod content;
mod fetchurl;
mod floating;
mod graph;
mod keys;
mod outputs;
mod pipe;
mod plan;
mod queries;
mod realisations;
mod realise;
mod request;
mod rewrite;
mod roots;
mod serve;
mod session;
#[cfg(test)]
mod tests;
mod upload;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    thread,
    time::Duration,
};

use cofferdam_castore::{Views, grpc::Puts};
use cofferdam_proto::cofferdam::v1::{NixBytes, nix_service_server};
use cofferdam_rpc::{Client, Clients, Takes, Turns};
use futures::{StreamExt as _, stream::BoxStream};
use tokio::{runtime::Handle, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, async_trait};

use self::{
    builds::Scheduled,
    pipe::{Inbox, Outbox},
    serve::Serve,
    session::{Session, Tenant},
};
pub(crate) use cache::{Access, Cache, Compression, TokenDigest};
pub(crate) use keys::{Keys, NamedKey};

use super::{Shared, outlet};
use crate::{store_paths::StorePaths, telemetry};

/// Sessions at a time. Each has a thread and at most a message in memory.
const SESSIONS: usize = 256;

/// Bytes of the largest piece of a client's stream.
const MAX_PIECE_BYTES: usize = 1024 * 1024;

/// The metadata with the name of the client for whom another one speaks.
pub(crate) const CLIENT_NAME: &str = "cofferdam-client";

/// What the sessions use beside the scheduler.
pub(crate) struct Nix {
    /// Clients that may speak for others.
    pub speakers: BTreeSet<Client>,
    /// Whether builds go on whose client has gone.
    pub finish_abandoned: bool,
    /// How long a client that waits for a build hears nothing at most.
    pub keep_alive: Duration,
    /// Variables that derivations with fixed outputs get if they ask for them.
    pub impure_env: BTreeMap<String, String>,
    /// Whose word is enough.
    pub keys: Keys,
    /// The paths that the clients have.
    pub paths: Arc<StorePaths>,
    /// What each client sees of their contents.
    pub views: Views,
    /// Whether it is remembered which build has the log of a derivation.
    pub keep_logs: bool,
    /// Who may bring more.
    pub puts: Puts,
}

/// What a method takes.
pub(super) fn takes(_method: &str) -> Takes {
    Takes::Stream(MAX_PIECE_BYTES)
}

pub(super) struct NixService {
    pub(super) shared: Arc<Shared>,
    pub(super) nix: Arc<Nix>,
    /// Nix has one for each build that it waits for.
    sessions: Turns,
    clients: Clients,
}

impl NixService {
    pub(super) fn new(shared: Arc<Shared>, nix: Arc<Nix>, clients: &Clients) -> Self {
        Self { shared, nix, sessions: Turns::new(SESSIONS, clients), clients: clients.clone() }
    }
}

type Answers = BoxStream<'static, Result<NixBytes, Status>>;

#[async_trait]
impl nix_service_server::NixService for NixService {
    type DaemonStream = Answers;
    type StoreStream = Answers;

    async fn daemon(&self, request: Request<Streaming<NixBytes>>) -> Result<Response<Answers>, Status> {
        let run = |Ends { tenant, builds, input, output }| Session::new(tenant, builds, input, output).run();
        self.start(request, run).await
    }

    async fn store(&self, request: Request<Streaming<NixBytes>>) -> Result<Response<Answers>, Status> {
        let run = |Ends { tenant, builds, input, output }| {
            let log = output.log();
            Serve::new(tenant, builds, input, output, log).run();
        };
        self.start(request, run).await
    }
}

/// What a session has.
struct Ends {
    tenant: Tenant,
    builds: Scheduled,
    input: Inbox,
    output: Outbox,
}

impl NixService {
    /// Whose session it is: that of the connection's client, or of one whom it may speak for.
    fn client<T>(&self, request: &Request<T>) -> Result<Client, Status> {
        let speaker = Client::of(request)?;
        let Some(name) = request.metadata().get(CLIENT_NAME) else { return Ok(speaker) };
        if !self.nix.speakers.contains(&speaker) {
            return Err(Status::permission_denied(format!(
                "{speaker} may not speak for other clients; to let it, add it to speakers in [nix] of the daemon's configuration"
            )));
        }
        let name = String::from_utf8_lossy(name.as_bytes());
        let client =
            Client::with_key(&name).map_err(|rule| Status::invalid_argument(format!("{CLIENT_NAME} {rule}")))?;
        self.clients.admit(&client)?;
        Ok(client)
    }

    /// Starts a session on a thread of its own.
    async fn start(&self, request: Request<Streaming<NixBytes>>, run: fn(Ends)) -> Result<Response<Answers>, Status> {
        let client = self.client(&request)?;
        let waited = timeout(outlet::IDLE_TIMEOUT, self.sessions.line(&client).turn()).await;
        let turn = waited.map_err(|_| Status::resource_exhausted("there are too many sessions: try again later"))?;
        let context = telemetry::context(request.metadata());
        let (outlet, stream) = outlet::outlet(outlet::IDLE_TIMEOUT);
        let (handle, gone) = (Handle::current(), CancellationToken::new());
        let tenant = Tenant::new(client.clone(), Arc::clone(&self.nix));
        let input = Inbox::new(request.into_inner(), &handle, gone.clone());
        let output = Outbox::new(outlet, handle.clone(), gone.clone());
        let (detached, keep_alive) = (self.nix.finish_abandoned, self.nix.keep_alive);
        let shared = Arc::clone(&self.shared);
        let builds = Scheduled { shared, client, context, handle, detached, keep_alive, gone };
        let started = thread::Builder::new().name("nix session".to_owned()).spawn(move || {
            let _turn = turn;
            run(Ends { tenant, builds, input, output });
        });
        started.map_err(|error| Status::unavailable(format!("can't start a thread for the session: {error}")))?;
        Ok(Response::new(stream.boxed()))
    }
}
