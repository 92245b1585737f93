//! Decides which waiting build starts next. It is pure: no locks, no I/O, and times are passed in.
//!
//! ```text
//!   push ──▶ waiting ──next──▶ running ──finish──▶ gone
//!     │         └────remove───────────────────────▶ gone
//!     └──▶ Refusal
//! ```
//!
//! While the queue is [held](Queue::hold), nothing starts, and all places stay as they are.
//!
//! After each [`push`](Queue::push), [`finish`](Queue::finish), [`give_back`](Queue::give_back) and [`remove`](Queue::remove) the owner of a [`Queue`] calls
//! [`next`](Queue::next) until that returns `None`, and starts the builds that it returns.
//!
//! **Cost.** A build costs the largest of its shares of the budget's memory, CPUs and builds, as a fraction of
//! [`MACHINE`].
//!
//! **Charge.** A build is charged its cost times its duration in milliseconds, divided by its client's share. Until it has ended,
//! its duration is taken for the mean of its client's builds; then the difference is made up for. A shorter duration than
//! [`LEAST_CHARGED`] is taken for that: while builds come and go, their places stand empty for a part of the time, and a client whose
//! builds all fail at once would get that time back from others.
//!
//! **Order.** Start-time fair queueing: a build's tag is the total charge of its client's earlier builds, and the lowest tag is
//! first. A client without waiting builds joins at the virtual time. That time is never behind the first waiting build, and
//! the end of each build moves it on by the build's cost times its duration, divided by the shares of all clients. So a client can't
//! save up, and a stream of new clients can't keep others waiting for ever. A start doesn't move it, since durations that were only
//! assumed would put off everybody who joins later. What a client used while nobody wanted the machine is forgotten when it idles.
//!
//! **Overtaking.** Later builds that fit overtake a build that doesn't, so that the machine is used. Two rules bound that:
//!
//! - A build may start only if its tag is at most [`WINDOW`] times the mean duration after the first one's. So if all builds take
//!   as long, two clients with equal shares that always have builds waiting differ in what they got by at most
//!   `WINDOW + MACHINE` of it.
//! - A build that was overtaken by builds of a whole [`MACHINE`]'s cost reserves the machine. Nothing else starts before it.
//!
//! **Bounded clients.** Builds of a client that runs as many as it may are passed over as if they weren't there: they hold nothing up
//! and nothing overtakes them. The same goes for a build for which its client's running builds leave too little of the disk, and for
//! the client's later ones, so that they can't keep it waiting for ever.

use std::{
    collections::{BTreeMap, HashMap, VecDeque, btree_map::Entry},
    time::{Duration, Instant},
};

mod answers;
mod budget;
mod client_bounds;
#[cfg(test)]
mod tests;

use self::client_bounds::{ClientBounds, bound};
pub(crate) use self::{
    answers::{Refusal, Waiting},
    budget::{Budget, Load, Need},
};
use crate::tenants::Terms;

/// The cost of a build that needs all of the budget.
pub(crate) const MACHINE: u64 = 1 << 20;

/// Most by which the tag of an overtaking build may exceed the first one's, for a mean duration of a millisecond.
pub(crate) const WINDOW: u64 = 2 * MACHINE;

/// The shortest retry hint.
const MIN_RETRY: Duration = Duration::from_secs(1);

/// The longest retry hint.
const MAX_RETRY: Duration = Duration::from_secs(10 * 60);

/// The assumed duration of builds for retry hints, until one has finished.
const GUESSED_DURATION: Duration = Duration::from_secs(60);

/// The assumed duration of builds for charges, until one has finished.
const ASSUMED_DURATION: Duration = Duration::from_secs(1);

/// The shortest duration for charges. No build that boots a machine is as short.
const LEAST_CHARGED: Duration = Duration::from_millis(50);

/// The weight of the newest duration in the mean is one in so many.
const DURATIONS: u32 = 8;

/// How many builds may wait. Each is at least 1, since every build waits for a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// Of all clients together.
    pub queued: usize,
    /// Of one client.
    pub queued_per_client: usize,
}

