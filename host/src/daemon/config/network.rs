//! The table `[network]`: which connections builds get that ask for the network.

use std::net::SocketAddr;

use serde::Deserialize;

use crate::{
    network::{AddressRule, Mode, Policy, Resolvers, Rule},
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
}

impl NetworkConfig {
    /// Most connections of a build at a time.
    pub(in crate::daemon) fn connections(&self) -> u32 {
        self.connections.map_or(Policy::CONNECTIONS, |Count(count)| count)
    }

    /// The policy, with the DNS servers that were found for it.
    pub(in crate::daemon) fn policy(&self, resolvers: Resolvers) -> Policy {
        Policy {
            allow_addresses: self.allow_addresses.clone(),
            nat64: self.nat64,
            connections: self.connections(),
            received_bytes: self.received.map_or(Policy::RECEIVED_BYTES, |Size(bytes)| bytes),
            sent_bytes: self.sent.map_or(Policy::SENT_BYTES, |Size(bytes)| bytes),
            ..Policy::new(self.mode, self.allow.clone(), resolvers)
        }
    }
}
