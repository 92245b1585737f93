//! The protocols by which clients have something built, one folder each.
//!
//! ```text
//!   wire ─▶ EncodedRequest ─checked, decoded─▶ Submission ─▶ scheduler ─▶ result, events, Failure ─▶ wire
//! ```
//!
//! A front end turns its wire into a [`Submission`] and an outcome into its wire. It has no rule about who may see what, no
//! queue and no limit. To add one is to add a folder and a line in [`Frontends::add_to`].

mod cofferdam_v1;
mod guard;
mod log_tail;
mod nix;
mod outlet;
mod snix;
pub(crate) mod status;
mod tvix;
mod web;

use std::{sync::Arc, time::Duration};

use cofferdam_castore::{
    B3Digest,
    proto::{Entry, EntryExt as _},
};
use cofferdam_proto::{
    EncodedRequest,
    cofferdam::v1 as cofferdam_wire,
    snix::build::v1::{self as snix_wire, BuildResponse, build_response},
    tvix::build::v1 as tvix_wire,
};
use cofferdam_rpc::{Client, Clients, Guarded, MemoryBudget, MemoryPermit, RoutesBuilder};
use opentelemetry::Context;
use tonic::{Request, Status};

pub(crate) use self::{
    nix::{Access, CLIENT_NAME, Cache, Compression, Keys, NamedKey, Nix, TokenDigest},
    web::{Door, Site, log_as_html},
};
pub(crate) use status::failure as failure_of;
use status::status;

use crate::{
    build::{Options, failure::Failure},
    network::Policies,
    records::{Outcome, Output, Record},
    request::{BuildRequest, RelativePath},
    scheduler::{Scheduler, Submission, Submitted},
    telemetry,
};

/// The services' names, as health checks ask for them.
pub(crate) const SERVICES: [&str; 4] = [
    "cofferdam.v1.BuildService",
    "cofferdam.v1.NixService",
    "snix.build.v1.BuildService",
    "tvix.build.v1.BuildService",
];

/// Most bytes of a request that is decoded in place: to hand it to another thread would take longer.
const SMALL_REQUEST_BYTES: usize = 4 * 1024;

/// What builds get.
#[derive(Debug)]
pub(crate) struct Allowed {
    /// What a build gets without asking, and the most that it gets.
    pub options: Options,
    /// The most memory that a build gets when it asks for it, in bytes.
    pub max_memory_bytes: u64,
    /// The longest time for which a shell in a failed build is offered.
    pub max_shell: Duration,
    /// Which connections builds get that ask for the network.
    pub network: Option<Policies>,
}

impl Allowed {
    /// What a client's build gets without asking.
    fn options(&self, client: &Client) -> Options {
        let network = self.network.as_ref().map(|policies| policies.grant(client));
        Options { network, ..self.options.clone() }
    }
}

/// All front ends of one scheduler.
#[derive(Clone)]
pub(crate) struct Frontends(Arc<Shared>);

/// What the front ends share.
struct Shared {
    scheduler: Scheduler,
    allowed: Allowed,
    /// Of the page, if the daemon serves one.
    door: Option<Arc<Door>>,
}

impl Frontends {
    /// Front ends that submit to this scheduler.
    pub(crate) fn new(scheduler: Scheduler, allowed: Allowed, door: Option<Arc<Door>>) -> Self {
        Self(Arc::new(Shared { scheduler, allowed, door }))
    }

    /// Adds their services to those that are served.
    pub(crate) fn add_to(self, routes: &mut RoutesBuilder, nix: Arc<Nix>, clients: &Clients) {
        let (most, memory) = (cofferdam_v1::MAX_BUILD_BYTES, MemoryBudget::default());
        let Self(shared) = self;
        let snix = snix::BuildService(Arc::clone(&shared));
        let tvix = tvix::BuildService(Arc::clone(&shared));
        let nix = nix::NixService::new(Arc::clone(&shared), nix, clients);
        let cofferdam = cofferdam_v1::BuildService(shared);
        let snix = snix_wire::build_service_server::BuildServiceServer::new(snix);
        let tvix = tvix_wire::build_service_server::BuildServiceServer::new(tvix);
        let nix = cofferdam_wire::nix_service_server::NixServiceServer::new(nix);
        let cofferdam = cofferdam_wire::build_service_server::BuildServiceServer::new(cofferdam);
        routes
            .add_service(Guarded::new(nix, guard::limits(&MemoryBudget::default(), nix::takes)))
            .add_service(Guarded::new(snix.max_decoding_message_size(most), guard::limits(&memory, snix::takes)))
            .add_service(Guarded::new(tvix.max_decoding_message_size(most), guard::limits(&memory, tvix::takes)))
            .add_service(Guarded::new(
                cofferdam.max_decoding_message_size(most),
                guard::limits(&memory, cofferdam_v1::takes),
            ));
    }
}

