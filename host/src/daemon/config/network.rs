//! The table `[network]`: which connections builds get that ask for the network.

use std::{collections::BTreeMap, net::SocketAddr};

use cofferdam_rpc::Client;
use serde::Deserialize;

use super::values::ClientName;
use crate::{
    network::{AddressRule, Limits, Mode, Policy, Resolvers, Rule, Rules},
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
    connections: Option<Count>,
    received: Option<Size>,
    sent: Option<Size>,
    clients: BTreeMap<ClientName, ClientConfig>,
}

/// What narrows the network of one client's builds.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(in crate::daemon) struct ClientConfig {
    pub(in crate::daemon) allow: Option<Vec<Rule>>,
    pub(in crate::daemon) allow_addresses: Option<Vec<AddressRule>>,
    connections: Option<Count>,
    received: Option<Size>,
    sent: Option<Size>,
}

impl NetworkConfig {
    /// The policy, with the DNS servers that were found for it.
    pub(in crate::daemon) fn policy(&self, resolvers: Resolvers) -> Policy {
        let (allow, allow_addresses) = (self.allow.clone(), self.allow_addresses.clone());
        let rules = Rules { mode: self.mode, allow, allow_addresses };
        Policy { nat64: self.nat64, limits: self.limits(), ..Policy::new(rules, resolvers) }
    }

    /// The limits of a build.
    pub(in crate::daemon) fn limits(&self) -> Limits {
        limits(Limits::default(), self.connections, self.received, self.sent)
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
        limits(all, self.connections, self.received, self.sent)
    }
}

fn limits(default: Limits, connections: Option<Count>, received: Option<Size>, sent: Option<Size>) -> Limits {
    Limits {
        connections: connections.map_or(default.connections, |Count(count)| count),
        received_bytes: received.map_or(default.received_bytes, |Size(bytes)| bytes),
        sent_bytes: sent.map_or(default.sent_bytes, |Size(bytes)| bytes),
    }
}
