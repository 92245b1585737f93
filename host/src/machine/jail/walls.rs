//! How strong the walls around helpers are.

use std::ffi::CString;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::process::{WaitId, WaitIdOptions, waitid};

use super::filter;
use super::fork::{self, Launch};
use super::ids::{Ids, Source};
use super::view::{Plan, View};

/// What separates a helper from the daemon and from other machines, weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Walls {
    /// Nothing but what a helper gives up by itself.
    None,
    /// Namespaces and a root of its own.
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

/// Helpers can't be started as required.
#[derive(Debug, thiserror::Error)]
pub enum WallsError {
    /// The host gives them less.
    #[error("this host walls helper processes in with {walls}, and {required} are required: {reason}")]
    Weaker {
        /// What is asked for.
        required: Walls,
        /// What there is.
        walls: Walls,
        /// Why it isn't more.
        reason: String,
    },
    /// No user id is left for a machine.
    #[error("can't find a user id for the machine's helper processes")]
    NoId(#[source] io::Error),
    /// No thread.
    #[error("can't start the thread that forks")]
    Thread(#[source] io::Error),
}

/// The walls of a helper that works in `run_dir`.
pub(super) fn build(ids: Ids, view: &View, (libraries, run_dir): (&[PathBuf], &Path)) -> io::Result<fork::Walls> {
    Ok(fork::Walls {
        plan: Plan::new(view, libraries, run_dir)?,
        ids,
        rules: filter::files(view.has_run_dir().then_some(run_dir)).map_err(io::Error::other)?,
        filters: filter::calls().map_err(io::Error::other)?.into(),
        limits: Vec::new(),
    })
}

/// The best walls of this host.
#[derive(Debug)]
pub(crate) struct Best {
    /// How strong they are.
    pub(crate) walls: Walls,
    pub(super) source: Option<Source>,
    /// Why they aren't stronger.
    pub(crate) reason: String,
}

impl Best {
    /// Tried with a process that ends as soon as its walls stand.
    pub(crate) fn find() -> Self {
        let (source, weaker) = Source::find();
        match Self::probe(&source) {
            Ok(()) => {
                let walls = if source == Source::Own { Walls::Namespaces } else { Walls::Uids };
                Self { walls, source: Some(source), reason: weaker.unwrap_or_default() }
            }
            Err(error) => Self { walls: Walls::None, source: None, reason: error.to_string() },
        }
    }

    fn probe(source: &Source) -> io::Result<()> {
        let null = || File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from);
        let (standard, descriptors) = ([null()?, null()?, null()?], Vec::new());
        let walls = Some(build(source.reserve()?, &View::nothing(), (&[], Path::new("/")))?);
        let working_dir = CString::default();
        let started = fork::start(&Launch { program: None, working_dir, standard, descriptors, walls })?;
        let ended = waitid(WaitId::PidFd(started.pidfd.as_fd()), WaitIdOptions::EXITED)?;
        match ended.and_then(|ended| ended.exit_status()) {
            Some(0) => Ok(()),
            _ => Err(io::Error::other("a process that tried them was killed")),
        }
    }
}
