//! What a machine's cgroup bounds.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};

use super::named;

/// Length of the kernel's period for `cpu.max`, in microseconds.
const CPU_PERIOD_US: u64 = 100_000;

/// The part of a host that each machine may use, where its helpers have a cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shares {
    /// Weight of its processor time beside that of other machines and of the daemon, from 1 to 10,000.
    pub cpu_weight: u32,
    /// Its processor time at most, in percent of what its build's CPUs have.
    pub cpu_percent: u32,
    /// Its processes and threads at most.
    pub processes: u32,
    /// Weight of its disk accesses, from 1 to 10,000. The kernel heeds it if the disk's scheduler does.
    pub io_weight: u32,
    /// How fast it may use the disk; nothing is as fast as it can.
    pub disk_rates: Option<DiskRates>,
}

impl Default for Shares {
    fn default() -> Self {
        Self { cpu_weight: 100, cpu_percent: 150, processes: 4096, io_weight: 100, disk_rates: None }
    }
}

/// How fast a machine may use the disk, in bytes a second.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskRates {
    /// A path on it.
    pub path: PathBuf,
    /// Reading.
    pub read: Option<u64>,
    /// Writing.
    pub write: Option<u64>,
}

impl DiskRates {
    /// The whole disk, as `MAJOR:MINOR`: the kernel bounds no partitions.
    pub(super) fn disk(&self) -> io::Result<String> {
        // It may be made later.
        let there = self.path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        let device = fs::metadata(there)?.dev();
        let device = format!("{}:{}", major(device), minor(device));
        let known = Path::new("/sys/dev/block").join(&device);
        let known = known.canonicalize().map_err(|error| named(&known, &error))?;
        match known.parent() {
            Some(disk) if known.join("partition").exists() => {
                Ok(fs::read_to_string(disk.join("dev"))?.trim_end().to_owned())
            }
            _ => Ok(device),
        }
    }
}

/// A file of a cgroup, and its value.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Limit {
    pub(super) controller: &'static str,
    file: &'static str,
    value: String,
    /// Whether kernels without this file have nothing to bound.
    is_optional: bool,
}

impl Limit {
    pub(super) fn set(&self, cgroup: &Path) -> io::Result<()> {
        let path = cgroup.join(self.file);
        match fs::OpenOptions::new().write(true).open(&path) {
            Err(error) if self.is_optional && error.kind() == io::ErrorKind::NotFound => Ok(()),
            opened => {
                let written = opened.and_then(|mut file| io::Write::write_all(&mut file, self.value.as_bytes()));
                written.map_err(|error| named(&path, &error))
            }
        }
    }
}

impl Shares {
    /// For a machine of so much memory, in bytes, whose build has so many CPUs.
    pub(super) fn limits(&self, memory_bytes: u64, cpus: u32, disk: Option<&str>) -> Vec<Limit> {
        let needed = |controller, file, value| Limit { controller, file, value, is_optional: false };
        let optional = |controller, file, value| Limit { controller, file, value, is_optional: true };
        let cpu_us = u64::from(cpus) * u64::from(self.cpu_percent) * CPU_PERIOD_US / 100;
        let mut limits = vec![
            needed("memory", "memory.max", memory_bytes.to_string()),
            optional("memory", "memory.swap.max", "0".to_owned()),
            needed("memory", "memory.oom.group", "1".to_owned()),
            needed("pids", "pids.max", self.processes.to_string()),
            needed("cpu", "cpu.weight", self.cpu_weight.to_string()),
            needed("cpu", "cpu.max", format!("{cpu_us} {CPU_PERIOD_US}")),
            optional("io", "io.weight", format!("default {}", self.io_weight)),
        ];
        if let (Some(rates), Some(disk)) = (&self.disk_rates, disk) {
            let rate = |rate: Option<u64>| rate.map_or("max".to_owned(), |rate| rate.to_string());
            let value = format!("{disk} rbps={} wbps={}", rate(rates.read), rate(rates.write));
            limits.push(needed("io", "io.max", value));
        }
        limits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_share_becomes_a_limit() {
        let rates = DiskRates { path: "/".into(), read: Some(5), write: None };
        let shares = Shares { cpu_weight: 7, cpu_percent: 50, processes: 9, io_weight: 3, disk_rates: Some(rates) };
        let limits = shares.limits(1 << 30, 4, Some("8:0"));
        let limits: Vec<_> = limits.iter().map(|limit| (limit.file, &*limit.value)).collect();
        assert_eq!(
            limits,
            [
                ("memory.max", "1073741824"),
                ("memory.swap.max", "0"),
                ("memory.oom.group", "1"),
                ("pids.max", "9"),
                ("cpu.weight", "7"),
                ("cpu.max", "200000 100000"),
                ("io.weight", "default 3"),
                ("io.max", "8:0 rbps=5 wbps=max"),
            ]
        );
    }

    #[test]
    fn a_file_that_a_kernel_lacks_is_left_out_only_if_nothing_is_lost() {
        let directory = tempfile::tempdir().unwrap();
        let limit = |is_optional| Limit { controller: "memory", file: "x", value: "1".to_owned(), is_optional };
        limit(true).set(directory.path()).unwrap();
        assert!(limit(false).set(directory.path()).unwrap_err().to_string().contains("/x: "));
        fs::write(directory.path().join("x"), "").unwrap();
        limit(false).set(directory.path()).unwrap();
        assert_eq!(fs::read_to_string(directory.path().join("x")).unwrap(), "1");
    }

    #[test]
    fn the_disk_of_a_path_is_a_whole_one() {
        let rates = |path: &str| DiskRates { path: path.into(), read: None, write: None };
        assert!(rates("/proc").disk().unwrap_err().to_string().contains("/sys/dev/block/0:"));
        if let Ok(disk) = rates("/").disk() {
            assert!(!Path::new("/sys/dev/block").join(disk).join("partition").exists());
        }
    }
}
