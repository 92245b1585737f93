use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};
use tonic::{
    codegen::http::Extensions,
    transport::server::{TcpConnectInfo, UdsConnectInfo},
};

/// Whose share something counts for: by what the connection shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Client {
    User(u32),
    Address(IpAddr),
    Unknown,
}

impl Client {
    /// Whoever has sent the request with these extensions.
    pub(super) fn of(known: &Extensions) -> Self {
        let user = || known.get::<UdsConnectInfo>()?.peer_cred.map(|peer| Self::User(peer.uid()));
        // With TLS, too.
        let address = || known.get::<TcpConnectInfo>()?.remote_addr().map(|addr| Self::at(addr.ip()));
        user().or_else(address).unwrap_or(Self::Unknown)
    }

    /// Whoever is at this address: in IPv6 its network of 64 bits, all of which one host may have.
    pub(super) fn at(address: IpAddr) -> Self {
        Self::Address(match address.to_canonical() {
            IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
            address => address,
        })
    }
}

/// Turns, of which each client has at most its share.
#[derive(Debug)]
pub struct Shares<C> {
    turns: Arc<Semaphore>,
    share: usize,
    clients: Arc<Mutex<HashMap<C, Weak<Semaphore>>>>,
}

impl<C> Clone for Shares<C> {
    fn clone(&self) -> Self {
        Self { turns: self.turns.clone(), share: self.share, clients: self.clients.clone() }
    }
}

/// One turn or more, given back when dropped.
#[derive(Debug)]
pub struct Turn {
    own: OwnedSemaphorePermit,
    turn: OwnedSemaphorePermit,
}

impl Turn {
    /// Takes in further turns of the same client.
    ///
    /// # Panics
    ///
    /// They are another client's.
    pub fn merge(&mut self, other: Self) {
        self.own.merge(other.own);
        self.turn.merge(other.turn);
    }
}

/// What there is not enough of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Short {
    /// The client's share.
    Share,
    /// What all have together.
    All,
}

impl<C: Eq + Hash> Shares<C> {
    /// So many turns, and how many a client has of them.
    pub fn new(turns: usize, share: usize) -> Self {
        Self { turns: Arc::new(Semaphore::new(turns)), share, clients: Arc::default() }
    }

    /// Waits until there is a turn, though not for every client.
    pub(super) async fn wait(&self) -> Result<(), AcquireError> {
        self.turns.acquire().await.map(drop)
    }

    /// A turn, when there is one and the client has less than its share.
    pub(super) async fn take(&self, client: C) -> Result<Turn, AcquireError> {
        let own = self.own(client).acquire_owned().await?;
        let turn = self.turns.clone().acquire_owned().await?;
        Ok(Turn { own, turn })
    }

    /// As many turns at once.
    ///
    /// # Errors
    ///
    /// There are not so many, or the client would have more than its share.
    pub fn try_take(&self, client: C, turns: usize) -> Result<Turn, Short> {
        let many = u32::try_from(turns).unwrap_or(u32::MAX);
        let own = self.own(client).try_acquire_many_owned(many).map_err(|_| Short::Share)?;
        let turn = self.turns.clone().try_acquire_many_owned(many).map_err(|_| Short::All)?;
        Ok(Turn { own, turn })
    }

    /// The share of a client, which is there as long as anything is taken of it or waits for it.
    fn own(&self, client: C) -> Arc<Semaphore> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = clients.get(&client).and_then(Weak::upgrade) {
            return own;
        }
        clients.retain(|_, own| own.strong_count() > 0);
        let own = Arc::new(Semaphore::new(self.share));
        clients.insert(client, Arc::downgrade(&own));
        own
    }
}

#[cfg(test)]
mod tests {
    use futures::poll;

    use super::*;

    #[test]
    fn no_client_has_more_than_its_share_nor_all_of_them_more_than_there_is() {
        let shares = Shares::new(4, 3);
        let [one, other] = [Client::User(1), Client::User(2)];
        let mut taken = shares.try_take(one, 2).unwrap();
        assert_eq!(shares.try_take(one, 2).unwrap_err(), Short::Share);
        taken.merge(shares.try_take(one, 1).unwrap());
        assert_eq!(shares.try_take(one, 1).unwrap_err(), Short::Share);
        assert_eq!(shares.try_take(other, 2).unwrap_err(), Short::All);
        let others = shares.try_take(other, 1).unwrap();
        drop(taken);
        assert_eq!(shares.try_take(other, 3).unwrap_err(), Short::Share);
        drop(others);
        drop(shares.try_take(other, 3).unwrap());
        assert_eq!(shares.clients.lock().unwrap().len(), 1);
    }

    #[tokio::test]
    async fn who_has_its_share_waits_and_holds_up_nobody_else() {
        let shares = Shares::new(3, 2);
        let [one, other] = [Client::User(1), Client::User(2)];
        let first = shares.take(one).await.unwrap();
        let _second = shares.take(one).await.unwrap();
        let mut third = Box::pin(shares.take(one));
        assert!(poll!(&mut third).is_pending());
        let others = shares.take(other).await.unwrap();
        drop(first);
        third.await.unwrap();
        drop(others);
    }

    #[test]
    fn a_host_that_has_many_addresses_is_one_client() {
        let at = |address: &str| Client::at(address.parse().unwrap());
        assert_eq!(at("2001:db8::1"), at("2001:db8::ffff:0:0:2"));
        assert_ne!(at("2001:db8::1"), at("2001:db8:0:1::1"));
        assert_eq!(at("::ffff:10.0.0.1"), at("10.0.0.1"));
        assert_ne!(at("10.0.0.1"), at("10.0.0.2"));
    }
}
