//! A cloud-hypervisor process that runs a machine: its API, for an orderly end, and its events.

use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use super::api::Api;
use super::error::VmmError;
use super::events::Events;

/// Time limit for a question that needs no work.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(1);

/// A VMM's API and its events.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) api: Api,
    pub(super) events: Events,
}

/// The useful part of the answer to `vm.info`.
#[derive(Debug, Deserialize)]
struct Info {
    state: String,
    memory_actual_size: u64,
}

impl Control {
    /// Ends the machine and then the process, and logs their counters.
    pub(super) async fn end(&mut self) -> Result<(), VmmError> {
        let Info { state, memory_actual_size } = self.api.get("vm.info", QUESTION_TIMEOUT).await?;
        let counters: Value = self.api.get("vm.counters", QUESTION_TIMEOUT).await?;
        tracing::debug!(state, memory_bytes = memory_actual_size, %counters, "the machine at its end");
        self.api.put("vm.shutdown", None).await?;
        self.api.put("vm.delete", None).await?;
        self.api.put("vmm.shutdown", None).await
    }
}
