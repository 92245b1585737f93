//! What builds may connect to. Pure decisions: everything that has to be found out is passed in.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use super::address::AddressRule;
use super::floor;
use super::resolver::Resolvers;
use super::rule::{Rule, is_name};

/// What becomes of names that no rule has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// They are denied.
    #[default]
    Enforce,
    /// They pass and are recorded. The floor stays.
    Audit,
}

/// The rules and limits of builds' connections.
#[derive(Clone, Debug)]
pub struct Policy {
    /// What becomes of names that no rule has.
    pub mode: Mode,
    /// Names that builds may connect to.
    pub allow: Vec<Rule>,
    /// Addresses that builds may connect to without a name, those below the floor included.
    pub allow_addresses: Vec<AddressRule>,
    /// Whether an address of NAT64 is as good as the IPv4 address in it.
    pub nat64: bool,
    /// Who resolves names.
    pub resolvers: Resolvers,
    /// Most connections of a build at a time.
    pub connections: u32,
    /// Most bytes that a build may receive on all its connections.
    pub received_bytes: u64,
    /// Most bytes that a build may send on all its connections.
    pub sent_bytes: u64,
}

/// Why a connection is denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Denial {
    #[error("no rule")]
    NoRule,
    #[error("no rule for this address, which this build has not found by a name")]
    NoName,
    #[error("no name of a host")]
    InvalidName,
    #[error("the address is {0}")]
    BelowFloor(&'static str),
    #[error("the address is this host's own")]
    Own,
    #[error("this host can't find out whether the address is its own")]
    Unknown,
    #[error("more connections at a time than [network] connections allows")]
    TooMany,
    #[error("more bytes than [network] received or sent allows")]
    TooMuch,
    #[error("it began with no server's name")]
    NoServerName,
    #[error("it asked for a server that was not found at this address, or that no rule has")]
    OtherServer,
}

/// How to connect to an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Connect.
    Connect {
        /// A name that the address was found by.
        name: Option<String>,
    },
    /// Connect, and pass nothing on before the build has asked for one of these names.
    Check {
        /// By TLS; else by HTTP.
        tls: bool,
        /// The names.
        names: BTreeSet<String>,
    },
}

/// HTTP's port.
const HTTP: u16 = 80;

impl Policy {
    /// Most connections of a build at a time, by default.
    pub const CONNECTIONS: u32 = 128;

    /// Most that can be configured: the device has no more descriptors.
    pub const MAX_CONNECTIONS: u32 = 512;

    /// Most bytes that a build may receive, by default.
    pub const RECEIVED_BYTES: u64 = 16 << 30;

    /// Most bytes that a build may send, by default.
    pub const SENT_BYTES: u64 = 256 << 20;

    /// Rules about names, with the default limits.
    pub fn new(mode: Mode, allow: Vec<Rule>, resolvers: Resolvers) -> Self {
        Self {
            mode,
            allow,
            allow_addresses: Vec::new(),
            nat64: false,
            resolvers,
            connections: Self::CONNECTIONS,
            received_bytes: Self::RECEIVED_BYTES,
            sent_bytes: Self::SENT_BYTES,
        }
    }

    /// Whether a name may be resolved.
    pub(super) fn has_name(&self, name: &str) -> Result<(), Denial> {
        match () {
            () if !is_name(name) => Err(Denial::InvalidName),
            () if self.mode == Mode::Audit || self.allow.iter().any(|rule| rule.has_name(name)) => Ok(()),
            () => Err(Denial::NoRule),
        }
    }

    /// Whether a build may learn that this is a name's address.
    pub(super) fn has_address(&self, address: IpAddr, is_own: bool) -> Result<(), Denial> {
        let address = floor::canonical(address);
        if self.allow_addresses.iter().any(|rule| rule.has(address)) {
            return Ok(());
        }
        self.is_above_floor(address, is_own)
    }

    /// Decides about a canonical address, which this build has found by these names.
    pub(super) fn decide(&self, to: SocketAddr, names: &BTreeSet<String>, is_own: bool) -> Result<Decision, Denial> {
        let port = to.port();
        if self.allow_addresses.iter().any(|rule| rule.allows(to)) {
            return Ok(Decision::Connect { name: names.first().cloned() });
        }
        self.is_above_floor(to.ip(), is_own)?;
        let rules_for = |name: &String| self.allow.iter().filter(|rule| rule.allows(name, port)).collect::<Vec<_>>();
        let allowed: BTreeSet<String> = names.iter().filter(|name| !rules_for(name).is_empty()).cloned().collect();
        let unchecked = allowed.iter().find(|name| rules_for(name).iter().any(|rule| !rule.wants_tls()));
        match (unchecked, self.mode) {
            (Some(name), _) => Ok(Decision::Connect { name: Some(name.clone()) }),
            (None, Mode::Audit) => Ok(Decision::Connect { name: names.first().cloned() }),
            (None, Mode::Enforce) if names.is_empty() => Err(Denial::NoName),
            (None, Mode::Enforce) if allowed.is_empty() => Err(Denial::NoRule),
            (None, Mode::Enforce) => Ok(Decision::Check { tls: port != HTTP, names: allowed }),
        }
    }

