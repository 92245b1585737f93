//! Places for connections, so that no client keeps another out.
//!
//! ```text
//!   take ─ there is a free one ─────────────────────────────▶ held ──▶ given back
//!     │                                                        │
//!     ├─ the client has as many as it may ─▶ it loses one ─────┤
//!     └─ none is free ─▶ the client with most loses one ───────┘
//! ```
//!
//! A client that has as many as it may loses the one that has been idle for the longest time, so that connections which it has
//! forgotten don't keep it out.
//!
//! If no place is free, the client with most loses one to a client that then still has fewer. So a client always gets a place if
//! it has fewer than an equal part. The one that has been idle for the longest time is lost, or else the newest.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::{Client, connection::Activity};

/// A limited number of places.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    state: Arc<Mutex<State>>,
    total: usize,
    /// Most that one client has.
    share: usize,
}

/// A place, given back when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    places: Places,
    number: u64,
    lost: CancellationToken,
}

#[derive(Debug, Default)]
struct State {
    /// By the order in which they came.
    held: BTreeMap<u64, Held>,
    next_number: u64,
}

#[derive(Debug)]
struct Held {
    client: Client,
    activity: Activity,
    lost: CancellationToken,
}

impl Places {
    /// So many places, and how many of them one client may have.
    pub(crate) fn new(total: usize, share: usize) -> Self {
        Self { state: Arc::default(), total, share }
    }

    /// A place for a client's connection.
    pub(crate) fn take(&self, client: &Client, activity: &Activity) -> Option<Place> {
        let mut state = self.state.lock();
        if state.count(client) >= self.share {
            state.lose_idle(client)?;
        } else if state.held.len() >= self.total {
            state.lose_for(client)?;
        }
        let (number, lost) = (state.next_number, CancellationToken::new());
        state.next_number += 1;
        let held = Held { client: client.clone(), activity: activity.clone(), lost: lost.clone() };
        state.held.insert(number, held);
        Some(Place { places: self.clone(), number, lost })
    }

    /// How many a client has.
    #[cfg(test)]
    pub(crate) fn count(&self, client: &Client) -> usize {
        self.state.lock().count(client)
    }
}

impl Place {
    /// Cancelled when it is another connection's.
    pub(crate) fn lost(&self) -> &CancellationToken {
        &self.lost
    }

    /// Counts it among those of a client that has shown who it is.
    pub(crate) fn belongs_to(&self, client: &Client) {
        let mut state = self.places.state.lock();
        if state.held.get(&self.number).is_none_or(|held| held.client == *client) {
            return;
        }
        if state.count(client) >= self.places.share && state.lose_idle(client).is_none() {
            state.lose(self.number);
        } else if let Some(held) = state.held.get_mut(&self.number) {
            held.client = client.clone();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.state.lock().held.remove(&self.number);
    }
}

impl State {
    fn count(&self, client: &Client) -> usize {
        self.held.values().filter(|held| held.client == *client).count()
    }

    /// Takes a place from a client that has so many that it still has more than this one then.
    fn lose_for(&mut self, client: &Client) -> Option<()> {
        let mut counts = BTreeMap::<_, usize>::new();
        for held in self.held.values() {
            *counts.entry(&held.client).or_default() += 1;
        }
        let own = counts.get(client).copied().unwrap_or(0);
        let (most, count) = counts.into_iter().max_by_key(|(_, count)| *count)?;
        if count <= own + 1 {
            return None;
        }
        let most = most.clone();
        let newest = self.held.iter().rev().find(|(_, held)| held.client == most).map(|(number, _)| *number);
        self.lose_idle(&most).or_else(|| self.lose(newest?))
    }

    /// Takes from a client the place that has been idle for the longest time.
    fn lose_idle(&mut self, client: &Client) -> Option<()> {
        let of_client = self.held.iter().filter(|(_, held)| held.client == *client);
        let idle = of_client.filter_map(|(number, held)| Some((held.activity.idle_since()?, *number)));
        let (_, longest) = idle.min()?;
        self.lose(longest)
    }

