//! What builds may connect to. Pure decisions: everything that has to be found out is passed in.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use super::address::{AddressRule, Prefix};
use super::ca_file::CaFile;
use super::floor;
use super::limits::Limits;
use super::proxy::Proxy;
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

/// Which connections are allowed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// What becomes of names that no rule has.
    pub mode: Mode,
    /// Names that builds may connect to.
    pub allow: Vec<Rule>,
    /// Addresses that builds may connect to without a name, those below the floor included.
    pub allow_addresses: Vec<AddressRule>,
}

/// The rules and limits of a build's connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The host's rules.
    pub rules: Rules,
    /// Rules that have to allow a connection, too: those of a client, and those of a request.
    pub narrowed_by: Vec<Rules>,
    /// Whether an address of NAT64 is as good as the IPv4 address in it.
    pub nat64: bool,
    /// Whether builds may connect by IPv6.
    pub ipv6: bool,
    /// Addresses that builds don't reach, whatever the rules.
    pub deny_addresses: Vec<Prefix>,
    /// Who resolves names, if there is no proxy.
    pub resolvers: Resolvers,
    /// Who makes all connections.
    pub proxy: Option<Proxy>,
    /// How much there may be.
    pub limits: Limits,
    /// Certificates that builds find instead of their root's.
    pub ca_file: Option<CaFile>,
    /// Whether results of builds with a network answer equal requests.
    pub reuse: bool,
}

/// Why a connection is denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Denial {
    #[error("no rule")]
    NoRule,
    #[error("no rule of the client's table or of the request, which narrow [network]")]
    Narrowed,
    #[error("no rule for this address, which this build has not found by a name")]
    NoName,
    #[error("no name of a host")]
    InvalidName,
    #[error("the address is {0}")]
    BelowFloor(&'static str),
    #[error("[network] deny_addresses has the address")]
    DenyListed,
    #[error("[network] ipv6 is false")]
    Ipv6,
    #[error("the address is this host's own")]
    Own,
    #[error("this host can't find out whether the address is its own")]
    Unknown,
    #[error("more connections at a time than [network] connections allows")]
    TooMany,
    #[error("more connections of this client at a time than [network] client_connections allows")]
    TooManyOfClient,
    #[error("more connections of all builds at a time than [network] total_connections allows")]
    TooManyOfAll,
    #[error("more connections at a time that no server has accepted yet than builds may have")]
    TooManyHalfOpen,
    #[error("more connections in a second than [network] opens allows")]
    TooManyOpens,
    #[error("more queries in a second than [network] queries allows")]
    TooManyQueries,
    #[error("more names and addresses than builds may find")]
    TooManyNames,
    #[error("more connections at a time than the network device has room for; {others} more were refused")]
    TurnedAway { others: u64 },
    #[error("this host's kernel doesn't count what a connection carries")]
    Uncounted,
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
    /// Connect, and hear which server the build asks for, to record it.
    Listen {
        /// By TLS; else by HTTP.
        tls: bool,
    },
    /// Connect, and pass nothing on before the build has asked for one of these names.
    Check {
        /// By TLS; else by HTTP.
        tls: bool,
        /// The names.
        names: BTreeSet<String>,
    },
}

/// HTTP's and HTTPS's port.
const HTTP: u16 = 80;
const HTTPS: u16 = 443;

impl Rules {
    fn has_name(&self, name: &str) -> bool {
        self.mode == Mode::Audit || self.allow.iter().any(|rule| rule.has_name(name))
    }

    fn has_address(&self, address: IpAddr) -> bool {
        self.allow_addresses.iter().any(|rule| rule.has(address))
    }

    fn allow_address(&self, to: SocketAddr) -> bool {
        self.allow_addresses.iter().any(|rule| rule.allows(to))
    }

    fn allow_name(&self, name: &str, port: u16) -> bool {
        self.mode == Mode::Audit || self.allow.iter().any(|rule| rule.allows(name, port))
    }

    /// Whether a name is allowed without a look at what the build says to its server.
    fn allow_unchecked(&self, name: &str, port: u16) -> bool {
        self.mode == Mode::Audit || self.allow.iter().any(|rule| rule.allows(name, port) && !rule.wants_tls())
    }
}