    fn is_above_floor(&self, address: IpAddr, is_own: bool) -> Result<(), Denial> {
        match (floor::below(address, self.nat64), is_own) {
            (Some(what), _) => Err(Denial::BelowFloor(what)),
            (None, true) => Err(Denial::Own),
            (None, false) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(mode: Mode, allow: &[&str], allow_addresses: &[&str]) -> Policy {
        let allow = allow.iter().map(|rule| rule.parse().unwrap()).collect();
        let allow_addresses = allow_addresses.iter().map(|rule| rule.parse().unwrap()).collect();
        Policy { allow_addresses, ..Policy::new(mode, allow, Resolvers::new(Vec::new())) }
    }

    fn names(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    const PUBLIC: &str = "93.184.215.14";

    /// Decides about an address and port, found by these names.
    fn decide(policy: &Policy, to: &str, found_by: &[&str]) -> Result<Decision, Denial> {
        policy.decide(to.parse().unwrap(), &names(found_by), false)
    }

    #[test]
    fn a_name_must_be_resolved_and_allowed_and_its_port_too() {
        let policy = policy(Mode::Enforce, &["a.example", "*.b.example:443", "git.example:22 tls=false"], &[]);
        let checked = |tls, all: &[&str]| Ok(Decision::Check { tls, names: names(all) });
        for (port, found_by, expected) in [
            (443, &["a.example"][..], checked(true, &["a.example"])),
            (80, &["a.example"], checked(false, &["a.example"])),
            (22, &["a.example"], Err(Denial::NoRule)),
            (443, &["x.b.example"], checked(true, &["x.b.example"])),
            (80, &["x.b.example"], Err(Denial::NoRule)),
            (443, &["evil.example"], Err(Denial::NoRule)),
            (443, &["evil.example", "a.example"], checked(true, &["a.example"])),
            (443, &[], Err(Denial::NoName)),
            (22, &["git.example"], Ok(Decision::Connect { name: Some("git.example".into()) })),
        ] {
            assert_eq!(decide(&policy, &format!("{PUBLIC}:{port}"), found_by), expected, "{port} {found_by:?}");
        }
    }

    #[test]
    fn no_name_leads_below_the_floor() {
        for mode in [Mode::Enforce, Mode::Audit] {
            let policy = policy(mode, &["*"], &[]);
            for address in ["10.0.0.5", "169.254.169.254", "168.63.129.16", "127.0.0.1"] {
                let denied = decide(&policy, &format!("{address}:443"), &["a.example"]).unwrap_err();
                assert!(matches!(denied, Denial::BelowFloor(_)), "{address}: {denied}");
                assert!(policy.has_address(address.parse().unwrap(), false).is_err());
            }
            let own = policy.decide(format!("{PUBLIC}:443").parse().unwrap(), &names(&["a.example"]), true);
            assert_eq!(own, Err(Denial::Own));
        }
    }

    #[test]
    fn a_rule_about_addresses_is_the_way_through_the_floor() {
        let policy = policy(Mode::Enforce, &[], &["10.0.0.5/32:443"]);
        assert_eq!(decide(&policy, "10.0.0.5:443", &[]), Ok(Decision::Connect { name: None }));
        policy.has_address("10.0.0.5".parse().unwrap(), false).unwrap();
        for to in ["10.0.0.5:80", "10.0.0.6:443"] {
            assert!(matches!(decide(&policy, to, &[]), Err(Denial::BelowFloor(_))), "{to}");
        }
    }

    #[test]
    fn audits_let_pass_what_no_rule_has() {
        let policy = policy(Mode::Audit, &["a.example"], &[]);
        policy.has_name("evil.example").unwrap();
        for (port, found_by) in [(443, &["evil.example"][..]), (4711, &["a.example"]), (443, &[])] {
            let passed = Ok(Decision::Connect { name: found_by.first().map(|name| (*name).to_owned()) });
            assert_eq!(decide(&policy, &format!("{PUBLIC}:{port}"), found_by), passed);
        }
    }

    #[test]
    fn only_names_of_rules_are_resolved() {
        let policy = policy(Mode::Enforce, &["a.example:22", "*.b.example"], &[]);
        for name in ["a.example", "x.b.example"] {
            policy.has_name(name).unwrap();
        }
        for (name, denied) in [
            ("b.example", Denial::NoRule),
            ("secret.a.example", Denial::NoRule),
            ("", Denial::InvalidName),
            ("a\\032b.b.example", Denial::InvalidName),
        ] {
            assert_eq!(policy.has_name(name), Err(denied), "{name}");
        }
    }
}
