//! The limits of one build: the one table of them, for flags, the configuration of daemons, the wire, and builds.
//!
//! ```text
//!   flags ───▶ Asked ──▶ wire::Limits ──▶ Limits::lowered ─┐
//!      └─────────┴─────▶ Limits::with ─────────────────────┴─▶ Limits, which `build` enforces
//!   [build] ─▶ Asked ──▶ Limits::with ──▶ the daemon's defaults, and the most of its clients
//! ```

#[macro_use]
mod define;
#[cfg(test)]
mod tests;

use std::time::Duration;

use clap::{Args, builder::TypedValueParser as _, value_parser};
use cofferdam_images::SCRATCH_TEMPLATE_BYTES;
use cofferdam_proto::cofferdam::v1 as wire;
use cofferdam_protocol::tree;
use serde::Deserialize;

use self::define::Amount;
pub(crate) use self::define::allowed;
use crate::{
    machine::vmm,
    quantity::{Count, Size, Time, size_within},
    request::RequestError,
};

/// How long a shell in a failed build may run by default.
const SHELL_TIMEOUT: Duration = Duration::from_secs(60 * 60);

const MILLISECOND: Duration = Duration::from_millis(1);

limits! {
    /// Memory that the build finds, in bytes, when its request asks for less.
    memory_bytes: u64 {
        default: 2 << 30,
        least: vmm::MIN_MEMORY_BYTES,
        most: u64::MAX,
        visible: true,
        wire: memory_bytes,
        /// Memory for the build, such as 512M or 4G [default: 2G, or the request's min_memory if that is more]
        #[arg(long, value_name = "SIZE", value_parser = memory)]
        memory: Size,
    }
    /// Virtual CPUs. This is all that a build is told about cores: its environment is exactly its request's, where a
    /// client that wants `NIX_BUILD_CORES` or the like has put it.
    cpus: u32 {
        default: 2,
        least: 1,
        most: vmm::MAX_CPUS,
        visible: true,
        wire: cpus,
        /// Virtual CPUs [default: 2]
        #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=i64::from(vmm::MAX_CPUS)).map(Count))]
        cpus: Count,
    }
    /// Size of the scratch disk, in bytes. The disk is sparse, so it costs what a build writes.
    scratch_bytes: u64 {
        default: 32 << 30,
        least: SCRATCH_TEMPLATE_BYTES,
        // The image's template reserves room to grow to this size.
        most: 1 << 40,
        visible: true,
        wire: scratch_bytes,
        /// Size of the scratch disk, such as 100G; it takes only as much of the host's disk as the build writes [default: 32G]
        #[arg(long, value_name = "SIZE", value_parser = scratch_size)]
        scratch_size: Size,
    }
    /// Wall-clock time from the VM's start to the last output.
    timeout: Duration {
        default: Duration::from_secs(60 * 60),
        least: MILLISECOND,
        most: Duration::MAX,
        visible: false,
        wire: timeout_ms,
        /// Maximum time of the build, boot included, such as 90s or 10m [default: 1h]
        #[arg(long, value_name = "DUR")]
        timeout: Time,
    }
    /// Longest time for which the command may write nothing while it runs; time that the observer takes doesn't count.
    silence: Duration {
        default: Duration::MAX,
        least: MILLISECOND,
        most: Duration::MAX,
        visible: false,
        wire: silence_ms,
        /// Maximum time without output of the command, such as 10m [default: no limit]
        #[arg(long, value_name = "DUR")]
        silence: Time,
    }
    /// Most processes and threads at a time; a guest with little memory has room for fewer.
    processes: u32 {
        default: 16_384,
        least: 1,
        most: u32::MAX,
        visible: true,
        wire: processes,
        /// Maximum number of processes and threads at a time; machines with little memory allow fewer [default: 16384]
        #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..).map(Count))]
        processes: Count,
    }
    /// Most memory for the directories of all inputs, in the host process and in the process that serves them, in bytes. It
    /// is reserved until they have been read; then what they really take is counted.
    inputs_memory_bytes: u64 {
        default: 512 << 20,
        least: 1 << 20,
        most: u64::MAX,
        visible: false,
        wire: inputs_memory_bytes,
        /// Maximum memory of the host for the directories of all inputs, about 1K for each entry with a long name [default: 512M]
        #[arg(long, value_name = "SIZE")]
        inputs_memory: Size,
    }
    /// Most bytes of stdout and stderr together.
    log_bytes: u64 {
        default: 1 << 30,
        least: 1,
        most: u64::MAX,
        visible: false,
        wire: log_bytes,
        /// Maximum size of the log, stdout and stderr together, such as 100M [default: 1G]
        #[arg(long, value_name = "SIZE")]
        log_limit: Size,
    }
    /// Most bytes in the files of all outputs together, and of what is kept of a failed build.
    output_bytes: u64 {
        default: 64 << 30,
        least: 1,
        most: u64::MAX,
        visible: false,
        wire: output_bytes,
        /// Maximum size of all files in the outputs, such as 10G [default: 64G]
        #[arg(long, value_name = "SIZE")]
        output_limit: Size,
    }
    /// Most files, directories and symlinks in all outputs together, and in what is kept of a failed build.
    output_entries: u32 {
        default: 1_000_000,
        least: 1,
        most: u32::MAX,
        visible: false,
        wire: output_entries,
        /// Maximum number of files, directories and symlinks in the outputs [default: 1000000]
        #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..).map(Count))]
        output_files: Count,
    }
}

fn memory(text: &str) -> Result<Size, String> {
    size_within(text, Limits::LEAST.memory_bytes, Limits::MOST.memory_bytes).map(Size)
}

fn scratch_size(text: &str) -> Result<Size, String> {
    size_within(text, Limits::LEAST.scratch_bytes, Limits::MOST.scratch_bytes).map(Size)
}

impl Limits {
    /// What the build may grow to on the host's disk while it runs: its scratch disk, its outputs as they arrive, and its log.
    pub(crate) fn disk_bytes(&self) -> u64 {
        self.scratch_bytes.saturating_add(self.output_bytes).saturating_add(self.log_bytes)
    }

    /// The bounds of all outputs together.
    pub(crate) fn outputs(&self) -> tree::Limits {
        tree::Limits { entries: self.output_entries.into(), bytes: self.output_bytes }
    }
}

impl Asked {
    /// How long a shell in a failed build may run, if there is one.
    pub(crate) fn shell_timeout(&self) -> Duration {
        self.shell_timeout.map_or(SHELL_TIMEOUT, Duration::from)
    }

    /// Whether a shell is asked for, and for how long.
    pub(crate) fn shell(&self) -> Option<Duration> {
        self.shell_on_failure.then(|| self.shell_timeout())
    }
}
