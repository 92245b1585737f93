//! The processes that serve a guest, each confined to one device of one machine.
//!
//! ```text
//!   host process                        device process                          VMM
//!   Process::start ── SUBCOMMAND ─────▶ run ─▶ inputs / paths ─▶ serve ◀─ socket ─┘
//!     listens first, so that the VMM can connect at once
//! ```
//!
//! A new device is a module here with a [`Device`](crate::machine::Device) for the host's side and a `run` for its process,
//! and one more [`Kind`].

pub mod inputs;
pub mod paths;
mod process;
mod serve;
mod syscalls;

use std::fmt;

use clap::ValueEnum;

pub use process::StartError;
pub use serve::DeviceError;
pub use syscalls::FilterError;

/// The subcommand of this program that is [`run`].
pub const SUBCOMMAND: &str = "device";

/// Length of a virtiofs request queue, in descriptors.
const FS_QUEUE_SIZE: u32 = 512;

/// The devices that a process of this program can serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// A build's inputs.
    Inputs,
    /// Paths of the host.
    Paths,
}

impl Kind {
    /// A word for machines, stable across versions.
    pub fn code(self) -> &'static str {
        match self {
            Self::Inputs => "inputs_device",
            Self::Paths => "paths_device",
        }
    }

    /// The argument of [`SUBCOMMAND`].
    fn argument(self) -> &'static str {
        match self {
            Self::Inputs => "inputs",
            Self::Paths => "paths",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inputs => "inputs' device",
            Self::Paths => "paths' device",
        })
    }
}

/// Serves one VM, until its VMM hangs up.
///
/// To be called first thing in a process of its own, whose descriptor 3 is a vhost-user listener and whose descriptors from
/// 4 on are the device's own. No other thread may run yet, since a thread confines itself and those that it starts.
///
/// # Errors
///
/// See [`DeviceError`].
pub fn run(kind: Kind) -> Result<(), DeviceError> {
    serve::die_of_any_panic();
    match kind {
        Kind::Inputs => inputs::run(),
        Kind::Paths => paths::run(),
    }
}
