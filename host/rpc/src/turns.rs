//! Turns at something that takes time or memory, fair between clients.
//!
//! ```text
//!   take ──▶ waiting ──▶ held ──▶ given back, and the next is chosen
//!               └─ the future is dropped ─▶ gone
//! ```
//!
//! **Order.** Start-time fair queueing, as in the scheduler's queue: each turn moves its client's tag on by the same step divided by
//! the client's share, and the lowest tag is next. A client that comes back starts at the tag of the latest turn, so it can't
//! save up.
//!
//! **Room.** Turns may take long, and a client that held them all would keep everybody out meanwhile. So a client gets a turn only
//! while it holds fewer than are free: one client alone at most half of them, two a third each.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::{Client, Clients};

/// How far a turn moves the tag of a client whose share is 1.
const STEP: u64 = 1 << 20;

/// So many turns at a time.
#[derive(Debug, Clone)]
pub struct Turns {
    state: Arc<Mutex<State>>,
    clients: Clients,
}

/// One client's place in the line for [`Turns`].
#[derive(Debug, Clone)]
pub struct Line {
    turns: Turns,
    client: Client,
}

/// A turn, given back when dropped.
#[derive(Debug)]
pub struct Turn {
    line: Line,
}

#[derive(Debug)]
struct State {
    free: usize,
    lines: HashMap<Client, Waiting>,
    /// The tag of the latest turn.
    latest: u64,
    next_number: u64,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Of the client's next turn.
    tag: u64,
    held: usize,
    /// By the order in which they came.
    waiting: BTreeMap<u64, oneshot::Sender<Turn>>,
}

impl Turns {
    /// So many turns at a time, at least 1.
    pub fn new(turns: usize, clients: &Clients) -> Self {
        let state = State { free: turns.max(1), lines: HashMap::new(), latest: 0, next_number: 0 };
        Self { state: Arc::new(Mutex::new(state)), clients: clients.clone() }
    }

    /// A client's place.
    pub fn line(&self, client: &Client) -> Line {
        Line { turns: self.clone(), client: client.clone() }
    }

    /// Gives out what can be given out.
    fn give(&self) {
        loop {
            let mut state = self.state.lock();
            let Some((client, waiting)) = state.next(&self.clients) else { return };
            drop(state);
            // One whose future is being dropped gives its turn back.
            drop(waiting.send(Turn { line: self.line(&client) }));
        }
    }
}

impl Line {
    /// The client's next turn.
    pub async fn turn(&self) -> Turn {
        let (waiting, mut given) = oneshot::channel();
        let place = {
            let mut state = self.turns.state.lock();
            let number = state.next_number;
            state.next_number += 1;
            let latest = state.latest;
            let line = state.lines.entry(self.client.clone()).or_default();
            line.tag = line.tag.max(latest);
            line.waiting.insert(number, waiting);
            Place { line: self, number }
        };
        self.turns.give();
        let turn = (&mut given).await;
        drop(place);
        match turn {
            Ok(turn) => turn,
            // Only who waits forgets its sender.
            Err(_) => std::future::pending().await,
        }
    }
}

/// A number in a line, which is forgotten with this.
struct Place<'a> {
    line: &'a Line,
    number: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut state = self.line.turns.state.lock();
        if let Some(line) = state.lines.get_mut(&self.line.client) {
            line.waiting.remove(&self.number);
        }
        state.tidy();
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut state = self.line.turns.state.lock();
        state.free += 1;
        if let Some(line) = state.lines.get_mut(&self.line.client) {
            line.held -= 1;
        }
        state.tidy();
        drop(state);
        self.line.turns.give();
    }
}

impl State {
    /// Takes the next turn, and out of its line who gets it.
    fn next(&mut self, clients: &Clients) -> Option<(Client, oneshot::Sender<Turn>)> {
        let free = self.free;
        let can = self.lines.iter_mut().filter(|(_, line)| line.held < free);
        let first = |line: &Waiting| line.waiting.keys().next().copied();
        let (client, line) = can
            .filter_map(|(client, line)| Some(((line.tag, first(line)?), client, line)))
            .min_by_key(|(rank, ..)| *rank)
            .map(|(_, client, line)| (client.clone(), line))?;
        let (_, waiting) = line.waiting.pop_first()?;
        self.free -= 1;
        line.held += 1;
        self.latest = line.tag;
        line.tag += STEP / u64::from(clients.share(&client));
        Some((client, waiting))
    }

