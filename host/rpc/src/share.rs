use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::Client;

/// A limited amount of a resource. Each client gets at most its share.
#[derive(Debug, Clone)]
pub(crate) struct Shares {
    total: Arc<Semaphore>,
    share: usize,
    clients: Arc<Mutex<HashMap<Client, Weak<Semaphore>>>>,
}

/// One client's share.
#[derive(Debug, Clone)]
pub(crate) struct Share {
    own: Arc<Semaphore>,
    total: Arc<Semaphore>,
}

/// A part of a client's share, given back when dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    own: OwnedSemaphorePermit,
    total: OwnedSemaphorePermit,
}

/// What has been used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exhausted {
    /// The client's share.
    Share,
    /// What all clients have together.
    Total,
}

impl Shares {
    /// So much, and how much of it a client may have.
    pub(crate) fn new(total: usize, share: usize) -> Self {
        Self { total: Arc::new(Semaphore::new(total)), share, clients: Arc::default() }
    }

    /// A client's share.
    pub(crate) fn of(&self, client: &Client) -> Share {
        let mut clients = self.clients.lock();
        let known = clients.get(client).and_then(Weak::upgrade);
        let own = known.unwrap_or_else(|| {
            clients.retain(|_, own| own.strong_count() > 0);
            let own = Arc::new(Semaphore::new(self.share));
            clients.insert(client.clone(), Arc::downgrade(&own));
            own
        });
        Share { own, total: Arc::clone(&self.total) }
    }
}

impl Share {
    /// So many units, if they are there now.
    pub(crate) fn try_take(&self, units: usize) -> Result<Permit, Exhausted> {
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        let own = Arc::clone(&self.own).try_acquire_many_owned(units).map_err(|_| Exhausted::Share)?;
        let total = Arc::clone(&self.total).try_acquire_many_owned(units).map_err(|_| Exhausted::Total)?;
        Ok(Permit { own, total })
    }
}

impl Permit {
    /// Takes in another permit of the same client.
    ///
    /// # Panics
    ///
    /// It is another client's.
    pub(crate) fn merge(&mut self, other: Self) {
        self.own.merge(other.own);
        self.total.merge(other.total);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_the_total_are_never_exceeded() {
        let shares = Shares::new(4, 3);
        let [one, other] = [1, 2].map(|uid| shares.of(&Client::User(uid)));
        let mut taken = one.try_take(2).unwrap();
        assert_eq!(one.try_take(2).unwrap_err(), Exhausted::Share);
        taken.merge(one.try_take(1).unwrap());
        assert_eq!(one.try_take(1).unwrap_err(), Exhausted::Share);
        assert_eq!(other.try_take(2).unwrap_err(), Exhausted::Total);
        let others = other.try_take(1).unwrap();
        drop(taken);
        assert_eq!(other.try_take(3).unwrap_err(), Exhausted::Share);
        drop(others);
        drop(other.try_take(3).unwrap());
    }

    #[test]
    fn a_share_is_forgotten_when_nobody_has_it() {
        let shares = Shares::new(4, 3);
        let taken = shares.of(&Client::User(1)).try_take(1).unwrap();
        drop(shares.of(&Client::User(2)));
        drop(shares.of(&Client::User(3)));
        assert_eq!(shares.clients.lock().len(), 2);
        assert!(shares.of(&Client::User(1)).try_take(3).is_err());
        drop(taken);
        shares.of(&Client::User(1)).try_take(3).unwrap();
    }

    #[test]
    fn a_host_that_has_many_addresses_has_one_share() {
        let shares = Shares::new(2, 1);
        let at = |address: &str| shares.of(&Client::at(address.parse().unwrap()));
        for (one, other, is_same) in [
            ("2001:db8::1", "2001:db8::ffff:0:0:2", true),
            ("2001:db8::1", "2001:db8:0:1::1", false),
            ("::ffff:10.0.0.1", "10.0.0.1", true),
            ("10.0.0.1", "10.0.0.2", false),
        ] {
            let _taken = at(one).try_take(1).unwrap();
            assert_eq!(at(other).try_take(1).is_err(), is_same, "{one} {other}");
        }
    }
}
