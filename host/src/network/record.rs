//! What is on record of a connection.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Takes note of each connection once, when it has ended, and of each denial.
pub type Observe = Arc<dyn Fn(Connection) + Send + Sync>;

/// A connection that a build had or wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// The name of the server: the one that it was asked for, or else that the address was found by.
    pub name: Option<String>,
    /// Its address and port; nothing if the name was denied.
    pub address: Option<SocketAddr>,
    /// Bytes to it, as the host's kernel counts them.
    pub sent: u64,
    /// Bytes from it.
    pub received: u64,
    /// How it went.
    pub verdict: Verdict,
}

/// How a connection went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It was allowed and made.
    #[default]
    Allowed,
    /// It was allowed, and nobody listened.
    Refused,
    /// It was allowed, and no host answered.
    Unreachable,
    /// It was allowed, and the build or its machine ended before it was made.
    Abandoned,
    /// It was not allowed, for this reason.
    Denied(String),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allowed => f.write_str("allowed"),
            Self::Refused => f.write_str("refused"),
            Self::Unreachable => f.write_str("unreachable"),
            Self::Abandoned => f.write_str("given up"),
            Self::Denied(why) => write!(f, "denied ({why})"),
        }
    }
}

impl fmt::Display for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.name, &self.address) {
            (Some(name), Some(address)) => write!(f, "{name}:{} at {}", address.port(), address.ip())?,
            (Some(name), None) => f.write_str(name)?,
            (None, Some(address)) => address.fmt(f)?,
            (None, None) => f.write_str("unknown")?,
        }
        write!(f, " {}", self.verdict)
    }
}
