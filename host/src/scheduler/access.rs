//! Decides which client may see and end which build.
//!
//! A client gets the same error for a build that it may not see and for one that doesn't exist.

use cofferdam_rpc::{Client, Clients};

use crate::{build::failure::Failure, records::Record};

/// The clients that may do everything with every build: root, and those that the configuration lists.
///
/// The daemon's own user isn't one by itself: a process that a guest has taken over may run as that user.
#[derive(Debug, Clone)]
pub(crate) struct Operators(Clients);

impl Operators {
    /// Those among the clients of a server.
    pub(crate) fn among(clients: &Clients) -> Self {
        Self(clients.clone())
    }

    /// Whether a client is one of them.
    pub(crate) fn include(&self, client: &Client) -> bool {
        self.0.is_operator(client)
    }

    /// Whether a client may see a build: it has submitted the build's request, or an equal one while the build was active, or it
    /// is an operator.
    pub(crate) fn let_see(&self, client: &Client, record: &Record) -> bool {
        let name = client.to_string();
        name == record.client || record.joined.contains(&name) || self.include(client)
    }

    /// The client to name as the one that asked for a build. Only operators learn of others.
    pub(crate) fn owner_for(&self, client: &Client, record: &Record) -> String {
        if self.include(client) { record.client.clone() } else { client.to_string() }
    }
}

/// The error for a build that doesn't exist, or that the client may not see.
pub(crate) fn unknown() -> Failure {
    let message = "you have no build with this id; `cofferdam builds list` shows your builds. Root has all, and so \
                   have those that the daemon's configuration lists in `[operators]`";
    Failure::wrong("unknown_build", message)
}
