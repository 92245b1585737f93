//! Finds the processes that belong to a state directory, from `/proc`.

use std::{
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A process whose working directory, arguments or environment refer to a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Its parent's id.
    pub parent: i32,
    /// The file name of its executable.
    pub name: String,
    /// Its working directory.
    pub working_directory: PathBuf,
    /// Its arguments, for messages.
    pub command_line: String,
}

impl Process {
    /// Kills it.
    pub fn kill(&self) {
        kill(Pid::from_raw(self.pid), Signal::SIGKILL).unwrap_or_else(|error| panic!("can't kill {self:?}: {error}"));
    }
}

/// All other processes whose working directory is in `directory`, or whose arguments or environment name it. Zombies have
/// none of these.
pub fn of(directory: &Path) -> Vec<Process> {
    let entries = fs::read_dir("/proc").expect("/proc is mounted").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|&pid| pid.unsigned_abs() != process::id()).filter_map(|pid| look(pid, directory)).collect()
}

fn look(pid: i32, directory: &Path) -> Option<Process> {
    let place = Path::new("/proc").join(pid.to_string());
    let read = |name| fs::read(place.join(name)).unwrap_or_default();
    let told = |bytes: &[u8]| {
        let needle = directory.as_os_str().as_bytes();
        bytes.windows(needle.len()).any(|window| window == needle)
    };
    let working_directory = fs::read_link(place.join("cwd")).unwrap_or_default();
    let arguments = read("cmdline");
    if !working_directory.starts_with(directory) && !told(&arguments) && !told(&read("environ")) {
        return None;
    }
    let executes = fs::read_link(place.join("exe")).ok()?;
    let status = fs::read_to_string(place.join("status")).ok()?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()?;
    let name = executes.file_name()?.to_string_lossy().into_owned();
    let command_line = String::from_utf8_lossy(&arguments).replace('\0', " ");
    Some(Process { pid, parent, name, working_directory, command_line })
}

/// The peak resident memory of a process, in bytes. `None` if it is gone.
pub fn peak_resident_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = peak.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
