//! The network of builds: which connections a build gets, and making them.
//!
//! ```text
//!   name ──▶ Broker::resolve ── a rule has it? ──▶ resolver ──▶ addresses, less those of the floor ──▶ pinned to the name
//!
//!   address ──▶ Broker::connect ── Policy::decide: floor · own addresses · pinned names · rules ──▶ connected
//!                                                                    │
//!                                                     Check: the server's name in the first bytes
//! ```
//!
//! Nothing here knows of packets, devices or guests. A build has a [`Broker`] of its own, so that it gains nothing from
//! names that another has resolved. Every address is judged at the moment of connecting, and that address is connected to,
//! not its name.

mod address;
mod broker;
mod ca_file;
mod check;
mod clients;
mod denials;
mod floor;
mod limits;
mod own;
mod pace;
mod pins;
mod policy;
mod proxy;
mod rate;
mod record;
mod resolver;
mod rule;
mod stand_ins;

use serde::{Deserialize, Serialize};

pub use address::{AddressRule, Prefix};
pub use broker::Broker;
pub(crate) use broker::{Opened, Passed, Resolved};
pub use ca_file::{CaFile, CaFileError};
pub use clients::{Grant, Policies};
pub use denials::{Denials, RuleMaker};
pub use limits::Limits;
pub(crate) use policy::Denial;
pub use policy::{Mode, Policy, Rules};
pub use proxy::Proxy;
pub(crate) use rate::Rate;
pub use record::{Connection, Observe, Verdict};
pub use resolver::Resolvers;
pub use rule::Rule;

pub(crate) use resolver::is_answer;

/// For fuzzing: whether a connection that begins so asks for this server.
pub(crate) fn asks_for(name: &str, tls: bool, beginning: &[u8], piece: usize) -> bool {
    let mut check = check::Check::new(tls, Some([name.to_owned()].into()));
    beginning.chunks(piece.max(1)).any(|piece| matches!(check.feed(piece), Ok(check::Heard::Name(_))))
}

/// What a special address is for. Builds don't reach one by a name alone.
pub fn special(address: std::net::IpAddr) -> Option<&'static str> {
    floor::below(floor::canonical(address), false)
}

/// A version of IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// How a connection failed, as far as a build may know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// Not allowed.
    Denied,
    /// Nobody listens there.
    Refused,
    /// No host answers there.
    Unreachable,
}
