//! How strong the walls around helpers are.

use std::{fmt, io};

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
