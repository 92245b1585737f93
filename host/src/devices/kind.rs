//! The devices that a process of this program can serve.

use std::fmt;

use clap::ValueEnum;

/// The subcommand of this program that serves a device.
pub const SUBCOMMAND: &str = "device";

/// Length of a virtiofs request queue, in descriptors.
pub(super) const FS_QUEUE_SIZE: u32 = 512;

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
    pub(super) fn argument(self) -> &'static str {
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
