//! Decides which client may do which operation on which build.
//!
//! A client gets the same error for a build that it may not see and for one that doesn't exist.

use cofferdam_rpc::Client;

use crate::{build::failure::Failure, records::Record};

/// An operation on a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Seeing it in a list.
    List,
    /// Reading its record.
    Get,
    /// Following its progress. A build with followers isn't cancelled.
    Watch,
    /// Reading its log.
    ReadLog,
    /// Using its shell after a failure.
    UseShell,
    /// Cancelling it for all clients.
    Cancel,
}

/// A client's relation to a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Relation {
    /// The client submitted the request that began the build.
    Owner,
    /// The client submitted an equal request while the build was active.
    Joined,
    /// The client is root, or the daemon's own user.
    Operator,
    /// None of these.
    Stranger,
}

impl Relation {
    /// The relation of a client to the build of a record.
    pub(crate) fn of(client: &Client, record: &Record) -> Self {
        let name = client.to_string();
        if name == record.client {
            Self::Owner
        } else if client.is_operator() {
            Self::Operator
        } else if record.joined.contains(&name) {
            Self::Joined
        } else {
            Self::Stranger
        }
    }

    /// Whether this relation permits an operation.
    pub(crate) fn allows(self, operation: Operation) -> bool {
        match self {
            Self::Owner | Self::Operator => true,
            // Its owner waits for it, too.
            Self::Joined => operation != Operation::Cancel,
            Self::Stranger => false,
        }
    }

    /// Like [`allows`](Self::allows), with an error for the client.
    pub(super) fn check(self, operation: Operation) -> Result<(), Failure> {
        if self.allows(operation) {
            Ok(())
        } else if self.allows(Operation::Get) {
            let message = "only the client that submitted this build first, or an operator, may cancel it";
            Err(Failure::wrong("not_allowed", message)
                .advised("stop waiting for it: a build is cancelled when no client waits for it"))
        } else {
            Err(unknown())
        }
    }
}

/// The error for a build that doesn't exist, or that the client may not see.
pub(crate) fn unknown() -> Failure {
    Failure::wrong("unknown_build", "you have no build with this id; `cofferdam builds list` shows your builds")
}
