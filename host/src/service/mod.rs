//! The daemon's services: `DoBuild` for snix and tvix, and our own beside it.
//!
//! ```text
//!   snix.build.v1, tvix.build.v1 ─┐ bytes ─▶ EncodedRequest ─checked, decoded─▶ Order ─▶ farm ─▶ Builder
//!   cofferdam.v1 ────────────────┘                                                    │
//!          ▲                                                                          │
//!          └──── response, events · Failure ─▶ gRPC status with details ◀─────────────┘
//! ```

mod api;
mod client;
mod do_build;
pub mod farm;
mod intake;
mod metrics;
mod status;
mod traces;

use std::time::Duration;

use cofferdam_castore::{B3Digest, grpc::RoutesBuilder};
use cofferdam_proto::{EncodedRequest, cofferdam::v1 as cofferdam, snix::build::v1 as snix, tvix::build::v1 as tvix};
use tonic::Status;

pub use client::Client;
pub use farm::{Crew, Farm, FarmSettings};
use intake::Intake;
pub use intake::Paid;
pub use metrics::Metrics;
pub(crate) use status::failure as failure_of;
pub use traces::Traces;

use crate::{
    build::Options,
    failure::Failure,
    request::{BuildRequest, MAX_ENCODED_BYTES, RequestError},
};

/// What the services are called, as health checks ask for them.
pub const SERVICES: [&str; 3] =
    ["cofferdam.v1.BuildService", "snix.build.v1.BuildService", "tvix.build.v1.BuildService"];

/// Bytes of what may be around a request.
const MAX_AROUND_BYTES: usize = 64 * 1024;

/// All build services.
#[derive(Clone)]
pub struct Service {
    farm: Farm,
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
    /// Services that have the farm build what is allowed.
    pub fn new(farm: Farm, allowed: Allowed) -> Self {
        Self { farm, allowed }
    }

    /// Adds them to what is served.
    pub fn add_to(self, routes: &mut RoutesBuilder) {
        let (most, intake) = (MAX_ENCODED_BYTES + MAX_AROUND_BYTES, Intake::new());
        let snix = snix::build_service_server::BuildServiceServer::new(self.clone());
        let tvix = tvix::build_service_server::BuildServiceServer::new(self.clone());
        let ours = cofferdam::build_service_server::BuildServiceServer::new(self);
        routes
            .add_service(intake.guard(snix.max_decoding_message_size(most), 0))
            .add_service(intake.guard(tvix.max_decoding_message_size(most), 0))
            .add_service(intake.guard(ours.max_decoding_message_size(most), MAX_AROUND_BYTES));
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
        self.farm.refused(client, &failure);
        status::status(&failure, None, b"")
    }
}