/// Identifies a build in the queue. Tickets ascend and are never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Ticket(u64);

/// The waiting and the running builds of the clients `C`.
#[derive(Debug)]
pub(crate) struct Queue<C> {
    budget: Budget,
    bounds: Bounds,
    used: Budget,
    waiting: BTreeMap<Rank, Build<C>>,
    /// Where in `waiting` each ticket is.
    ranks: HashMap<Ticket, Rank>,
    running: HashMap<Ticket, Running<C>>,
    /// The running builds of each client that has any.
    running_of: BTreeMap<C, Load>,
    clients: BTreeMap<C, Client>,
    virtual_time: u64,
    /// The build that has reserved the machine.
    reserved: Option<Rank>,
    /// Whether nothing starts for want of disk space.
    held: bool,
    next_ticket: u64,
    mean_duration: Option<Duration>,
}

/// A place in the order. Unique by its ticket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    tag: u64,
    ticket: Ticket,
}

#[derive(Debug)]
struct Build<C> {
    client: C,
    need: Need,
    cost: u64,
    charge: u64,
    /// The cost of the builds that have overtaken it.
    overtaken: u64,
}

#[derive(Debug)]
struct Running<C> {
    client: C,
    terms: Terms,
    need: Need,
    cost: u64,
    charge: u64,
    started: Instant,
}

#[derive(Debug, Default)]
struct Client {
    terms: Terms,
    /// The tag of its next build.
    tag: u64,
    waiting: VecDeque<Ticket>,
    mean_duration: Option<Duration>,
}

impl Client {
    /// The tag that its next build gets.
    fn next_tag(&self, now: u64) -> u64 {
        if self.waiting.is_empty() { self.tag.max(now) } else { self.tag }
    }

    /// What it is charged for a build of this cost and duration.
    fn charge(&self, cost: u64, duration: Duration) -> u64 {
        (times(cost, duration.max(LEAST_CHARGED)) / u64::from(self.terms.share.max(1))).max(1)
    }
}

impl<C: Ord + Clone> Queue<C> {
    /// An empty queue.
    pub(crate) fn new(budget: Budget, bounds: Bounds) -> Self {
        Self {
            budget,
            bounds,
            used: Budget::default(),
            waiting: BTreeMap::new(),
            ranks: HashMap::new(),
            running: HashMap::new(),
            running_of: BTreeMap::new(),
            clients: BTreeMap::new(),
            virtual_time: 0,
            reserved: None,
            held: false,
            next_ticket: 0,
            mean_duration: None,
        }
    }

    /// Puts a build into the queue, even if it can start at once.
    ///
    /// # Errors
    ///
    /// It would never start, or too many wait.
    pub(crate) fn push(&mut self, client: C, terms: Terms, need: Need) -> Result<Ticket, Refusal> {
        self.check_budget(need)?;
        if let Some(allowed) = terms.disk.filter(|allowed| need.disk_bytes > *allowed) {
            return Err(Refusal::Disk { needed: need.disk_bytes, allowed });
        }
        let of_client = self.clients.get(&client).map_or(0, |client| client.waiting.len());
        let Bounds { queued, queued_per_client } = self.bounds;
        let queued_per_client = terms.queued.unwrap_or(queued_per_client);
        if of_client >= queued_per_client {
            let retry_after = self.retry_after(self.clients.len());
            return Err(Refusal::Full { limit: "queued_per_client", bound: queued_per_client, retry_after });
        }
        if self.waiting.len() >= queued {
            return Err(Refusal::Full { limit: "queued", bound: queued, retry_after: self.retry_after(1) });
        }
        Ok(self.insert(client, terms, need))
    }

