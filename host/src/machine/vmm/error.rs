//! Why a machine could not be started.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::machine::death::{Death, last_words};
use crate::machine::jail::SpawnError;

/// Why a machine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The requested machine is out of bounds.
    #[error("the machine's {field} {rule}, not {value}")]
    Machine {
        /// The field of [`Machine`](super::Config).
        field: &'static str,
        /// The rule that it breaks.
        rule: String,
        /// Its value.
        value: String,
    },
    /// One of the machine's programs doesn't start.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// One of the machine's programs ended during the start.
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
        /// The missing step, as a verb.
        what: &'static str,
        /// The time that it had, in seconds.
        seconds: u64,
    },
    /// There are too few huge pages on this host.
    #[error(
        "the machine needs {needed} huge pages, but only {available} are free; to fix it: sudo sysctl \
         vm.nr_hugepages={remedy}"
    )]
    HugePages {
        /// Pages that the machine needs.
        needed: u64,
        /// Pages that are free and not reserved.
        available: u64,
        /// A sufficient value for `vm.nr_hugepages`.
        remedy: u64,
    },
    /// The VMM's program is there, but can't run a machine.
    #[error(
        "{} can't run a machine{}; to fix it: name another file in COFFERDAM_CLOUD_HYPERVISOR, or use --vmm qemu",
        file.display(),
        last_words(said)
    )]
    Unusable {
        /// The file.
        file: PathBuf,
        /// Its last output, escaped. Empty if the cause has it already.
        said: String,
        /// The failure.
        source: Box<VmmError>,
    },
    /// The VMM's version is older than any that works.
    #[error("it is version {version}; the oldest that works is {oldest}, {reason}")]
    TooOld {
        /// The version that it reports.
        version: String,
        /// The oldest version that works.
        oldest: String,
        /// Why no older one works, as part of a sentence.
        reason: &'static str,
    },
    /// The VMM doesn't answer a call.
    #[error("{program} did not answer {call} within {} s", limit.as_secs_f64())]
    Silent {
        /// The program's name in messages.
        program: &'static str,
        /// The call.
        call: &'static str,
        /// The time that it had.
        limit: Duration,
    },
    /// The connection to the VMM's API broke.
    #[error("{program} gave no usable answer to {call}")]
    Api {
        /// The program's name in messages.
        program: &'static str,
        /// The call.
        call: &'static str,
        /// The failure.
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
        /// The answer's text, escaped.
        said: String,
    },
}
