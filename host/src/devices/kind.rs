//! The devices that a process of this program can serve.

use std::fmt;

use clap::ValueEnum;

/// The subcommand of this program that serves a device.
pub const SUBCOMMAND: &str = "device";

/// The argument of a network device whose VMM enables its rings before it has agreed on features, as QEMU does.
pub const ENABLED_EARLY: &str = "--enabled-early";

/// Length of a virtiofs request queue, in descriptors.
pub(super) const FS_QUEUE_SIZE: u32 = 512;

/// The devices that a process of this program can serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// A build's inputs.
    Inputs,
    /// Paths of the host.
    Paths,
    /// Opens the paths of the host for their device.
    #[value(name = "paths-opener")]
    PathsOpener,
    /// The network.
    #[value(name = "net")]
    Network,
}

impl Kind {
    /// A word for machines, stable across versions.
    pub fn code(self) -> &'static str {
        match self {
            Self::Inputs => "inputs_device",
            Self::Paths => "paths_device",
            Self::PathsOpener => "paths_opener",
            Self::Network => "network_device",
        }
    }

    /// The argument of [`SUBCOMMAND`].
    pub(super) fn argument(self) -> &'static str {
        match self {
            Self::Inputs => "inputs",
            Self::Paths => "paths",
            Self::PathsOpener => "paths-opener",
            Self::Network => "net",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inputs => "inputs' device",
            Self::Paths => "paths' device",
            Self::PathsOpener => "paths' opener",
            Self::Network => "network device",
        })
    }
}