    /// Counts a waiting build as another client's, too: it gets that client's next place, if that is better and the client may
    /// have one more build waiting. Returns its new ticket then.
    pub(crate) fn join(&mut self, ticket: Ticket, client: &C, terms: Terms) -> Option<Ticket> {
        let rank = *self.ranks.get(&ticket)?;
        let now = self.virtual_now();
        let tag = self.clients.get(client).map_or(now, |client| client.next_tag(now));
        let of_client = self.clients.get(client).map_or(0, |client| client.waiting.len());
        let most = terms.queued.unwrap_or(self.bounds.queued_per_client);
        if tag >= rank.tag || of_client >= most || self.reserved == Some(rank) {
            return None;
        }
        let (need, overtaken) = self.waiting.get(&rank).map(|build| (build.need, build.overtaken))?;
        if terms.disk.is_some_and(|allowed| need.disk_bytes > allowed) {
            return None;
        }
        self.remove(ticket);
        let ticket = self.insert(client.clone(), terms, need);
        if let Some(build) = self.ranks.get(&ticket).and_then(|rank| self.waiting.get_mut(rank)) {
            build.overtaken = overtaken;
        }
        Some(ticket)
    }

    fn insert(&mut self, client: C, terms: Terms, need: Need) -> Ticket {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        let (cost, now, mean) = (self.cost(need), self.virtual_now(), self.mean_duration.unwrap_or(ASSUMED_DURATION));
        let state = self.clients.entry(client.clone()).or_default();
        state.terms = terms;
        let charge = state.charge(cost, state.mean_duration.unwrap_or(mean));
        state.tag = state.next_tag(now);
        let rank = Rank { tag: state.tag, ticket };
        state.tag = state.tag.saturating_add(charge);
        state.waiting.push_back(ticket);
        self.ranks.insert(ticket, rank);
        self.waiting.insert(rank, Build { client, need, cost, charge, overtaken: 0 });
        ticket
    }

    /// Has all builds wait for disk space, or no longer. `true` if that is a change.
    pub(crate) fn hold(&mut self, held: bool) -> bool {
        std::mem::replace(&mut self.held, held) != held
    }

    /// Starts a build, if one can start at `now`.
    pub(crate) fn next(&mut self, now: Instant) -> Option<Ticket> {
        let rank = self.choose()?;
        let build = self.leave(rank)?;
        let mut bounds = ClientBounds::new(&self.clients, &self.running_of);
        for (_, overtaken) in self.waiting.range_mut(..rank) {
            if bounds.let_start(&overtaken.client, overtaken.need) {
                overtaken.overtaken += build.cost;
            }
        }
        let terms = self.clients.get(&build.client).map(|client| client.terms).unwrap_or_default();
        self.used.memory_bytes += build.need.memory_bytes;
        self.used.cpus += build.need.cpus;
        self.used.builds += 1;
        let Build { client, need, cost, charge, .. } = build;
        let load = self.running_of.entry(client.clone()).or_default();
        load.builds += 1;
        load.disk_bytes = load.disk_bytes.saturating_add(need.disk_bytes);
        let (now_virtual, running_of) = (self.virtual_now(), &self.running_of);
        self.clients.retain(|name, client| {
            !client.waiting.is_empty() || client.tag > now_virtual || running_of.contains_key(name)
        });
        self.running.insert(rank.ticket, Running { client, terms, need, cost, charge, started: now });
        Some(rank.ticket)
    }

    /// Frees what a running build uses; `false` if it doesn't run.
    pub(crate) fn finish(&mut self, ticket: Ticket, now: Instant) -> bool {
        let Some(Running { client, terms, need, cost, charge, started }) = self.running.remove(&ticket) else {
            return false;
        };
        self.used.memory_bytes -= need.memory_bytes;
        self.used.cpus -= need.cpus;
        self.used.builds -= 1;
        if let Entry::Occupied(mut running) = self.running_of.entry(client.clone()) {
            let load = running.get_mut();
            load.builds -= 1;
            load.disk_bytes = load.disk_bytes.saturating_sub(need.disk_bytes);
            if load.builds == 0 {
                running.remove();
            }
        }
        let duration = now.saturating_duration_since(started);
        self.mean_duration = Some(mean(self.mean_duration, duration));
        let state = self.clients.entry(client.clone()).or_default();
        state.terms = terms;
        state.mean_duration = Some(mean(state.mean_duration, duration));
        let actual = state.charge(cost, duration);
        let shares = self.clients.values().map(|client| u64::from(client.terms.share)).sum::<u64>();
        let passed = (times(cost, duration) / shares.max(1)).max(1);
        self.virtual_time = self.virtual_time.saturating_add(passed);
        self.shift(&client, Ticket(0), i128::from(actual) - i128::from(charge));
        if self.waiting.is_empty() && self.running.is_empty() {
            self.clients.clear();
        }
        true
    }