/// Whom a request comes from, in which trace, and the memory that it takes.
struct Origin {
    client: Client,
    context: Context,
    memory: MemoryPermit,
}

/// A request that keeps every rule.
struct Decoded {
    request: BuildRequest,
    digest: B3Digest,
}

impl Origin {
    fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        let (client, context) = (Client::of(request)?, telemetry::context(request.metadata()));
        Ok(Self { client, context, memory: MemoryPermit::of(request) })
    }

    /// The submission of a request with these options, which asks for nothing else.
    fn submits(self, Decoded { request, digest }: Decoded, options: Options) -> Submission {
        let Self { client, context, memory } = self;
        let (detached, rebuild, compare_with) = (false, false, None);
        Submission { client, request, digest, options, detached, rebuild, compare_with, context, memory }
    }
}

impl Shared {
    /// Checks and decodes a request.
    async fn decode(&self, client: &Client, encoded: EncodedRequest) -> Result<Decoded, Failure> {
        let is_small = encoded.as_bytes().len() <= SMALL_REQUEST_BYTES;
        let decode = move || {
            BuildRequest::from_binary(encoded.as_bytes()).map(|request| Decoded { digest: request.digest(), request })
        };
        let decoded = if is_small { decode() } else { self.scheduler.work(client, decode).await? };
        decoded.map_err(|error| self.refused(client, error))
    }

    fn refused(&self, client: &Client, error: impl Into<Failure>) -> Failure {
        let failure = error.into();
        self.scheduler.refused(client, &failure);
        failure
    }

    /// Submits a request and waits for its outputs, which come with their paths, in the request's order. The build is
    /// cancelled when this is dropped and no other client waits for it.
    async fn build_and_wait(
        &self,
        origin: Origin,
        encoded: EncodedRequest,
    ) -> Result<(Vec<RelativePath>, Vec<Output>), Status> {
        let refused = |failure| status(&failure, None, b"");
        let client = origin.client.clone();
        let decoded = self.decode(&client, encoded).await.map_err(refused)?;
        let paths = decoded.request.outputs.clone();
        let submission = origin.submits(decoded, self.allowed.options(&client));
        let record = match self.scheduler.submit(submission).await.map_err(refused)? {
            Submitted::Earlier { record, .. } => *record,
            Submitted::Active(subscription) => {
                let done = subscription.done().await;
                let id = || subscription.build.id().to_string();
                Record::clone(&*done.map_err(|failure| status(&failure, Some(&id()), b""))?)
            }
        };
        Ok((paths, self.outputs(&client, record).await?))
    }

    async fn outputs(&self, client: &Client, record: Record) -> Result<Vec<Output>, Status> {
        let id = record.id.to_string();
        match record.outcome {
            Some(Outcome::Built(outputs)) => Ok(outputs),
            Some(Outcome::Failed(ref failure)) => {
                let tail = log_tail::read(&self.scheduler, client, &record).await;
                Err(status(failure, Some(&id), &tail))
            }
            None => Err(status(&Failure::executor("host", "the build's end is not known"), Some(&id), b"")),
        }
    }
}

/// Outputs as snix is answered.
fn response(outputs: &[Output]) -> BuildResponse {
    let output = |output: &Output| build_response::Output {
        output: Some(Entry::unnamed(output.node.clone())),
        needles: output.needles.iter().copied().collect(),
    };
    BuildResponse { outputs: outputs.iter().map(output).collect() }
}
