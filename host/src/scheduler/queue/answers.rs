use std::time::Duration;

use crate::quantity::show_size;

/// Why a build was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// It would never start.
    #[error("the build needs {needed} {resource}, but all builds together may use only {budget}")]
    Unsatisfiable {
        /// `bytes of memory`, `CPUs` or `builds`.
        resource: &'static str,
        /// What the build needs.
        needed: u64,
        /// The budget.
        budget: u64,
    },
    /// It may take more of the disk than all running builds of its client may.
    #[error(
        "the build may grow to {} on the disk, and all running builds of its client to {} together ([tenants] disk); ask for a \
         smaller scratch disk, less output and a shorter log (--scratch-size, --output-limit, --log-limit)",
        show_size(*needed), show_size(*allowed)
    )]
    Disk {
        /// Its scratch disk, outputs and log, in bytes.
        needed: u64,
        /// What the client may have.
        allowed: u64,
    },
    /// Too many builds wait already.
    #[error("the queue is full ({limit} is {bound}); try again in about {} s", retry_after.as_secs())]
    Full {
        /// The bound's name: `queued` or `queued_per_client`.
        limit: &'static str,
        /// How many builds may wait.
        bound: usize,
        /// When there is likely to be room, estimated from the durations of finished builds.
        retry_after: Duration,
    },
}

/// What a waiting build waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Waiting {
    /// The end of any running build: as many run as the budget allows.
    Builds,
    /// Memory.
    Memory,
    /// CPUs.
    Cpus,
    /// Free disk space: the daemon's is below its watermark.
    Disk,
    /// The end of a build of its client, of which as many run as may.
    Tenant {
        /// How many.
        running: u32,
    },
    /// The end of builds of its client, which may grow to so much on the disk that it must not run beside them.
    Quota {
        /// What they may grow to, in bytes.
        disk_bytes: u64,
        /// What all of them may.
        allowed_bytes: u64,
    },
    /// Its turn: it would fit, but another build comes first or has reserved the machine.
    Turn,
}

impl Waiting {
    /// All words.
    pub(crate) const WORDS: [&str; 7] = ["builds", "memory", "cpus", "disk", "tenant", "quota", "turn"];

    /// A word for machines, stable across versions.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Builds => "builds",
            Self::Memory => "memory",
            Self::Cpus => "cpus",
            Self::Disk => "disk",
            Self::Tenant { .. } => "tenant",
            Self::Quota { .. } => "quota",
            Self::Turn => "turn",
        }
    }
}
