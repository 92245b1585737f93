//! Why a machine could not be started.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::machine::death::{Death, last_words};
use crate::machine::jail::SpawnError;

/// Why a machine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The machine asked for is out of bounds.
    #[error("the machine's {field} {rule}, not {value}")]
    Machine {
        /// The field of [`Machine`](super::Config).
        field: &'static str,
        /// What holds for it.
        rule: String,
        /// Its value.
        value: String,
    },
    /// One of its programs doesn't start.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// One of its programs ended at once.
    #[error("the machine ended while it was started: {0}")]
    Died(Death),
    /// A socket in the run directory can't be made or reached.
    #[error("cannot use the socket {name} in the run directory")]
    Socket {
        /// Its name.
        name: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// A program was not ready in time.
    #[error("{program} did not {what} within {seconds} s")]
    Timeout {
        /// The program's name in messages.
        program: &'static str,
        /// The step that it did not take.
        what: &'static str,
        /// How long it was waited for.
        seconds: u64,
    },
    /// There are too few huge pages on this host.
    #[error(
        "the machine needs {needed} huge pages, but only {available} are free; to fix it: sudo sysctl \
         vm.nr_hugepages={remedy}"
    )]
    HugePages {
        /// Pages that it takes.
        needed: u64,
        /// Pages that are free and promised to nobody.
        available: u64,
        /// The setting with which they suffice.
        remedy: u64,
    },
    /// The VMM has a file, and that runs no machine.
    #[error(
        "{} runs no machine{}; to mend it: name another file in COFFERDAM_CLOUD_HYPERVISOR, or use --vmm qemu",
        file.display(),
        last_words(said)
    )]
    Unusable {
        /// The file.
        file: PathBuf,
        /// The last that it said where the cause doesn't tell, escaped.
        said: String,
        /// The failure.
        source: Box<VmmError>,
    },
    /// The VMM's version is older than any that works.
    #[error("it is version {version}; the oldest that works is {oldest}, {reason}")]
    TooOld {
        /// The version that it reports.
        version: String,
        /// The oldest one.
        oldest: String,
        /// Why.
        reason: &'static str,
    },
    /// The VMM doesn't answer a call.
    #[error("{program} gave no answer to {call} within {} s", limit.as_secs_f64())]
    Silent {
        /// The program's name in messages.
        program: &'static str,
        /// The call.
        call: &'static str,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The connection to the VMM's API broke.
    #[error("{program} gave no usable answer to {call}")]
    Api {
        /// The program's name in messages.
        program: &'static str,
        /// The call.
        call: &'static str,
        /// What went wrong.
        source: io::Error,
    },
    /// The VMM refused a call.
    #[error("{program} refused {call} (HTTP status {status}): {said}")]
    Refused {
        /// The program's name in messages.
        program: &'static str,
        /// The call.
        call: &'static str,
        /// The HTTP status.
        status: u16,
        /// Its words, escaped.
        said: String,
    },
}