    /// Moves the tags of a client's waiting builds from a ticket on, and of its next one.
    fn shift(&mut self, client: &C, from: Ticket, by: i128) {
        let shifted = |tag: u64| u64::try_from(i128::from(tag) + by).unwrap_or(if by < 0 { 0 } else { u64::MAX });
        let Some(state) = self.clients.get_mut(client) else { return };
        state.tag = shifted(state.tag);
        let first = state.waiting.partition_point(|waiting| *waiting < from);
        for ticket in state.waiting.range(first..) {
            let Some(rank) = self.ranks.get_mut(ticket) else { continue };
            let Some(moved) = self.waiting.remove(rank) else { continue };
            let was_reserved = self.reserved == Some(*rank);
            rank.tag = shifted(rank.tag);
            self.waiting.insert(*rank, moved);
            if was_reserved {
                self.reserved = Some(*rank);
            }
        }
    }

    /// Frees memory that a running build doesn't need; `false` if it doesn't run.
    pub(crate) fn give_back(&mut self, ticket: Ticket, memory_bytes: u64) -> bool {
        let Some(Running { need, .. }) = self.running.get_mut(&ticket) else { return false };
        let freed = memory_bytes.min(need.memory_bytes);
        need.memory_bytes -= freed;
        self.used.memory_bytes -= freed;
        true
    }

    /// Takes a waiting build out of the queue, without a cost for its client. `false` if it doesn't wait.
    pub(crate) fn remove(&mut self, ticket: Ticket) -> bool {
        let now = self.virtual_now();
        let Some(build) = self.ranks.get(&ticket).copied().and_then(|rank| self.leave(rank)) else { return false };
        self.shift(&build.client, ticket, -i128::from(build.charge));
        let is_idle = |client: &Client| client.waiting.is_empty() && client.tag <= now;
        if !self.running_of.contains_key(&build.client) && self.clients.get(&build.client).is_some_and(is_idle) {
            self.clients.remove(&build.client);
        }
        true
    }

    /// The waiting builds in the order in which they start, as far as each fits when its turn comes.
    pub(crate) fn order(&self) -> impl Iterator<Item = Ticket> {
        let others = self.waiting.keys().filter(|rank| self.reserved != Some(**rank));
        self.reserved.iter().chain(others).map(|rank| rank.ticket)
    }

    /// What a build waits for; `None` if it doesn't wait.
    pub(crate) fn waiting_for(&self, ticket: Ticket) -> Option<Waiting> {
        let build = self.waiting.get(self.ranks.get(&ticket)?)?;
        if self.held {
            return Some(Waiting::Disk);
        }
        let bound = bound(&self.clients, &self.running_of, &build.client, build.need);
        Some(bound.or_else(|| self.lacks(build.need)).unwrap_or(Waiting::Turn))
    }

    /// What the running builds use.
    pub(crate) fn used(&self) -> Budget {
        self.used
    }

    /// Clients with running builds, and what these have.
    pub(crate) fn running_of(&self) -> &BTreeMap<C, Load> {
        &self.running_of
    }

    /// What they may use.
    pub(crate) fn budget(&self) -> Budget {
        self.budget
    }

