use std::time::Duration;

use cofferdam_protocol::Usage;

use crate::request::BuildResult;

/// A successful build.
#[derive(Debug, Clone)]
pub(crate) struct Built {
    /// The outputs, in the request's order.
    pub result: BuildResult,
    /// What the build used inside its guest.
    pub usage: Usage,
    /// The time of each phase.
    pub times: Times,
}

/// How long each phase took.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Times {
    /// Resolving the inputs.
    pub resolve: Duration,
    /// From the VMM's start to the guest's first message.
    pub boot: Duration,
    /// From the specification to the end of the command's last process.
    pub run: Duration,
    /// Receiving, scanning and storing the outputs.
    pub ingest: Duration,
}
