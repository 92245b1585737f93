//! Finds the processes that belong to a state directory, from `/proc`.

use std::{collections::BTreeMap, fs, io::ErrorKind, os::unix::ffi::OsStrExt, path::Path, process, time::Duration};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, SysconfVar, sysconf},
};

/// A process whose working directory, mounts, arguments or environment refer to a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Its parent's id.
    pub parent: i32,
    /// The file name of its executable.
    pub name: String,
    /// Whether it is in a namespace of its own, or in one that can't be looked at.
    pub is_walled: bool,
    /// Its arguments, for messages.
    pub command_line: String,
}

impl Process {
    /// Kills it.
    pub fn kill(&self) {
        kill(Pid::from_raw(self.pid), Signal::SIGKILL).unwrap_or_else(|error| panic!("can't kill {self:?}: {error}"));
    }
}

/// All other processes whose working directory is in `directory`, or whose mounts, arguments or environment name it. Zombies
/// have none of these.
///
/// Of a `cofferdam` process root alone sees more than the arguments. For other users every process that they can't look into
/// is one, belongs to the directory if its parent does, and is walled.
pub fn of(directory: &Path) -> Vec<Process> {
    with_children(directory, None)
}

/// The same, and the children of a process that is known to belong to the directory.
pub fn with_children(directory: &Path, parent: Option<i32>) -> Vec<Process> {
    let entries = fs::read_dir("/proc").expect("/proc is mounted").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let others = pids.filter(|&pid| pid.unsigned_abs() != process::id());
    let seen: Vec<_> = others.filter_map(|pid| look(pid, directory)).collect();
    let told = seen.iter().filter(|one| one.is_told).map(|one| one.process.pid);
    let told: Vec<_> = told.chain(parent).collect();
    let belongs = |one: &Seen| one.is_told || one.is_closed && told.contains(&one.process.parent);
    seen.iter().filter(|one| belongs(one)).map(|one| one.process.clone()).collect()
}

/// A process, and whether it belongs to a directory.
struct Seen {
    process: Process,
    /// It works there, sees it, or was told of it.
    is_told: bool,
    /// Only its arguments can be read.
    is_closed: bool,
}

fn look(pid: i32, directory: &Path) -> Option<Seen> {
    let place = Path::new("/proc").join(pid.to_string());
    let read = |name| fs::read(place.join(name)).unwrap_or_default();
    let told = |bytes: &[u8]| {
        let needle = directory.as_os_str().as_bytes();
        bytes.windows(needle.len()).any(|window| window == needle)
    };
    let working_directory = fs::read_link(place.join("cwd")).unwrap_or_default();
    let arguments = read("cmdline");
    // A mount tells its path in its file system, of which the unique name is the end of ours.
    let name = directory.file_name()?.as_bytes();
    let namespace = |place: &Path| fs::read_link(place.join("ns/pid")).ok();
    let is_walled = namespace(&place) != namespace("/proc/self".as_ref());
    let mounted = || is_walled && read("mountinfo").windows(name.len()).any(|window| window == name);
    let is_told = working_directory.starts_with(directory) || told(&arguments) || told(&read("environ")) || mounted();
    let status = fs::read_to_string(place.join("status")).ok()?;
    let value = |key| status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
    let (name, is_closed) = match fs::read_link(place.join("exe")) {
        Ok(executes) => (executes.file_name()?.to_string_lossy().into_owned(), false),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => ("cofferdam".to_owned(), true),
        Err(_) => return None,
    };
    let parent = value("PPid:")?.parse().ok()?;
    let command_line = String::from_utf8_lossy(&arguments).replace('\0', " ");
    let process = Process { pid, parent, name, is_walled, command_line };
    Some(Seen { process, is_told, is_closed })
}

/// The peak resident memory of a process, in bytes. `None` if it is gone.
pub fn peak_resident_bytes(pid: u32) -> Option<u64> {
    memory_bytes(pid, "VmHWM")
}

/// A process's memory in bytes, by its name in `/proc/PID/status`. `None` if the process is gone.
pub fn memory_bytes(pid: u32, name: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// The processor time of a process and all its descendants, the ended ones among them included.
pub fn processor_time(of: i32) -> Duration {
    let entries = fs::read_dir("/proc").expect("/proc is mounted").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let all: BTreeMap<i32, (i32, u64)> = pids.filter_map(|pid| Some((pid, parent_and_ticks(pid)?))).collect();
    let belongs = |pid: i32| {
        let parent = |pid: &i32| all.get(pid).map(|&(parent, _)| parent);
        std::iter::successors(Some(pid), parent).any(|ancestor| ancestor == of)
    };
    let ticks: u64 = all.iter().filter(|&(&pid, _)| belongs(pid)).map(|(_, &(_, ticks))| ticks).sum();
    let ticks_per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().expect("Linux has such a rate");
    Duration::from_secs_f64(ticks as f64 / ticks_per_second as f64)
}

/// A process's parent, and its processor time and that of the children that it has waited for, in ticks.
fn parent_and_ticks(pid: i32) -> Option<(i32, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may have spaces and parentheses.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = fields.get(11..15)?.iter().map(|field| field.parse::<u64>().ok()).sum::<Option<u64>>()?;
    Some((fields.get(1)?.parse().ok()?, ticks))
}

/// The memory of a process, in bytes: its proportional set, or where that can't be read its resident one, which is more.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// Its own, and its part of files that several processes map.
    pub own: u64,
    /// Its part of what it shares with others by a descriptor, as a machine's memory is.
    pub shared: u64,
}

impl Memory {
    /// The memory of this process. `None` if it is gone.
    pub fn of(pid: i32) -> Option<Self> {
        let place = Path::new("/proc").join(pid.to_string());
        let read = |name: &str, [anonymous, file, shared]: [&str; 3]| {
            let text = fs::read_to_string(place.join(name)).ok()?;
            let bytes = |key: &str| {
                let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
                Some(value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
            };
            Some(Self { own: bytes(anonymous)? + bytes(file)?, shared: bytes(shared)? })
        };
        read("smaps_rollup", ["Pss_Anon", "Pss_File", "Pss_Shmem"])
            .or_else(|| read("status", ["RssAnon", "RssFile", "RssShmem"]))
    }
}
