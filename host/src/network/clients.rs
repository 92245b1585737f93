//! The policies of a host's clients.

use std::collections::BTreeMap;
use std::sync::Arc;

use cofferdam_rpc::Client;

use super::Policy;

/// The policy of all clients, and the narrower ones of some.
#[derive(Clone, Debug)]
pub struct Policies {
    all: Arc<Policy>,
    clients: BTreeMap<Client, Arc<Policy>>,
}

impl Policies {
    /// The policy of clients that have none of their own, and those of the others.
    pub fn new(all: Policy, clients: BTreeMap<Client, Policy>) -> Self {
        let clients = clients.into_iter().map(|(client, policy)| (client, Arc::new(policy))).collect();
        Self { all: Arc::new(all), clients }
    }

    /// The policy of a client's builds.
    pub(crate) fn of(&self, client: &Client) -> &Arc<Policy> {
        self.clients.get(client).unwrap_or(&self.all)
    }
}
