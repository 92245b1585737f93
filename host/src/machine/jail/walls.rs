//! How strong the walls around helpers are.

use std::ffi::CString;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use rustix::process::{Resource, WaitId, WaitIdOptions, waitid};
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

    /// Tries them with a process that ends as soon as its walls stand.
    fn probe(&self) -> io::Result<()> {
        let null = || File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from);
        let (standard, descriptors) = ([null()?, null()?, null()?], Vec::new());
        let ids = self.source.reserve()?;
        let walls = Some(self.enclose(ids, &View::nothing(), (&[], Path::new("/")), Vec::new())?);
        let working_dir = CString::default();
        let launch = Launch { program: None, working_dir, standard, descriptors, walls, cgroup: None };
        let started = fork::start(&launch)?;
        let ended = waitid(WaitId::PidFd(started.pidfd.as_fd()), WaitIdOptions::EXITED)?;
        match ended.and_then(|ended| ended.exit_status()) {
            Some(0) => Ok(()),
            _ => Err(io::Error::other("a process that tried them was killed")),
        }
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

    fn find() -> Self {
        let (source, weaker) = Source::find();
        let walls = if source == Source::Own { Walls::Namespaces } else { Walls::Uids };
        let means = filter::calls().map_err(io::Error::other);
        let means = means.map(|filters| Means { source, filters: Arc::new(filters) });
        match means.and_then(|means| means.probe().map(|()| means)) {
            Ok(means) => Self { walls, reason: weaker.unwrap_or_default(), means: Some(means) },
            Err(error) => Self { walls: Walls::None, reason: error.to_string(), means: None },
        }
    }
}
