use cofferdam_castore::{B3Digest, Node};
use cofferdam_rpc::{Client, MemoryPermit};
use opentelemetry::Context;

use super::{Subscription, queue::Need};
use crate::{
    build::{Builder, Options},
    records::{BuildId, Record},
    request::{Admitted, BuildRequest, RequestError},
};

/// A client's submission of a build.
#[derive(Debug)]
pub(crate) struct Submission<R = BuildRequest> {
    /// The client.
    pub client: Client,
    /// What to build.
    pub request: R,
    /// The request's digest.
    pub digest: B3Digest,
    /// The build's resources and limits.
    pub options: Options,
    /// Whether it goes on without subscriptions.
    pub detached: bool,
    /// Whether it runs even if an equal one has succeeded.
    pub rebuild: bool,
    /// An earlier build, whose outputs it must make again.
    pub compare_with: Option<BuildId>,
    /// The client's trace.
    pub context: Context,
    /// The permit for the request's memory.
    pub memory: MemoryPermit,
}

impl Submission {
    /// The same submission, if the builder can build its request.
    pub(super) fn admitted_by(self, builder: &Builder) -> Result<Submission<Admitted>, RequestError> {
        let Self { client, request, digest, options, detached, rebuild, compare_with, context, memory } = self;
        let request = builder.admit(request)?;
        Ok(Submission { client, request, digest, options, detached, rebuild, compare_with, context, memory })
    }
}

impl Submission<Admitted> {
    /// The nodes of its inputs.
    pub(super) fn inputs(&self) -> Vec<Node> {
        self.request.inputs.values().cloned().collect()
    }

    /// The build's share of the budget until its inputs have been read.
    pub(super) fn need(&self, builder: &Builder) -> Need {
        let limits = &self.options.limits;
        Need {
            memory_bytes: builder.memory_bytes(&self.request, &self.options),
            cpus: limits.cpus,
            disk_bytes: limits.disk_bytes(),
        }
    }
}

/// The answer to a submission.
#[derive(Debug)]
pub(crate) enum Submitted {
    /// A build to wait for.
    Active(Subscription),
    /// An equal build has succeeded before, and its outputs are in the store.
    Earlier {
        /// Its record, with the outputs in the submission's order.
        record: Box<Record>,
        /// Whether the client may see this build.
        is_visible: bool,
    },
}
