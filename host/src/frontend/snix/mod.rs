//! `snix.build.v1`.

use std::sync::Arc;

use cofferdam_proto::{
    EncodedRequest,
    snix::build::v1::{BuildResponse, build_service_server},
};
use cofferdam_rpc::Takes;
use tonic::{Request, Response, Status, async_trait};

use super::{Origin, Shared, response};
use crate::request::MAX_ENCODED_BYTES;

/// A request alone.
pub(super) fn takes(_method: &str) -> Takes {
    Takes::Message(MAX_ENCODED_BYTES)
}

pub(super) struct BuildService(pub(super) Arc<Shared>);

#[async_trait]
impl build_service_server::BuildService for BuildService {
    async fn do_build(&self, request: Request<EncodedRequest>) -> Result<Response<BuildResponse>, Status> {
        let origin = Origin::of(&request)?;
        let (_, outputs) = self.0.build_and_wait(origin, request.into_inner()).await?;
        Ok(Response::new(response(&outputs)))
    }
}
