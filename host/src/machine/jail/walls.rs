//! How strong the walls around helpers are.

use std::ffi::CString;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::thread;

use rustix::process::{Gid, Resource, WaitId, WaitIdOptions, waitid};
use rustix::thread::set_thread_groups;
use seccompiler::BpfProgram;
use serde::Deserialize;

use super::cgroups::Shares;
use super::filter;
use super::fork::{self, Enclosure, Launch};
use super::ids::{Ids, Source};
use super::view::{Plan, View};

/// What separates a helper from the daemon and from other machines, weakest first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Walls {
    /// Nothing but what a helper gives up by itself.
    None,
    /// Namespaces and a root of its own: what a daemon requires by default.
    #[default]
    Namespaces,
    /// A user id of the machine's own, too.
    Uids,
}

impl fmt::Display for Walls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Namespaces => "namespaces",
            Self::Uids => "uids",
        })
    }
}

/// What an operator wants of the jail.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    /// The walls that helpers must have at least.
    pub walls: Walls,
    /// Whether each machine must have a cgroup.
    pub cgroups: bool,
    /// What each machine's cgroup bounds.
    pub shares: Shares,
}

/// Helpers can't be started as required.
#[derive(Debug, thiserror::Error)]
pub enum WallsError {
    /// The host offers less.
    #[error("this host walls helper processes in with {walls}, and {required} are required: {reason}")]
    Weaker {
        /// What is asked for.
        required: Walls,
        /// What there is.
        walls: Walls,
        /// Why it isn't more.
        reason: String,
    },
    /// No cgroup is delegated to this process, or it can't be bounded as asked for.
    #[error("this host gives machines no cgroups, and they are required: {reason}")]
    NoCgroups {
        /// Why not.
        reason: String,
    },
    /// A machine's cgroup can't be made or bounded.
    #[error("can't make the machine's cgroup")]
    Cgroup(#[source] io::Error),
    /// No user id is left for a machine.
    #[error("can't find a user id for the machine's helper processes")]
    NoId(#[source] io::Error),
    /// No thread.
    #[error("can't start the thread that forks")]
    Thread(#[source] io::Error),
}

/// The means by which helpers of this host are walled in.
#[derive(Clone, Debug)]
pub(super) struct Means {
    pub(super) source: Source,
    filters: Arc<[BpfProgram; 2]>,
}

impl Means {
    /// The walls of a helper that works in `run_dir`.
    pub(super) fn enclose(
        &self,
        ids: Ids,
        view: &View,
        (libraries, run_dir): (&[PathBuf], &Path),
        limits: Vec<(Resource, u64)>,
    ) -> io::Result<Enclosure> {
        Ok(Enclosure {
            plan: Plan::new(view, libraries, run_dir)?,
            ids,
            rules: filter::files(view.has_run_dir().then_some(run_dir)).map_err(io::Error::other)?,
            filters: Arc::clone(&self.filters),
            limits,
        })
    }

    /// Tries them with a process that ends as soon as its walls stand and it has opened the device in its view.
    fn probe(&self, view: &View) -> io::Result<()> {
        let null = || File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from);
        let (standard, descriptors) = ([null()?, null()?, null()?], Vec::new());
        let ids = self.source.reserve()?;
        let walls = Some(self.enclose(ids, view, (&[], Path::new("/")), Vec::new())?);
        let working_dir = CString::default();
        let launch = Launch { program: None, working_dir, standard, descriptors, walls, cgroup: None };
        let started = fork::start(&launch)?;
        let ended = waitid(WaitId::PidFd(started.pidfd.as_fd()), WaitIdOptions::EXITED)?;
        match ended.and_then(|ended| ended.exit_status()) {
            Some(0) => Ok(()),
            _ => Err(io::Error::other("a process that tried them was killed")),
        }
    }

    /// Whether a helper can open this device, as one that has these groups beside its own.
    fn opens(&self, device: &Path, groups: Option<&[Gid]>) -> io::Result<()> {
        // This call is about one thread alone.
        let tried = thread::scope(|scope| {
            let probing = scope.spawn(|| {
                groups.map_or(Ok(()), set_thread_groups)?;
                self.probe(&View::nothing().device(device))
            });
            probing.join()
        });
        tried.unwrap_or_else(|_| Err(io::Error::other("the thread that tried it panicked")))
    }
}

/// The best walls of this host.
#[derive(Debug)]
pub(crate) struct Best {
    /// How strong they are.
    pub(crate) walls: Walls,
    /// Why they aren't stronger.
    pub(crate) reason: String,
    /// Nothing where there are no walls.
    pub(super) means: Option<Means>,
}

impl Best {
    /// Found out once for the whole process.
    pub(crate) fn of_this_host() -> &'static Self {
        static BEST: LazyLock<Best> = LazyLock::new(Best::find);
        &BEST
    }

    /// Tries whether a helper can open this device, which this process can open.
    ///
    /// # Errors
    ///
    /// It can't.
    pub(crate) fn opens(&self, device: &Path) -> io::Result<()> {
        let Some(means) = &self.means else { return Ok(()) };
        means.opens(device, means.source.groups().as_deref())
    }

    fn find() -> Self {
        let (source, weaker) = Source::find();
        let has_others = source != Source::Own;
        let best = Self::with(source, weaker);
        if best.means.is_none() && has_others {
            // newuidmap refuses a user whose primary group isn't the one in /etc/passwd.
            let own = Self::with(Source::Own, Some(best.reason.clone()));
            return if own.means.is_some() { own } else { best };
        }
        best
    }

    fn with(source: Source, weaker: Option<String>) -> Self {
        let walls = if source == Source::Own { Walls::Namespaces } else { Walls::Uids };
        let means = filter::calls().map_err(io::Error::other);
        let means = means.map(|filters| Means { source, filters: Arc::new(filters) });
        match means.and_then(|means| means.probe(&View::nothing()).map(|()| means)) {
            Ok(means) => Self { walls, reason: weaker.unwrap_or_default(), means: Some(means) },
            Err(error) => Self { walls: Walls::None, reason: error.to_string(), means: None },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, chown};

    use super::*;

    #[test]
    fn a_helper_opens_a_device_of_its_groups_and_no_other() {
        let best = Best::of_this_host();
        let means = best.means.as_ref().expect("this host has namespaces");
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(&directory, Permissions::from_mode(0o755)).unwrap();
        let device = directory.path().join("device");
        let with_mode = |mode| {
            fs::write(&device, "").unwrap();
            fs::set_permissions(&device, Permissions::from_mode(mode)).unwrap();
        };
        with_mode(0o666);
        best.opens(&device).unwrap();
        with_mode(0o600);
        // Unless helpers have the user's own id, they aren't its owner.
        let as_owner = best.opens(&device).map_err(|error| error.kind());
        match means.source {
            Source::Own => as_owner.unwrap(),
            _ => assert_eq!(as_owner, Err(io::ErrorKind::PermissionDenied)),
        }
        if let Source::Any(ids) = &means.source {
            let group = ids.start - 1;
            chown(&device, None, Some(group)).unwrap();
            with_mode(0o660);
            means.opens(&device, Some(&[Gid::from_raw(group)])).unwrap();
            let error = means.opens(&device, Some(&[])).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        }
    }
}