impl Policy {
    /// The host's rules, and the default limits.
    pub fn new(rules: Rules, resolvers: Resolvers) -> Self {
        Self {
            rules,
            narrowed_by: Vec::new(),
            nat64: false,
            ipv6: true,
            deny_addresses: Vec::new(),
            resolvers,
            proxy: None,
            limits: Limits::default(),
            ca_file: None,
            reuse: false,
        }
    }

    /// A policy that allows no connection which this one doesn't.
    #[must_use]
    pub fn narrowed(&self, rules: Option<Rules>, limits: Limits) -> Self {
        let mut narrowed = self.clone();
        narrowed.narrowed_by.extend(rules);
        narrowed.limits = self.limits.least(limits);
        narrowed
    }

    /// Whether connections that a rule about names allows are all allowed here.
    pub fn covers(&self, rule: &Rule) -> bool {
        self.layers().all(|rules| rules.mode == Mode::Audit || rule.is_covered_by(&rules.allow))
    }

    /// Whether connections that a rule about addresses allows are all allowed here.
    pub fn covers_address(&self, rule: &AddressRule) -> bool {
        self.layers().all(|rules| rules.allow_addresses.iter().any(|own| own.covers(rule)))
    }

    fn layers(&self) -> impl Iterator<Item = &Rules> {
        std::iter::once(&self.rules).chain(&self.narrowed_by)
    }

    /// Whether a name may be resolved.
    pub(super) fn has_name(&self, name: &str) -> Result<(), Denial> {
        match () {
            () if !is_name(name) => Err(Denial::InvalidName),
            () if !self.rules.has_name(name) => Err(Denial::NoRule),
            () if !self.narrowed_by.iter().all(|rules| rules.has_name(name)) => Err(Denial::Narrowed),
            () => Ok(()),
        }
    }

    /// Whether a build may learn that this is a name's address.
    pub(super) fn has_address(&self, address: IpAddr, is_own: bool) -> Result<(), Denial> {
        let address = floor::canonical(address);
        self.is_not_denied(address)?;
        if self.layers().all(|rules| rules.has_address(address)) {
            return Ok(());
        }
        self.is_above_floor(address, is_own)
    }

    /// Decides about a canonical address, which this build has found by these names.
    pub(super) fn decide(&self, to: SocketAddr, names: &BTreeSet<String>, is_own: bool) -> Result<Decision, Denial> {
        self.is_not_denied(to.ip())?;
        if self.layers().all(|rules| rules.allow_address(to)) {
            return Ok(Decision::Connect { name: names.first().cloned() });
        }
        self.is_above_floor(to.ip(), is_own)?;
        self.decide_by_name(to.port(), names)
    }

    /// Decides about any address that may be connected to, and that this build has found by these names.
    pub(super) fn decide_by_name(&self, port: u16, names: &BTreeSet<String>) -> Result<Decision, Denial> {
        if self.layers().all(|rules| rules.mode == Mode::Audit) {
            // Elsewhere, servers may speak first.
            return Ok(match port {
                HTTP | HTTPS => Decision::Listen { tls: port == HTTPS },
                _ => Decision::Connect { name: names.first().cloned() },
            });
        }
        let is_allowed = |name: &&String| self.layers().all(|rules| rules.allow_name(name, port));
        let allowed: BTreeSet<String> = names.iter().filter(is_allowed).cloned().collect();
        let unchecked = allowed.iter().find(|name| self.layers().all(|rules| rules.allow_unchecked(name, port)));
        match unchecked {
            Some(name) => Ok(Decision::Connect { name: Some(name.clone()) }),
            None if names.is_empty() => Err(Denial::NoName),
            None if allowed.is_empty() => {
                let is_narrowed = names.iter().any(|name| self.rules.allow_name(name, port));
                Err(if is_narrowed { Denial::Narrowed } else { Denial::NoRule })
            }
            None => Ok(Decision::Check { tls: port != HTTP, names: allowed }),
        }
    }

    fn is_not_denied(&self, address: IpAddr) -> Result<(), Denial> {
        let inner = floor::translated(address).map(IpAddr::from);
        let mut all = [Some(address), inner].into_iter().flatten();
        match () {
            () if address.is_ipv6() && !self.ipv6 => Err(Denial::Ipv6),
            () if all.any(|address| self.deny_addresses.iter().any(|denied| denied.has(address))) => {
                Err(Denial::DenyListed)
            }
            () => Ok(()),
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
mod tests;
