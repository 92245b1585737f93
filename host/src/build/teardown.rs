use cofferdam_castore::blobservice::Lease;

use crate::machine::Machine;

/// The machine of a build that has its result. Dropping it kills the machine's processes.
#[derive(Debug)]
#[must_use]
pub(crate) struct Teardown {
    pub(super) machine: Machine,
    /// Keeps the inputs in the store.
    pub(super) _lease: Lease,
}

impl Teardown {
    /// Ends the machine, and waits until nothing of it is left.
    pub(crate) async fn finish(self) {
        self.machine.finish().await;
    }
}
