//! Metrics and traces: counted by the scheduler, served by the daemon.

mod metrics;
mod traces;

pub(crate) use metrics::Amounts;
pub(crate) use metrics::Metrics;
pub(crate) use traces::Traces;
pub(crate) use traces::context;