    fn lose(&mut self, number: u64) -> Option<()> {
        let held = self.held.remove(&number)?;
        tracing::debug!("closed a connection of {}: its place is another's", held.client);
        held.lost.cancel();
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use std::{iter, time::Duration};

    use tokio::time::advance;

    use super::*;
    use crate::connection::InProgress;

    /// A connection, and its request in progress.
    struct Connection {
        busy: Option<InProgress>,
        place: Option<Place>,
    }

    impl Connection {
        fn of(places: &Places, client: &Client, is_busy: bool) -> Self {
            let activity = Activity::new();
            let place = places.take(client, &activity);
            Self { busy: is_busy.then(|| activity.begin()), place }
        }

        fn is_open(&self) -> bool {
            self.place.as_ref().is_some_and(|place| !place.lost.is_cancelled())
        }
    }

    const USERS: [Client; 4] = [Client::User(0), Client::User(1), Client::User(2), Client::User(3)];

    fn connections(places: &Places, client: &Client, count: usize, are_busy: bool) -> Vec<Connection> {
        iter::repeat_with(|| Connection::of(places, client, are_busy)).take(count).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn every_client_gets_an_equal_part_whatever_others_hold() {
        for are_busy in [false, true] {
            let places = Places::new(12, 9);
            let counts = || USERS.each_ref().map(|user| places.count(user));
            let mut held = Vec::new();
            for (user, expected) in USERS.iter().zip([[9, 0, 0, 0], [6, 6, 0, 0], [4, 4, 4, 0], [3, 3, 3, 3]]) {
                held.push(connections(&places, user, 20, are_busy));
                assert_eq!(counts(), expected, "{are_busy}");
            }
            drop(held);
            assert_eq!(places.state.lock().held.len(), 0);
        }
    }

    #[tokio::test]
    async fn clients_with_one_connection_each_lose_none() {
        let places = Places::new(2, 2);
        let [one, other, third, _] = USERS.each_ref().map(|user| connections(&places, user, 1, false).remove(0));
        assert_eq!([one, other, third].map(|connection| connection.is_open()), [true, true, false]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_connection_that_was_idle_longest_is_lost_and_a_busy_one_only_to_another_client() {
        let [one, other, ..] = &USERS;
        let places = Places::new(3, 3);
        let mut held = connections(&places, one, 3, true);
        for idle in [1, 0] {
            held[idle].busy = None;
            advance(Duration::from_secs(1)).await;
        }
        let are_open = |held: &[Connection]| held.iter().map(Connection::is_open).collect::<Vec<_>>();
        let own = Connection::of(&places, one, true);
        assert_eq!((are_open(&held), own.is_open()), (vec![true, false, true], true));
        let theirs = Connection::of(&places, other, true);
        assert_eq!((are_open(&held), own.is_open(), theirs.is_open()), (vec![false, false, true], true, true));
        let own = [own, Connection::of(&places, one, true)];
        assert_eq!(are_open(&own), [true, false], "all are busy, and the other client has fewer");
        let more = Connection::of(&places, other, true);
        assert_eq!(
            (are_open(&held), are_open(&own), more.is_open()),
            (vec![false, false, true], vec![true, false], false)
        );
    }

    #[tokio::test]
    async fn a_place_counts_for_the_client_that_it_belongs_to() {
        let [one, other, third, _] = &USERS;
        let places = Places::new(10, 2);
        let held = connections(&places, one, 2, true);
        held[0].place.as_ref().unwrap().belongs_to(other);
        assert_eq!([one, other].map(|user| places.count(user)), [1, 1]);
        // As many as it may have, all of them busy.
        let more = connections(&places, third, 2, true);
        held[1].place.as_ref().unwrap().belongs_to(third);
        assert!(!held[1].is_open() && more.iter().all(Connection::is_open));
    }
}
