//! The part of the host's tree of cgroups that is delegated to this process.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::limits::Shares;
use super::{named, remove};

/// The controllers without which a cgroup bounds too little.
const NEEDED: [&str; 2] = ["memory", "pids"];

/// All that are used where they are there.
const CONTROLLERS: [&str; 4] = ["memory", "pids", "cpu", "io"];

/// The daemon's own leaf.
const LEAF: &str = "daemon";

/// A cgroup that holds this process alone when it is found, and that this process may divide.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Delegated {
    path: PathBuf,
    controllers: Vec<&'static str>,
}

impl Delegated {
    /// This process's. Changes nothing.
    ///
    /// # Errors
    ///
    /// Why machines can't have cgroups of their own.
    pub(crate) fn find() -> Result<Self, String> {
        let read = |path: &str| fs::read_to_string(path).map_err(|error| format!("{path}: {error}"));
        let path = own_path(&read("/proc/self/mountinfo")?, &read("/proc/self/cgroup")?)
            .ok_or("this host has no cgroup v2 that this process can see")?;
        Self::at(path, std::process::id())
    }

    fn at(path: PathBuf, pid: u32) -> Result<Self, String> {
        let read = |file: &str| {
            let file = path.join(file);
            fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))
        };
        let there = read("cgroup.controllers")?;
        let controllers: Vec<_> =
            CONTROLLERS.into_iter().filter(|name| there.split_whitespace().any(|there| there == *name)).collect();
        let missing: Vec<_> = NEEDED.into_iter().filter(|name| !controllers.contains(name)).collect();
        if !missing.is_empty() {
            return Err(format!("the cgroup {} has no controller {}", path.display(), missing.join(" and ")));
        }
        if read("cgroup.procs")?.lines().any(|line| line != pid.to_string()) {
            return Err(format!("there are other processes in the cgroup {}", path.display()));
        }
        for file in ["cgroup.procs", "cgroup.subtree_control"].map(|file| path.join(file)) {
            File::options()
                .write(true)
                .open(&file)
                .map_err(|error| format!("the cgroup isn't delegated to this user: {}: {error}", file.display()))?;
        }
        Ok(Self { path, controllers })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a controller is there.
    pub(super) fn has(&self, controller: &str) -> bool {
        self.controllers.contains(&controller)
    }

    /// The disk whose use is to be bounded, as `MAJOR:MINOR`.
    ///
    /// # Errors
    ///
    /// What is asked for can't be done here.
    pub(crate) fn disk(&self, shares: &Shares) -> Result<Option<String>, String> {
        let Some(rates) = &shares.disk_rates else { return Ok(None) };
        if !self.has("io") {
            return Err(format!("the cgroup {} has no controller io", self.path.display()));
        }
        rates.disk().map(Some).map_err(|error| format!("no disk is known of {}: {error}", rates.path.display()))
    }

    /// Moves this process into a leaf, and lets limits be set beside it.
    pub(super) fn divide(&self) -> Result<(), String> {
        let leaf = self.path.join(LEAF);
        let pid = std::process::id().to_string();
        let enabled: Vec<_> = self.controllers.iter().map(|controller| format!("+{controller}")).collect();
        let write = |path: PathBuf, text: &str| fs::write(&path, text).map_err(|error| named(&path, &error));
        let made = match fs::create_dir(&leaf) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(named(&leaf, &error)),
            _ => Ok(()),
        };
        let divided = made
            .and_then(|()| write(leaf.join("cgroup.procs"), &pid))
            .and_then(|()| write(self.path.join("cgroup.subtree_control"), &enabled.join(" ")));
        if let Err(error) = divided {
            // As it was before.
            let _ = write(self.path.join("cgroup.procs"), &pid).and_then(|()| fs::remove_dir(&leaf));
            return Err(format!("the cgroup can't be divided: {error}"));
        }
        self.sweep();
        Ok(())
    }

    /// Removes the machines of a process that was killed. It was alone here, as this one is.
    fn sweep(&self) {
        for left in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            if left.file_name().to_string_lossy().starts_with("machine-")
                && let Err(error) = remove(&left.path())
            {
                tracing::warn!("the cgroup of an earlier machine stays behind: {error}");
            }
        }
    }
}

/// The directory of this process's cgroup, from `/proc/self/mountinfo` and `/proc/self/cgroup`.
fn own_path(mounts: &str, own: &str) -> Option<PathBuf> {
    let own = own.lines().find_map(|line| line.strip_prefix("0::"))?;
    mounts.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        // Characters that would be escaped are in no usual mount point.
        let is_usable = file_system.starts_with("cgroup2 ") && !point.contains('\\');
        let inside = Path::new(own).strip_prefix(root).ok().filter(|_| is_usable)?;
        // Without a slash at its end.
        Some(Path::new(point).join(inside).components().collect())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "23 28 0:22 / /sys rw shared:7 - sysfs sysfs rw\n\
                          31 23 0:26 / /sys/fs/cgroup ro,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn the_own_cgroup_is_found_below_its_mount() {
        let own = "0::/system.slice/cofferdam.service\n";
        let path = own_path(MOUNTS, own).unwrap();
        assert_eq!(path, Path::new("/sys/fs/cgroup/system.slice/cofferdam.service"));
        assert_eq!(own_path(MOUNTS, "0::/\n").unwrap(), Path::new("/sys/fs/cgroup"));
        let part = MOUNTS.replace("0:26 / ", "0:26 /system.slice ");
        assert_eq!(own_path(&part, own).unwrap(), Path::new("/sys/fs/cgroup/cofferdam.service"));
        assert_eq!(own_path(&part, "0::/user.slice\n"), None);
        assert_eq!(own_path(MOUNTS, "1:cpu:/\n"), None);
        assert_eq!(own_path("", own), None);
    }

    #[test]
    fn a_cgroup_that_cannot_be_divided_says_why() {
        let directory = tempfile::tempdir().unwrap();
        let at = || Delegated::at(directory.path().to_owned(), 7);
        let write = |file: &str, text: &str| fs::write(directory.path().join(file), text).unwrap();
        assert!(at().unwrap_err().contains("cgroup.controllers"));
        write("cgroup.controllers", "cpuset cpu pids\n");
        assert!(at().unwrap_err().ends_with("has no controller memory"));
        write("cgroup.controllers", "cpu memory pids\n");
        write("cgroup.procs", "7\n8\n");
        assert!(at().unwrap_err().contains("other processes"));
        write("cgroup.procs", "7\n");
        assert!(at().unwrap_err().contains("isn't delegated"));
        write("cgroup.subtree_control", "");
        let found = at().unwrap();
        assert!(found.has("cpu") && found.has("memory") && !found.has("io"));
        let rates = super::super::DiskRates { path: "/".into(), read: Some(1), write: None };
        let shares = Shares { disk_rates: Some(rates), ..Shares::default() };
        assert!(found.disk(&shares).unwrap_err().ends_with("has no controller io"));
    }
}
