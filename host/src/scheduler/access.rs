//! Decides which client may do which operation on which build.
//!
//! A client gets the same error for a build that it may not see and for one that doesn't exist.

use std::collections::BTreeSet;

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
    /// The client is an operator, see [`Operators`].
    Operator,
    /// None of these.
    Stranger,
}

/// The users of this host who may do everything with every build: root, and those that the configuration lists.
///
/// The daemon's own user isn't one by itself: a process that a guest has taken over may run as that user.
#[derive(Debug, Clone, Default)]
pub(crate) struct Operators {
    users: BTreeSet<u32>,
}

impl Operators {
    /// Root and these users.
    pub(crate) fn new(users: impl IntoIterator<Item = u32>) -> Self {
        Self { users: users.into_iter().collect() }
    }

    /// Whether a client is one of them. A client over TCP never is.
    pub(crate) fn include(&self, client: &Client) -> bool {
        matches!(client, Client::User(uid) if *uid == 0 || self.users.contains(uid))
    }

    /// The relation of a client to the build of a record.
    pub(crate) fn relate(&self, client: &Client, record: &Record) -> Relation {
        let name = client.to_string();
        if name == record.client {
            Relation::Owner
        } else if self.include(client) {
            Relation::Operator
        } else if record.joined.contains(&name) {
            Relation::Joined
        } else {
            Relation::Stranger
        }
    }
}

impl Relation {
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
            let message = "only the client that submitted this build first, or an operator (root, and the users that \
                           the daemon's configuration lists in `[operators]`), may cancel it";
            Err(Failure::wrong("not_allowed", message)
                .advised("stop waiting for it: a build is cancelled when no client waits for it"))
        } else {
            Err(unknown())
        }
    }
}

/// The error for a build that doesn't exist, or that the client may not see.
pub(crate) fn unknown() -> Failure {
    let message = "you have no build with this id; `cofferdam builds list` shows your builds. Root has all, and so \
                   have the users that the daemon's configuration lists in `[operators]`";
    Failure::wrong("unknown_build", message)
}
