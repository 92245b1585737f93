use std::time::Duration;

use super::secrets::Secrets;
use crate::{
    limits::{Asked, Limits},
    network::Grant,
};

/// One build's resources and limits, and what becomes of it if it fails.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// Its limits.
    pub limits: Limits,
    /// Whether to keep what a failed build has left, see [`Failed::kept`](super::error::Failed::kept); within ten minutes of its
    /// own. Outputs beyond their limits leave nothing, since that would be beyond them, too.
    pub keep_failed: bool,
    /// Whether somebody may look around in a shell when the build has failed, if
    /// [`Observer::terminal`](super::Observer::terminal) gives a terminal, and for how long.
    pub shell: Option<Duration>,
    /// What it gets of the network if its request asks for that.
    pub network: Option<Grant>,
    /// Files that only its command sees.
    pub secrets: Secrets,
    /// Whether the command runs on the terminal that [`Observer::terminal`](super::Observer::terminal) gives.
    pub interactive: bool,
}

impl Options {
    /// What is asked for, and these limits where nothing is.
    pub(crate) fn new(defaults: &Limits, asked: &Asked) -> Self {
        let (keep_failed, shell) = (asked.keep_failed, asked.shell());
        Self { limits: defaults.with(asked), keep_failed, shell, ..Self::default() }
    }

    /// Whether equal builds have equal results: nothing decides them that no digest shows.
    pub(crate) fn is_repeatable(&self) -> bool {
        self.secrets.is_empty() && !self.interactive
    }

    /// Whether the guest of a failed build is still needed.
    pub(super) fn needs_failed_guest(&self) -> bool {
        self.keep_failed || self.shell.is_some()
    }
}
