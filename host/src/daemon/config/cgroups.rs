//! The table `[cgroups]`: what each machine may use of the host, where it has a cgroup.

use std::path::Path;

use serde::Deserialize;

use super::values::{Percent, Processes, Weight};
use crate::{
    machine::jail::{DiskRates, Shares},
    quantity::Size,
};

/// What each machine may use of the host, where it has a cgroup.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(in crate::daemon) struct CgroupsConfig {
    /// The daemon refuses to start without.
    pub(in crate::daemon) require: bool,
    cpu_weight: Option<Weight>,
    /// In percent of what its build's CPUs have.
    cpu_percent: Option<Percent>,
    processes: Option<Processes>,
    io_weight: Option<Weight>,
    /// Bytes a second.
    read_rate: Option<Size>,
    write_rate: Option<Size>,
}

impl CgroupsConfig {
    /// `path` is on the disk that machines use.
    pub(in crate::daemon) fn shares(&self, path: &Path) -> Shares {
        let defaults = Shares::default();
        let (read, write) = (self.read_rate.map(u64::from), self.write_rate.map(u64::from));
        let rates = DiskRates { path: path.to_owned(), read, write };
        Shares {
            cpu_weight: self.cpu_weight.map_or(defaults.cpu_weight, |Weight(weight)| weight),
            cpu_percent: self.cpu_percent.map_or(defaults.cpu_percent, |Percent(percent)| percent),
            processes: self.processes.map_or(defaults.processes, |Processes(processes)| processes),
            io_weight: self.io_weight.map_or(defaults.io_weight, |Weight(weight)| weight),
            disk_rates: read.or(write).map(|_| rates),
        }
    }

    /// The settings that need a controller which not every delegated cgroup has, with its name.
    pub(in crate::daemon) fn controllers(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let set = [
            self.cpu_weight.map(|_| ("cpu_weight", "cpu")),
            self.cpu_percent.map(|_| ("cpu_percent", "cpu")),
            self.io_weight.map(|_| ("io_weight", "io")),
        ];
        set.into_iter().flatten()
    }
}
