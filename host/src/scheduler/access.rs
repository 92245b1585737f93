//! Which client may do what with which build: the one place that decides it.
//!
//! A build that a client may not even see is unknown to it, whether there is such a build or not.

use cofferdam_rpc::Client;

use crate::{build::failure::Failure, records::Record};

/// Something that a client wants of a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Finding it in a list.
    List,
    /// Reading what is known of it.
    Get,
    /// Following it as it goes on. It isn't cancelled as long as somebody does.
    Watch,
    /// Reading its log.
    ReadLog,
    /// Using the shell that it offers when it has failed.
    UseShell,
    /// Ending it for everybody.
    Cancel,
}

/// What a client is to a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Relation {
    /// It submitted the request that began the build.
    Owner,
    /// It submitted an equal request while the build was active.
    Joined,
    /// It runs the daemon, or is root.
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

    /// Whether it lets the client do this.
    pub(crate) fn allows(self, operation: Operation) -> bool {
        match self {
            Self::Owner | Self::Operator => true,
            // Its owner waits for it, too.
            Self::Joined => operation != Operation::Cancel,
            Self::Stranger => false,
        }
    }

    /// Checks the same.
    pub(super) fn check(self, operation: Operation) -> Result<(), Failure> {
        if self.allows(operation) {
            Ok(())
        } else if self.allows(Operation::Get) {
            let message = "only the client that submitted this build first, or an operator, may cancel it";
            Err(Failure::wrong("not_allowed", message)
                .advised("stop waiting for it; it is cancelled when nobody waits for it any more"))
        } else {
            Err(unknown())
        }
    }
}

/// The client has no such build.
pub(crate) fn unknown() -> Failure {
    Failure::wrong("unknown_build", "you have no build of this id; `cofferdam builds list` shows those that you have")
}
