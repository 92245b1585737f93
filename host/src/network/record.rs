//! What is on record of a connection.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::policy::Denial;

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
    /// Whether it was denied for want of a rule.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lacks_rule: bool,
}

impl Connection {
    /// The server, by name and address as far as they are known.
    pub(crate) fn server(&self) -> String {
        match (&self.name, &self.address) {
            (Some(name), Some(address)) => format!("{name}:{} at {}", address.port(), address.ip()),
            (Some(name), None) => name.clone(),
            (None, Some(address)) => address.to_string(),
            (None, None) => "unknown".to_owned(),
        }
    }

    /// It is denied.
    pub(super) fn deny(&mut self, denial: Denial) {
        self.verdict = Verdict::Denied(denial.to_string());
        self.lacks_rule = matches!(denial, Denial::NoRule | Denial::NoName);
    }
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
    /// It was allowed, and a server that it needs failed, for this reason: the proxy, or all DNS servers.
    Failed(String),
    /// It was not allowed, for this reason.
    Denied(String),
}

impl Verdict {
    /// A word for machines, stable across versions.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Refused => "refused",
            Self::Unreachable => "unreachable",
            Self::Abandoned => "abandoned",
            Self::Failed(_) => "failed",
            Self::Denied(_) => "denied",
        }
    }

    /// Why it was denied, if it was.
    pub fn denied(&self) -> Option<&str> {
        match self {
            Self::Denied(why) => Some(why),
            _ => None,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allowed => f.write_str("allowed"),
            Self::Refused => f.write_str("refused"),
            Self::Unreachable => f.write_str("unreachable"),
            Self::Abandoned => f.write_str("given up"),
            Self::Failed(why) => write!(f, "failed ({why})"),
            Self::Denied(why) => write!(f, "denied ({why})"),
        }
    }
}

impl fmt::Display for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.server(), self.verdict)
    }
}
