//! `tvix.build.v1`.

use std::sync::Arc;

use cofferdam_castore::{
    PathComponent,
    proto::{Entry, EntryExt as _},
};
use cofferdam_proto::{
    EncodedRequest,
    tvix::build::v1::{Build, build::OutputNeedles, build_service_server},
};
use cofferdam_rpc::Takes;
use tonic::{Request, Response, Status, async_trait};

use super::{Origin, Shared};
use crate::{
    records::Output,
    request::{MAX_ENCODED_BYTES, RelativePath},
};

/// A request alone.
pub(super) fn takes(_method: &str) -> Takes {
    Takes::Message(MAX_ENCODED_BYTES)
}

pub(super) struct BuildService(pub(super) Arc<Shared>);

#[async_trait]
impl build_service_server::BuildService for BuildService {
    async fn do_build(&self, request: Request<EncodedRequest>) -> Result<Response<Build>, Status> {
        let origin = Origin::of(&request)?;
        let encoded = request.into_inner();
        let (paths, outputs) = self.0.build_and_wait(origin, encoded.clone()).await?;
        Ok(Response::new(build(encoded, &paths, outputs)))
    }
}

/// The answer: outputs by the last parts of their paths, in the order of these names.
fn build(encoded: EncodedRequest, paths: &[RelativePath], outputs: Vec<Output>) -> Build {
    let mut named: Vec<_> = paths.iter().map(name).zip(outputs).collect();
    named.sort_by(|(one, _), (other, _)| one.cmp(other));
    let (outputs, outputs_needles) = named
        .into_iter()
        .map(|(name, output)| {
            let needles = OutputNeedles { needles: output.needles.into_iter().collect() };
            (Entry::named(name, output.node), needles)
        })
        .unzip();
    Build { build_request: Some(encoded), outputs, outputs_needles }
}

fn name(path: &RelativePath) -> PathComponent {
    let last = path.as_str().rsplit('/').next().unwrap_or(path.as_str());
    PathComponent::try_from(last.as_bytes()).expect("every part of a checked path is a name")
}
