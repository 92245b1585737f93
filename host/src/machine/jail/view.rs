//! The files that a helper sees, and the plan of its root.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use libc::{MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY};

/// The path of the run directory in a helper's root, which is also its working directory.
const RUN_DIR: &str = "/machine";

/// The host's files that a helper sees beside its program's libraries, each at its own path.
#[derive(Clone, Debug, Default)]
pub struct View {
    files: Vec<PathBuf>,
    devices: Vec<PathBuf>,
    run_dir: bool,
}

impl View {
    /// Nothing else.
    pub fn nothing() -> Self {
        Self::default()
    }

    /// Also a file, or everything in a directory, to read.
    #[must_use]
    pub fn file(mut self, path: impl Into<PathBuf>) -> Self {
        self.files.push(path.into());
        self
    }

    /// Also a device node, to use.
    #[must_use]
    pub fn device(mut self, path: impl Into<PathBuf>) -> Self {
        self.devices.push(path.into());
        self
    }

    /// Also the run directory, to write. It is the helper's working directory.
    #[must_use]
    pub fn run_dir(mut self) -> Self {
        self.run_dir = true;
        self
    }

    pub(super) fn has_run_dir(&self) -> bool {
        self.run_dir
    }
}

/// One mount in the new root.
#[derive(Debug)]
pub(super) struct Mount {
    pub(super) source: CString,
    /// Relative to the new root.
    pub(super) target: CString,
    /// `MOUNT_ATTR_…`.
    pub(super) attributes: u64,
}

/// The contents of a new root. All strings are made before the fork, since nothing can be allocated after it.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Parents first, relative to the new root.
    pub(super) directories: Vec<CString>,
    /// Empty files to mount on, relative to the new root.
    pub(super) files: Vec<CString>,
    pub(super) mounts: Vec<Mount>,
    /// In the new root.
    pub(super) working_dir: CString,
    /// The first device, in the new root.
    pub(super) device: Option<CString>,
}

impl Plan {
    /// A root for a helper that works in `run_dir`.
    ///
    /// # Errors
    ///
    /// A path isn't absolute, or isn't there.
    pub(super) fn new(view: &View, libraries: &[PathBuf], run_dir: &Path) -> io::Result<Self> {
        let mut plan = Planning::default();
        let read_only = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV;
        // Directories first, since what is in one of them needs no mount of its own.
        let (directories, files): (Vec<_>, Vec<_>) = view.files.iter().partition(|path| path.is_dir());
        for path in directories.into_iter().chain(libraries).chain(files) {
            plan.mount(path, path, read_only)?;
        }
        for path in &view.devices {
            plan.mount(path, path, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC)?;
        }
        if view.run_dir {
            plan.mount(run_dir, RUN_DIR.as_ref(), MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC)?;
        }
        let plan = plan.finish(if view.run_dir { RUN_DIR } else { "/" })?;
        let device = view.devices.first().map(|path| c_string(&Path::new("/").join(inside(path)?))).transpose()?;
        Ok(Plan { device, ..plan })
    }
}

#[derive(Default)]
struct Planning {
    directories: BTreeSet<PathBuf>,
    files: BTreeSet<PathBuf>,
    mounted: BTreeSet<PathBuf>,
    mounts: Vec<Mount>,
}

impl Planning {
    fn mount(&mut self, source: &Path, target: &Path, attributes: u64) -> io::Result<()> {
        let target = inside(target)?;
        if target.ancestors().any(|ancestor| self.mounted.contains(ancestor)) {
            return Ok(());
        }
        if source.metadata()?.is_dir() {
            self.directories.insert(target.clone());
        } else {
            self.files.insert(target.clone());
        }
        let parents = target.ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty());
        self.directories.extend(parents.map(Path::to_owned));
        self.mounts.push(Mount { source: c_string(source)?, target: c_string(&target)?, attributes });
        self.mounted.insert(target);
        Ok(())
    }

    fn finish(self, working_dir: &str) -> io::Result<Plan> {
        let strings = |paths: BTreeSet<PathBuf>| paths.iter().map(|path| c_string(path)).collect::<io::Result<_>>();
        Ok(Plan {
            // Sorted, a directory is before what is in it.
            directories: strings(self.directories)?,
            files: strings(self.files)?,
            mounts: self.mounts,
            working_dir: c_string(working_dir.as_ref())?,
            device: None,
        })
    }
}

/// A path below the new root, in which there are no symlinks.
fn inside(path: &Path) -> io::Result<PathBuf> {
    let mut inside = PathBuf::new();
    for component in path.components() {
        match component {
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
            Component::ParentDir => {
                inside.pop();
            }
            Component::Normal(name) => inside.push(name),
        }
    }
    if path.is_absolute() && !inside.as_os_str().is_empty() {
        return Ok(inside);
    }
    let message = format!("{} must be an absolute path below the root, so that a helper can see it", path.display());
    Err(io::Error::new(io::ErrorKind::InvalidInput, message))
}

pub(super) fn c_string(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(strings: &[CString]) -> Vec<&str> {
        strings.iter().map(|string| string.to_str().unwrap()).collect()
    }

    #[test]
    fn parents_come_first_and_what_is_in_a_mounted_directory_is_not_mounted_again() {
        let view = View::nothing().file("/etc/passwd").file("/etc/../usr/bin").file("/usr/bin/env").run_dir();
        let run_dir = tempfile::tempdir().unwrap();
        let plan = Plan::new(&view, &["/bin/sh".into()], run_dir.path()).unwrap();
        assert_eq!(texts(&plan.directories), ["bin", "etc", "machine", "usr", "usr/bin"]);
        assert_eq!(texts(&plan.files), ["bin/sh", "etc/passwd"]);
        let targets: Vec<_> = plan.mounts.iter().map(|mount| mount.target.to_str().unwrap()).collect();
        assert_eq!(targets, ["usr/bin", "bin/sh", "etc/passwd", "machine"]);
        assert_eq!(plan.working_dir.to_str().unwrap(), "/machine");
    }

    #[test]
    fn a_path_that_no_helper_could_see_is_refused() {
        for path in ["relative", "/", "/.."] {
            let error = Plan::new(&View::nothing().file(path), &[], "/".as_ref()).unwrap_err();
            assert!(!error.to_string().is_empty(), "{path}");
        }
        let error = Plan::new(&View::nothing().file("/does/not/exist"), &[], "/".as_ref()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
