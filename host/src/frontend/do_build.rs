//! `DoBuild`, as snix and tvix ask for it.

use cofferdam_castore::{
    PathComponent,
    proto::{Entry, EntryExt as _},
};
use cofferdam_proto::{
    EncodedRequest,
    snix::build::v1::{BuildResponse, build_service_server as snix},
    tvix::build::v1::{Build, build::OutputNeedles, build_service_server as tvix},
};
use cofferdam_rpc::{Client, MemoryPermit, Takes};
use opentelemetry::Context;
use tonic::{Request, Response, Status, async_trait};

use super::{Service, cofferdam_v1::response, status, status::MAX_LOG_TAIL_BYTES};
use crate::{
    build::failure::Failure,
    records::{Outcome, Output, Record},
    request::MAX_ENCODED_BYTES,
    scheduler::{Submission, Submitted},
    telemetry,
};

/// A request alone.
pub(super) fn takes(_method: &str) -> Takes {
    Takes::Message(MAX_ENCODED_BYTES)
}

#[async_trait]
impl snix::BuildService for Service {
    async fn do_build(&self, request: Request<EncodedRequest>) -> Result<Response<BuildResponse>, Status> {
        let (who, memory) = (who(&request)?, MemoryPermit::of(&request));
        let (_, outputs) = self.do_build(who, request.into_inner(), memory).await?;
        Ok(Response::new(response(&outputs)))
    }
}

#[async_trait]
impl tvix::BuildService for Service {
    async fn do_build(&self, request: Request<EncodedRequest>) -> Result<Response<Build>, Status> {
        let (who, memory) = (who(&request)?, MemoryPermit::of(&request));
        let encoded = request.into_inner();
        let (names, outputs) = self.do_build(who, encoded.clone(), memory.clone()).await?;
        Ok(Response::new(build(encoded, names, outputs)))
    }
}

impl Service {
    /// Waits for a build's outputs, which come with the last parts of their paths. Who is no longer there to wait drops this.
    async fn do_build(
        &self,
        (client, context): (Client, Context),
        encoded: EncodedRequest,
        memory: MemoryPermit,
    ) -> Result<(Vec<PathComponent>, Vec<Output>), Status> {
        let (request, digest) = self.decode(&client, encoded).await?;
        let names = request.outputs.iter().map(|path| name(path.as_str())).collect();
        let submission = Submission {
            client,
            request,
            digest,
            options: self.allowed.options.clone(),
            detached: false,
            rebuild: false,
            context,
            memory,
        };
        let record = match self.scheduler.submit(submission).await.map_err(|failure| status(&failure, None, b""))? {
            Submitted::Earlier(record) => *record,
            Submitted::Active(subscription) => {
                let done = subscription.done().await;
                done.map_err(|failure| status(&failure, Some(&subscription.build.id().to_string()), b""))?
                    .as_ref()
                    .clone()
            }
        };
        match record.outcome {
            Some(Outcome::Built(outputs)) => Ok((names, outputs)),
            Some(Outcome::Failed(ref failure)) => {
                Err(status(failure, Some(&record.id.to_string()), &self.log_tail(&record).await))
            }
            None => Err(status(&Failure::executor("host", "the build's end is not known"), None, b"")),
        }
    }

    /// The end of a log. One that can't be read has none; its build's failure is told all the same.
    async fn log_tail(&self, record: &Record) -> Vec<u8> {
        let (mut tail, most) = (Vec::new(), MAX_LOG_TAIL_BYTES as u64);
        if let Ok(Some(mut reader)) = self.reader(record.id, record.log.bytes.saturating_sub(most)).await {
            while let Ok(Some(bytes)) = reader.available().await {
                tail.extend_from_slice(&bytes);
            }
        }
        tail
    }
}

/// Who asks, and in which trace.
fn who<T>(request: &Request<T>) -> Result<(Client, Context), Status> {
    Ok((Client::of(request)?, telemetry::context(request.metadata())))
}

/// What tvix is answered.
fn build(encoded: EncodedRequest, names: Vec<PathComponent>, outputs: Vec<Output>) -> Build {
    let mut named: Vec<_> = names.into_iter().zip(outputs).collect();
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

/// The last part of an output's path.
fn name(path: &str) -> PathComponent {
    let last = path.rsplit('/').next().unwrap_or(path);
    PathComponent::try_from(last.as_bytes()).expect("every part of a checked path is a name")
}
