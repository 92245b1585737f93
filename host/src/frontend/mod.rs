//! The daemon's services: `DoBuild` for snix and tvix, and our own beside it.
//!
//! ```text
//!   snix.build.v1, tvix.build.v1 ─┐ bytes ─▶ EncodedRequest ─checked, decoded─▶ Submission ─▶ scheduler ─▶ Builder
//!   cofferdam.v1 ────────────────┘                                                    │
//!          ▲                                                                          │
//!          └──── response, events · Failure ─▶ gRPC status with details ◀─────────────┘
//! ```

mod cofferdam_v1;
mod do_build;
mod guard;
pub(crate) mod status;

use std::time::Duration;

use cofferdam_castore::B3Digest;
use cofferdam_proto::{EncodedRequest, cofferdam::v1 as cofferdam, snix::build::v1 as snix, tvix::build::v1 as tvix};
use cofferdam_rpc::{Client, Guarded, MemoryBudget, RoutesBuilder};
use tonic::Status;

pub(crate) use status::{failure as failure_of, status};

use crate::{
    build::Options,
    build::failure::Failure,
    request::{BuildRequest, RequestError},
    scheduler::Scheduler,
};

/// What the services are called, as health checks ask for them.
pub const SERVICES: [&str; 3] =
    ["cofferdam.v1.BuildService", "snix.build.v1.BuildService", "tvix.build.v1.BuildService"];

/// All build services.
#[derive(Clone)]
pub struct Service {
    scheduler: Scheduler,
    allowed: Allowed,
}

/// What builds get.
#[derive(Debug, Clone)]
pub struct Allowed {
    /// What a build gets at most, and without asking.
    pub options: Options,
    /// But for memory, which may be as much as this when it is asked for.
    pub max_memory_bytes: u64,
    /// And for shells, which there may be for so long when they are asked for.
    pub max_shell: Duration,
}

impl Service {
    /// Services that have the scheduler build what is allowed.
    pub fn new(scheduler: Scheduler, allowed: Allowed) -> Self {
        Self { scheduler, allowed }
    }

    /// Adds them to what is served.
    pub fn add_to(self, routes: &mut RoutesBuilder) {
        let (most, memory) = (cofferdam_v1::MAX_BUILD_BYTES, MemoryBudget::default());
        let snix = snix::build_service_server::BuildServiceServer::new(self.clone());
        let tvix = tvix::build_service_server::BuildServiceServer::new(self.clone());
        let ours = cofferdam::build_service_server::BuildServiceServer::new(self);
        routes
            .add_service(Guarded::new(snix.max_decoding_message_size(most), guard::limits(&memory, do_build::takes)))
            .add_service(Guarded::new(tvix.max_decoding_message_size(most), guard::limits(&memory, do_build::takes)))
            .add_service(Guarded::new(
                ours.max_decoding_message_size(most),
                guard::limits(&memory, cofferdam_v1::takes),
            ));
    }

    /// A request and its digest. Large ones take a while.
    async fn decode(&self, client: &Client, encoded: EncodedRequest) -> Result<(BuildRequest, B3Digest), Status> {
        let decode = move || BuildRequest::from_binary(encoded.as_bytes()).map(|request| (request.digest(), request));
        let decoded = tokio::task::spawn_blocking(decode).await;
        let decoded = decoded.map_err(|_| Status::internal("the server failed at this request"))?;
        let (digest, request) = decoded.map_err(|error| self.refused(client, error))?;
        Ok((request, digest))
    }

    fn refused(&self, client: &Client, error: RequestError) -> Status {
        let failure = Failure::from(error);
        self.scheduler.refused(client, &failure);
        status(&failure, None, b"")
    }
}
