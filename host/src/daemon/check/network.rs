use std::collections::BTreeMap;

use cofferdam_rpc::Client;

use super::{Checks, Key};
use crate::{
    daemon::{
        chain,
        config::{ClientConfig, NetworkConfig},
    },
    network::{CaFile, Limits, Policies, Policy, Resolvers},
    quantity::show_size,
};

impl Checks<'_> {
    pub(super) fn network(&mut self) -> Option<Policies> {
        let network = self.config.network.as_ref()?;
        if self.config.withhold_network {
            self.wrong("withhold_network", "must be false where there is a table [network]");
        }
        for (name, count, most) in [
            ("connections", network.limits().connections, Limits::MAX_CONNECTIONS),
            ("total_connections", network.total_connections(), Limits::MAX_TOTAL_CONNECTIONS),
        ] {
            if count > most {
                self.wrong(Key::from("network").child(name), format!("must be at most {most}"));
            }
        }
        let resolvers = self.resolvers(network);
        let ca_file = network.ca_file.as_deref().map(CaFile::read).transpose().unwrap_or_else(|error| {
            self.wrong("network.ca_file", chain(&error));
            None
        });
        let policy = network.policy(resolvers.clone().unwrap_or_else(|| Resolvers::new(Vec::new())), ca_file);
        let mut clients = BTreeMap::new();
        for (client, own) in network.clients() {
            self.client_rules(client, own, &policy);
            self.client_limits(client, own.limits(policy.limits), policy.limits);
            clients.insert(client.clone(), own.policy(&policy));
        }
        resolvers.map(|_| Policies::new(policy, clients, network.total_connections()))
    }

    fn resolvers(&mut self, network: &NetworkConfig) -> Option<Resolvers> {
        if network.upstream_proxy.is_some() {
            if !network.resolvers.is_empty() {
                self.wrong("network.resolvers", "must be empty where network.upstream_proxy is set: it resolves names");
            }
            return Some(Resolvers::new(Vec::new()));
        }
        if !network.resolvers.is_empty() {
            return Some(Resolvers::new(network.resolvers.clone()));
        }
        match Resolvers::of_host() {
            Ok(resolvers) => Some(resolvers),
            Err(error) => {
                let problem = self.lacking("network.resolvers", format!("this host names no DNS server: {error}"));
                problem.advise("write resolvers = [\"ADDRESS:PORT\"]");
                None
            }
        }
    }

    /// A client's rules must not widen those of all.
    fn client_rules(&mut self, client: &Client, own: &ClientConfig, all: &Policy) {
        let widens = |list: &str| format!("must not allow more than a rule in network.{list} does");
        for (index, rule) in own.allow.iter().flatten().enumerate() {
            if !all.covers(rule) {
                self.wrong(key(client, "allow").element(index), widens("allow"));
            }
        }
        for (index, rule) in own.allow_addresses.iter().flatten().enumerate() {
            if !all.covers_address(rule) {
                self.wrong(key(client, "allow_addresses").element(index), widens("allow_addresses"));
            }
        }
    }

    /// Nor its limits.
    fn client_limits(&mut self, client: &Client, own: Limits, all: Limits) {
        let count = |name, own: u32, all: u32| (name, own > all, all.to_string());
        let size = |name, own: u64, all: u64| (name, own > all, show_size(all));
        for (name, is_more, most) in [
            count("connections", own.connections, all.connections),
            count("client_connections", own.client_connections, all.client_connections),
            count("opens", own.opens, all.opens),
            count("queries", own.queries, all.queries),
            size("received", own.received_bytes, all.received_bytes),
            size("sent", own.sent_bytes, all.sent_bytes),
            size("rate", own.rate, all.rate),
        ] {
            if is_more {
                let rule = format!("must be at most {most}, as network.{name} says for all clients");
                self.wrong(key(client, name), rule);
            }
        }
    }
}

fn key(client: &Client, name: &str) -> Key {
    Key::from("network.clients").child(&client.to_string()).child(name)
}