    /// The place of the build to start.
    fn choose(&mut self) -> Option<Rank> {
        if self.held {
            return None;
        }
        if let Some(rank) = self.reserved {
            return self.lacks(self.waiting.get(&rank)?.need).is_none().then_some(rank);
        }
        let nothing_left = self.used.builds >= self.budget.builds
            || self.used.memory_bytes >= self.budget.memory_bytes
            || self.used.cpus >= self.budget.cpus;
        if nothing_left {
            return None;
        }
        let window = self.window();
        let mut bounds = ClientBounds::new(&self.clients, &self.running_of);
        let mut may_start =
            self.waiting.iter().filter(|(_, build)| bounds.let_start(&build.client, build.need)).peekable();
        let last_tag = may_start.peek()?.0.tag.saturating_add(window);
        for (rank, build) in may_start.take_while(|(rank, _)| rank.tag <= last_tag) {
            if self.lacks(build.need).is_none() {
                return Some(*rank);
            }
            if build.overtaken >= MACHINE {
                self.reserved = Some(*rank);
                return None;
            }
        }
        None
    }

    /// Forgets a waiting build, except for its client's tag.
    fn leave(&mut self, rank: Rank) -> Option<Build<C>> {
        let build = self.waiting.remove(&rank)?;
        self.ranks.remove(&rank.ticket);
        self.reserved = self.reserved.filter(|reserved| *reserved != rank);
        if let Some(client) = self.clients.get_mut(&build.client)
            && let Ok(index) = client.waiting.binary_search(&rank.ticket)
        {
            client.waiting.remove(index);
        }
        Some(build)
    }

    /// Brings the virtual time up to the first waiting build.
    fn virtual_now(&mut self) -> u64 {
        let first = self.waiting.keys().next().map_or(0, |first| first.tag);
        self.virtual_time = self.virtual_time.max(first);
        self.virtual_time
    }

    /// The resource that is short now, if any.
    fn lacks(&self, need: Need) -> Option<Waiting> {
        if self.used.builds >= self.budget.builds {
            Some(Waiting::Builds)
        } else if need.memory_bytes > self.budget.memory_bytes - self.used.memory_bytes {
            Some(Waiting::Memory)
        } else if need.cpus > self.budget.cpus - self.used.cpus {
            Some(Waiting::Cpus)
        } else {
            None
        }
    }

    fn check_budget(&self, need: Need) -> Result<(), Refusal> {
        let resources = [
            ("builds", 1, u64::from(self.budget.builds)),
            ("bytes of memory", need.memory_bytes, self.budget.memory_bytes),
            ("CPUs", u64::from(need.cpus), u64::from(self.budget.cpus)),
        ];
        match resources.into_iter().find(|(_, needed, budget)| needed > budget) {
            Some((resource, needed, budget)) => Err(Refusal::Unsatisfiable { resource, needed, budget }),
            None => Ok(()),
        }
    }

    /// Of a need that the budget can meet: from 1 to [`MACHINE`].
    fn cost(&self, need: Need) -> u64 {
        let share = |needed: u64, budget: u64| {
            let parts = u128::from(needed) * u128::from(MACHINE);
            u64::try_from(parts.div_ceil(u128::from(budget.max(1)))).unwrap_or(MACHINE)
        };
        share(need.memory_bytes, self.budget.memory_bytes)
            .max(share(need.cpus.into(), self.budget.cpus.into()))
            .max(share(1, self.budget.builds.into()))
    }

    /// Most by which the tag of an overtaking build may exceed the first one's.
    fn window(&self) -> u64 {
        times(WINDOW, self.mean_duration.unwrap_or(ASSUMED_DURATION))
    }

    /// The time until so many builds have left the queue, if running ones take the mean duration.
    fn retry_after(&self, turns: usize) -> Duration {
        let mean = self.mean_duration.unwrap_or(GUESSED_DURATION);
        let turns = u32::try_from(turns).unwrap_or(u32::MAX);
        (mean / self.used.builds.max(1)).saturating_mul(turns).clamp(MIN_RETRY, MAX_RETRY)
    }
}

/// The mean of durations with one more.
fn mean(known: Option<Duration>, latest: Duration) -> Duration {
    known.map_or(latest, |known| (known * (DURATIONS - 1) + latest) / DURATIONS)
}

/// A cost times a duration in milliseconds. Parts of a millisecond count, too: many builds fail within one.
fn times(cost: u64, duration: Duration) -> u64 {
    u64::try_from(u128::from(cost) * duration.as_micros() / 1000).unwrap_or(u64::MAX)
}
