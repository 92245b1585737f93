//! What the builds of a host's clients get of the network.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Weak};

use cofferdam_rpc::Client;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{Denial, Policy};

/// What one build gets of the network.
#[derive(Clone, Debug)]
pub struct Grant {
    /// Its rules and limits.
    pub(crate) policy: Arc<Policy>,
    shares: Shares,
}

/// Connections at a time that a build shares with others.
#[derive(Clone, Debug, Default)]
struct Shares {
    clients: Option<Arc<Semaphore>>,
    all: Option<Arc<Semaphore>>,
}

impl Grant {
    /// A build's that shares nothing.
    pub fn new(policy: Policy) -> Self {
        Self { policy: Arc::new(policy), shares: Shares::default() }
    }

    /// The same share of a narrower policy.
    pub(crate) fn with_policy(&self, policy: Policy) -> Self {
        Self { policy: Arc::new(policy), shares: self.shares.clone() }
    }

    /// Takes one connection of those that are shared. It is given back when the permits are dropped.
    pub(super) fn take_shared(&self) -> Result<Vec<OwnedSemaphorePermit>, Denial> {
        let Shares { clients, all } = &self.shares;
        let shared = [(clients, Denial::TooManyOfClient), (all, Denial::TooManyOfAll)];
        let taken = shared.into_iter().filter_map(|(share, denial)| Some((share.clone()?, denial)));
        taken.map(|(share, denial)| share.try_acquire_owned().map_err(|_| denial)).collect()
    }
}

/// Whether both allow the same.
impl PartialEq for Grant {
    fn eq(&self, other: &Self) -> bool {
        self.policy == other.policy
    }
}

impl Eq for Grant {}

/// The policy of all clients, and the narrower ones of some.
#[derive(Debug)]
pub struct Policies {
    all: Arc<Policy>,
    clients: BTreeMap<Client, Arc<Policy>>,
    connections: Arc<Semaphore>,
    /// Of clients that have builds.
    client_connections: Mutex<HashMap<Client, Weak<Semaphore>>>,
}

impl Policies {
    /// The policy of clients that have none of their own, and those of the others. All builds together have so many
    /// connections at a time.
    pub fn new(all: Policy, clients: BTreeMap<Client, Policy>, total_connections: u32) -> Self {
        let clients = clients.into_iter().map(|(client, policy)| (client, Arc::new(policy))).collect();
        let connections = Arc::new(Semaphore::new(total_connections as usize));
        Self { all: Arc::new(all), clients, connections, client_connections: Mutex::default() }
    }

    /// What a client's build gets.
    pub(crate) fn grant(&self, client: &Client) -> Grant {
        let policy = Arc::clone(self.clients.get(client).unwrap_or(&self.all));
        let mut known = self.client_connections.lock();
        known.retain(|_, connections| connections.strong_count() > 0);
        let connections = known.get(client).and_then(Weak::upgrade).unwrap_or_else(|| {
            let connections = Arc::new(Semaphore::new(policy.limits.client_connections as usize));
            known.insert(client.clone(), Arc::downgrade(&connections));
            connections
        });
        let shares = Shares { clients: Some(connections), all: Some(Arc::clone(&self.connections)) };
        Grant { policy, shares }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Limits, Resolvers, Rules};
    use super::*;

    #[test]
    fn clients_have_shares_of_their_own_within_one_of_all() {
        let all = Policy::new(Rules::default(), Resolvers::new(Vec::new()));
        let all = Policy { limits: Limits { client_connections: 3, ..Limits::default() }, ..all };
        let narrow = all.narrowed(None, Limits { client_connections: 1, ..Limits::default() });
        let policies = Policies::new(all, BTreeMap::from([(Client::User(1), narrow)]), 4);
        let (first, second) = (policies.grant(&Client::User(1)), policies.grant(&Client::User(1)));
        let one = first.take_shared().unwrap();
        assert_eq!(second.take_shared().unwrap_err(), Denial::TooManyOfClient);
        let others = [2, 3].map(|uid| policies.grant(&Client::User(uid)));
        let mut taken = vec![others[0].take_shared().unwrap(), others[0].take_shared().unwrap()];
        taken.push(others[1].take_shared().unwrap());
        assert_eq!(others[1].take_shared().unwrap_err(), Denial::TooManyOfAll);
        drop(one);
        let again = second.take_shared().unwrap();
        assert_eq!(others[1].take_shared().unwrap_err(), Denial::TooManyOfAll);
        drop(again);
        // What was denied has kept nothing.
        taken.push(others[1].take_shared().unwrap());
        taken.clear();
        drop((first, second, others));
        policies.grant(&Client::User(4));
        assert_eq!(policies.client_connections.lock().len(), 1, "clients that have gone are forgotten");
    }
}