    /// Forgets clients that have nothing here, unless they have had more than others.
    fn tidy(&mut self) {
        let latest = self.latest;
        self.lines.retain(|_, line| line.held > 0 || !line.waiting.is_empty() || line.tag > latest);
        if self.lines.values().all(|line| line.held == 0 && line.waiting.is_empty()) {
            self.lines.clear();
            self.latest = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;

    use futures::{FutureExt, future::BoxFuture, poll};

    use super::*;
    use crate::{Pattern, Patterns};

    fn turns(number: usize) -> Turns {
        Turns::new(number, &Clients::default())
    }

    fn user(turns: &Turns, uid: u32) -> Line {
        turns.line(&Client::User(uid))
    }

    /// So many calls of a client that wait.
    fn waiting(line: &Line, calls: usize) -> Vec<Pin<Box<dyn Future<Output = Turn> + Send>>> {
        let call = |_| {
            let line = line.clone();
            let mut call: BoxFuture<'_, Turn> = async move { line.turn().await }.boxed();
            assert!((&mut call).now_or_never().is_none());
            call
        };
        (0..calls).map(call).collect()
    }

    #[tokio::test]
    async fn the_next_turn_goes_to_another_however_many_calls_of_one_wait() {
        for number in [1, 2, 7, 64] {
            let turns = turns(number);
            let (one, other) = (user(&turns, 1), user(&turns, 2));
            // Of others, since one client alone can't hold all.
            let mut held: Vec<_> = (3..1000).map_while(|uid| user(&turns, uid).turn().now_or_never()).collect();
            assert_eq!(held.len(), number);
            let mut many = waiting(&one, 1000);
            let mut call = waiting(&other, 1).remove(0);
            drop(held.pop());
            // Each gives its turn back at once.
            let got = many.iter_mut().filter_map(FutureExt::now_or_never).count();
            assert_eq!(got, 1, "it came first, and then it was the other's turn");
            assert!(call.as_mut().now_or_never().is_some(), "{number}");
        }
    }

    #[tokio::test]
    async fn clients_get_turns_by_their_shares() {
        let mut shares = Patterns::default();
        for (uid, share) in [(1, 1), (2, 3)] {
            shares.insert(Pattern::Exact(Client::User(uid)), share);
        }
        let turns = Turns::new(1, &Clients::new([], Some(shares)));
        let mut got = [0, 0];
        let held = user(&turns, 0).turn().await;
        let mut lines = [1, 2].map(|uid| waiting(&user(&turns, uid), 100));
        drop(held);
        for _ in 0..80 {
            for (calls, got) in lines.iter_mut().zip(&mut got) {
                let before = calls.len();
                calls.retain_mut(|call| call.now_or_never().is_none());
                *got += before - calls.len();
            }
        }
        let total: usize = got.iter().sum();
        assert!(total > 40 && got[1].abs_diff(3 * got[0]) <= 3, "{got:?}");
    }

    #[tokio::test]
    async fn a_client_leaves_as_many_turns_as_it_holds() {
        let turns = turns(12);
        let take = |uid| -> Vec<_> { std::iter::from_fn(|| user(&turns, uid).turn().now_or_never()).collect() };
        let one = take(1);
        let other = take(2);
        let third = take(3);
        assert_eq!([&one, &other, &third].map(Vec::len), [6, 3, 2]);
        drop((one, other, third));
        assert_eq!(turns.state.lock().lines.len(), 0);
    }

    #[tokio::test]
    async fn calls_that_are_given_up_take_no_turn() {
        let turns = turns(1);
        let held = user(&turns, 1).turn().await;
        let gone = waiting(&user(&turns, 2), 1000);
        let mut call = waiting(&user(&turns, 3), 1).remove(0);
        drop(gone);
        drop(held);
        let turn = poll!(&mut call);
        assert!(turn.is_ready());
        // One that was given and never taken.
        let mut next = waiting(&user(&turns, 2), 1);
        drop(turn);
        next.clear();
        user(&turns, 1).turn().now_or_never().expect("it was given back");
        assert_eq!(turns.state.lock().lines.len(), 0);
    }
}
