use std::collections::{BTreeMap, BTreeSet};

use super::{Client, Load, Need, Waiting};

/// The bounds of clients, for their builds in the order of the queue.
pub(super) struct ClientBounds<'a, C> {
    clients: &'a BTreeMap<C, Client>,
    running_of: &'a BTreeMap<C, Load>,
    /// Clients of which an earlier build must wait.
    waiting: BTreeSet<C>,
}

impl<'a, C: Ord + Clone> ClientBounds<'a, C> {
    pub(super) fn new(clients: &'a BTreeMap<C, Client>, running_of: &'a BTreeMap<C, Load>) -> Self {
        Self { clients, running_of, waiting: BTreeSet::new() }
    }

    /// Whether the client's next build in the queue is within the client's bounds.
    pub(super) fn let_start(&mut self, client: &C, need: Need) -> bool {
        if self.waiting.contains(client) {
            return false;
        }
        let is_bound = bound(self.clients, self.running_of, client, need).is_some();
        if is_bound {
            self.waiting.insert(client.clone());
        }
        !is_bound
    }
}

/// The bound of a client that one more of its builds would exceed.
pub(super) fn bound<C: Ord>(
    clients: &BTreeMap<C, Client>,
    running_of: &BTreeMap<C, Load>,
    client: &C,
    need: Need,
) -> Option<Waiting> {
    let (terms, load) = (clients.get(client)?.terms, running_of.get(client)?);
    if terms.running.is_some_and(|most| load.builds >= most) {
        return Some(Waiting::Tenant { running: load.builds });
    }
    let allowed_bytes = terms.disk?;
    let is_beyond = load.disk_bytes.saturating_add(need.disk_bytes) > allowed_bytes;
    is_beyond.then_some(Waiting::Quota { disk_bytes: load.disk_bytes, allowed_bytes })
}
