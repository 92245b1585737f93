//! The build's cgroup: limits and counts its memory and processes, and kills them.

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use cofferdam_protocol::{Step, Usage};

use crate::error::{Context as _, SetupError};

const HIERARCHY: &str = "/sys/fs/cgroup";

/// Memory reserved for guest-init and the kernel, so that the OOM killer finds only the build.
const RESERVE_BYTES: u64 = 24 * 1024 * 1024;

/// The build's share of the kernel's maximum number of threads, in quarters.
const THREAD_QUARTERS: u64 = 3;

/// The cgroup of the command and its descendants.
#[derive(Debug)]
pub(crate) struct Cgroup {
    directory: PathBuf,
    /// Limit on processes and threads at a time.
    processes: u32,
}

impl Cgroup {
    /// Makes the cgroup. Its memory limit follows from the memory that is free now. `processes` is reduced in a machine
    /// that can't have that many.
    pub(crate) fn create(name: &str, processes: u32) -> Result<Self, SetupError> {
        let directory = Path::new(HIERARCHY).join(name);
        let write = |path: PathBuf, text: &str| {
            fs::write(&path, text).context(Step::Start, || format!("write {text:?} to {path:?}"))
        };
        write(Path::new(HIERARCHY).join("cgroup.subtree_control"), "+memory +pids")?;
        fs::create_dir(&directory).context(Step::Start, || format!("make {directory:?}"))?;
        let available = number("/proc/meminfo", "MemAvailable:").context(Step::Start, || "read /proc/meminfo")? * 1024;
        let threads = number("/proc/sys/kernel/threads-max", "").context(Step::Start, || "read threads-max")?;
        write(directory.join("memory.max"), &memory_limit(available).to_string())?;
        write(directory.join("memory.oom.group"), "1")?;
        let processes = processes.min(u32::try_from(threads / 4 * THREAD_QUARTERS).unwrap_or(u32::MAX));
        write(directory.join("pids.max"), &processes.to_string())?;
        Ok(Self { directory, processes })
    }

    /// Removes a cgroup without processes.
    pub(crate) fn remove(name: &str) {
        // One that stays costs nothing.
        let _ = fs::remove_dir(Path::new(HIERARCHY).join(name));
    }

    /// A process that writes `0` to this file moves to the cgroup.
    pub(crate) fn open_procs(&self) -> Result<File, SetupError> {
        let path = self.directory.join("cgroup.procs");
        OpenOptions::new().write(true).open(&path).context(Step::Start, || format!("open {path:?}"))
    }

    /// Kills every process in the cgroup.
    pub(crate) fn kill(&self) {
        // Kernels before 5.14 lack this file. It is only a precaution: no process survives the build's init.
        let _ = fs::write(self.directory.join("cgroup.kill"), "1");
    }

    /// Whether the OOM killer killed a process.
    pub(crate) fn out_of_memory(&self) -> bool {
        number(self.directory.join("memory.events"), "oom_kill").is_ok_and(|count| count > 0)
    }

    /// The limit on processes and threads, if the build reached it.
    pub(crate) fn too_many_processes(&self) -> Option<u32> {
        let refused = number(self.directory.join("pids.events"), "max").is_ok_and(|count| count > 0);
        refused.then_some(self.processes)
    }

    /// Memory in use now, in bytes.
    pub(crate) fn memory_bytes(&self) -> u64 {
        number(self.directory.join("memory.current"), "").unwrap_or(0)
    }

    /// Number of processes and threads now.
    pub(crate) fn processes(&self) -> u32 {
        let processes = number(self.directory.join("pids.current"), "").unwrap_or(0);
        u32::try_from(processes).unwrap_or(u32::MAX)
    }

    /// Usage as far as cgroups count it; the other fields are 0.
    pub(crate) fn usage(&self) -> Usage {
        let cpu = |key| number(self.directory.join("cpu.stat"), key).unwrap_or(0);
        Usage {
            user_us: cpu("user_usec"),
            system_us: cpu("system_usec"),
            peak_memory_bytes: number(self.directory.join("memory.peak"), "").unwrap_or(0),
            ..Usage::default()
        }
    }
}

fn memory_limit(available: u64) -> u64 {
    available.saturating_sub(RESERVE_BYTES).max(available / 2)
}

fn number(path: impl AsRef<Path>, key: &str) -> io::Result<u64> {
    field(&fs::read_to_string(path)?, key).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The number after `key` at the start of a line, or the first word if `key` is empty.
fn field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        if !key.is_empty() && words.next() != Some(key) {
            return None;
        }
        words.next()?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_key_matches() {
        assert_eq!(field("oom 3\noom_kill 1\n", "oom_kill"), Some(1));
        assert_eq!(field("oom_kill 1\n", "oom"), None);
        assert_eq!(field("MemAvailable:   4711 kB\n", "MemAvailable:"), Some(4711));
        assert_eq!(field("max\n", ""), None);
        assert_eq!(field("12\n", ""), Some(12));
    }

    #[test]
    fn the_build_gets_at_least_half_of_a_small_machine() {
        assert_eq!(memory_limit(512 << 20), (512 << 20) - RESERVE_BYTES);
        assert_eq!(memory_limit(16 << 20), 8 << 20);
    }
}
