//! The processor's priorities of this process's threads.
//!
//! Work for clients and for the disk gives way to builds. So the calls of one client take little of the processor time that the
//! builds of others need. On an idle host it is as fast as anything else.

use std::io;

use rustix::process::{getpriority_process, setpriority_process};

/// How much work gives way to builds, as `nice` counts it: its threads have a tenth of the weight of theirs.
const NICENESS: i32 = 10;

/// The priority of threads that give way to builds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GivesWay(i32);

impl GivesWay {
    /// Of threads that give way to the calling one.
    ///
    /// # Errors
    ///
    /// The system doesn't tell the priority of this thread.
    pub(crate) fn to_this_thread() -> io::Result<Self> {
        Ok(Self(getpriority_process(None)? + NICENESS))
    }

    /// Gives this priority to the calling thread, and to those that it starts.
    pub(crate) fn begin(self) {
        if let Err(error) = setpriority_process(None, self.0) {
            tracing::warn!(%error, "a thread can't give way to builds");
        }
    }
}
