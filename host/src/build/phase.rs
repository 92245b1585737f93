//! Where a build is.

use serde::{Deserialize, Serialize};

/// Where a build is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    /// Waiting in the queue.
    Queued,
    /// Reading the closure of the inputs.
    Resolving,
    /// From the VMM's start to the guest's first message.
    Booting,
    /// From the specification to the command's end.
    Running,
    /// From the command's end to the last output.
    Ingesting,
    /// From the build's failure until its remains are kept.
    Keeping,
    /// While a shell runs in the guest of a failed build.
    Shell,
}

impl Phase {
    /// A word for machines, stable across versions.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Resolving => "resolving",
            Self::Booting => "booting",
            Self::Running => "running",
            Self::Ingesting => "ingesting",
            Self::Keeping => "keeping",
            Self::Shell => "shell",
        }
    }

    /// When something happened, as the end of a sentence.
    pub(super) fn when(self) -> &'static str {
        match self {
            Self::Queued => "while the build waited",
            Self::Resolving => "while the inputs were resolved",
            Self::Booting => "while the guest booted",
            Self::Running => "while the command ran",
            Self::Ingesting => "while the outputs were ingested",
            Self::Keeping => "while what it left was kept",
            Self::Shell => "while a shell ran",
        }
    }
}
