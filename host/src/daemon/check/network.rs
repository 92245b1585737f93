use std::collections::BTreeMap;

use cofferdam_rpc::Client;

use super::{Checks, Key};
use crate::{
    daemon::config::{ClientConfig, NetworkConfig},
    network::{Limits, Policies, Policy, Resolvers},
    quantity::show_size,
};

impl Checks<'_> {
    pub(super) fn network(&mut self) -> Option<Policies> {
        let network = self.config.network.as_ref()?;
        if self.config.withhold_network {
            self.wrong("withhold_network", "must be false where there is a table [network]");
        }
        if network.limits().connections > Limits::MAX_CONNECTIONS {
            self.wrong("network.connections", format!("must be at most {}", Limits::MAX_CONNECTIONS));
        }
        let resolvers = self.resolvers(network);
        let policy = network.policy(resolvers.clone().unwrap_or_else(|| Resolvers::new(Vec::new())));
        let mut clients = BTreeMap::new();
        for (client, own) in network.clients() {
            self.client_rules(client, own, &policy);
            self.client_limits(client, own.limits(policy.limits), policy.limits);
            clients.insert(client.clone(), own.policy(&policy));
        }
        resolvers.map(|_| Policies::new(policy, clients))
    }

    fn resolvers(&mut self, network: &NetworkConfig) -> Option<Resolvers> {
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
        let most = "must be at most";
        for (name, is_more, rule) in [
            ("connections", own.connections > all.connections, format!("{most} {}", all.connections)),
            ("received", own.received_bytes > all.received_bytes, format!("{most} {}", show_size(all.received_bytes))),
            ("sent", own.sent_bytes > all.sent_bytes, format!("{most} {}", show_size(all.sent_bytes))),
        ] {
            if is_more {
                self.wrong(key(client, name), format!("{rule}, as network.{name} says for all clients"));
            }
        }
    }
}

fn key(client: &Client, name: &str) -> Key {
    Key::from("network.clients").child(&client.to_string()).child(name)
}
