//! The build's cgroup: bounds its memory and processes, counts what they use, kills them all.

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use cofferdam_protocol::{Step, Usage};

use crate::error::{Context as _, SetupError};

const HIERARCHY: &str = "/sys/fs/cgroup";

/// Kept from the build, for guest-init and the kernel, so that want of memory kills the build and nothing else.
const RESERVE_BYTES: u64 = 24 * 1024 * 1024;

/// The build may have this many of each four threads that the kernel can have.
const THREADS_OF_FOUR: u64 = 3;

/// The cgroup that the command and all its descendants are in.
#[derive(Debug)]
pub(crate) struct Cgroup {
    directory: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup and sets its bounds by what is free now.
    pub(crate) fn create() -> Result<Self, SetupError> {
        let directory = Path::new(HIERARCHY).join("build");
        let write = |path: PathBuf, text: &str| {
            fs::write(&path, text).context(Step::Start, || format!("write {text:?} to {path:?}"))
        };
        write(Path::new(HIERARCHY).join("cgroup.subtree_control"), "+memory +pids")?;
        fs::create_dir(&directory).context(Step::Start, || format!("make {directory:?}"))?;
        let available = number("/proc/meminfo", "MemAvailable:").context(Step::Start, || "read /proc/meminfo")? * 1024;
        let threads = number("/proc/sys/kernel/threads-max", "").context(Step::Start, || "read threads-max")?;
        write(directory.join("memory.max"), &memory_limit(available).to_string())?;
        write(directory.join("memory.oom.group"), "1")?;
        write(directory.join("pids.max"), &(threads / 4 * THREADS_OF_FOUR).to_string())?;
        Ok(Self { directory })
    }

    /// Takes a process in that writes `0` to it.
    pub(crate) fn door(&self) -> Result<File, SetupError> {
        let path = self.directory.join("cgroup.procs");
        OpenOptions::new().write(true).open(&path).context(Step::Start, || format!("open {path:?}"))
    }

    /// Kills whatever is left in it.
    pub(crate) fn kill(&self) {
        // Nothing is left where the build's init has ended; a kernel before 5.14 has no such file.
        let _ = fs::write(self.directory.join("cgroup.kill"), "1");
    }

    /// The kernel has killed a process for want of memory.
    pub(crate) fn out_of_memory(&self) -> bool {
        number(self.directory.join("memory.events"), "oom_kill").is_ok_and(|count| count > 0)
    }

    /// What its processes have used, as far as cgroups count it; the rest is 0.
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

/// The number after a key at the start of a line; an empty key means the first word.
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
    fn fields_are_found_by_their_whole_key() {
        assert_eq!(field("oom 3\noom_kill 1\n", "oom_kill"), Some(1));
        assert_eq!(field("oom_kill 1\n", "oom"), None);
        assert_eq!(field("MemAvailable:   4711 kB\n", "MemAvailable:"), Some(4711));
        assert_eq!(field("max\n", ""), None);
        assert_eq!(field("12\n", ""), Some(12));
    }

    #[test]
    fn a_small_machine_leaves_the_build_at_least_half() {
        assert_eq!(memory_limit(512 << 20), (512 << 20) - RESERVE_BYTES);
        assert_eq!(memory_limit(16 << 20), 8 << 20);
    }
}
