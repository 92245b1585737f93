//! The table `[network]`: which connections builds get that ask for the network.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

use cofferdam_rpc::Client;
use serde::Deserialize;

use super::values::{ClientName, Ipv6, Rate};
use crate::{
    network::{AddressRule, CaFile, Limits, Mode, Policy, Prefix, Proxy, Resolvers, Rule, Rules},
    quantity::{Count, Size},
};

/// Without this table, builds that ask for the network are refused.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(in crate::daemon) struct NetworkConfig {
    mode: Mode,
    allow: Vec<Rule>,
    allow_addresses: Vec<AddressRule>,
    /// DNS servers. None: the host's.
    pub(in crate::daemon) resolvers: Vec<SocketAddr>,
    nat64: bool,
    ipv6: Ipv6,
    deny_addresses: Vec<Prefix>,
    pub(in crate::daemon) upstream_proxy: Option<Proxy>,
    /// CA certificates that builds find, in PEM.
    pub(in crate::daemon) ca_file: Option<PathBuf>,
    reuse: bool,
    connections: Option<Count>,
    client_connections: Option<Count>,
    total_connections: Option<Count>,
    opens: Option<Count>,
    queries: Option<Count>,
    received: Option<Size>,
    sent: Option<Size>,
    rate: Option<Rate>,
    clients: BTreeMap<ClientName, ClientConfig>,
}

/// What narrows the network of one client's builds.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(in crate::daemon) struct ClientConfig {
    pub(in crate::daemon) allow: Option<Vec<Rule>>,
    pub(in crate::daemon) allow_addresses: Option<Vec<AddressRule>>,
    connections: Option<Count>,
    client_connections: Option<Count>,
    opens: Option<Count>,
    queries: Option<Count>,
    received: Option<Size>,
    sent: Option<Size>,
    rate: Option<Rate>,
}

impl NetworkConfig {
    /// The policy, with the DNS servers and the certificates that were found for it.
    pub(in crate::daemon) fn policy(&self, resolvers: Resolvers, ca_file: Option<CaFile>) -> Policy {
        let (allow, allow_addresses) = (self.allow.clone(), self.allow_addresses.clone());
        let rules = Rules { mode: self.mode, allow, allow_addresses };
        Policy {
            nat64: self.nat64,
            ca_file,
            reuse: self.reuse,
            ipv6: self.ipv6.0,
            deny_addresses: self.deny_addresses.clone(),
            proxy: self.upstream_proxy.clone(),
            limits: self.limits(),
            ..Policy::new(rules, resolvers)
        }
    }

    /// The limits of a build.
    pub(in crate::daemon) fn limits(&self) -> Limits {
        let default = Limits::default();
        Limits {
            connections: count(self.connections, default.connections),
            client_connections: count(self.client_connections, default.client_connections),
            opens: count(self.opens, default.opens),
            queries: count(self.queries, default.queries),
            received_bytes: size(self.received, default.received_bytes),
            sent_bytes: size(self.sent, default.sent_bytes),
            rate: rate(self.rate, default.rate),
        }
    }

    /// Most connections of all builds at a time.
    pub(in crate::daemon) fn total_connections(&self) -> u32 {
        count(self.total_connections, Limits::TOTAL_CONNECTIONS)
    }

    /// The clients with tables of their own.
    pub(in crate::daemon) fn clients(&self) -> impl Iterator<Item = (&Client, &ClientConfig)> {
        self.clients.iter().map(|(ClientName(client), config)| (client, config))
    }
}

impl ClientConfig {
    /// The policy of this client. Without any list of rules, those of all clients count.
    pub(in crate::daemon) fn policy(&self, all: &Policy) -> Policy {
        let has_rules = self.allow.is_some() || self.allow_addresses.is_some();
        let rules = has_rules.then(|| Rules {
            mode: all.rules.mode,
            allow: self.allow.clone().unwrap_or_default(),
            allow_addresses: self.allow_addresses.clone().unwrap_or_default(),
        });
        all.narrowed(rules, self.limits(all.limits))
    }

    /// Its limits, and otherwise those of all clients.
    pub(in crate::daemon) fn limits(&self, all: Limits) -> Limits {
        Limits {
            connections: count(self.connections, all.connections),
            client_connections: count(self.client_connections, all.client_connections),
            opens: count(self.opens, all.opens),
            queries: count(self.queries, all.queries),
            received_bytes: size(self.received, all.received_bytes),
            sent_bytes: size(self.sent, all.sent_bytes),
            rate: rate(self.rate, all.rate),
        }
    }
}

fn count(set: Option<Count>, default: u32) -> u32 {
    set.map_or(default, |Count(count)| count)
}

fn size(set: Option<Size>, default: u64) -> u64 {
    set.map_or(default, |Size(bytes)| bytes)
}

fn rate(set: Option<Rate>, default: u64) -> u64 {
    set.map_or(default, |Rate(bytes)| bytes)
}
