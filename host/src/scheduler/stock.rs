//! Which standby machines are kept. It is pure: no locks, no I/O, and times are passed in.
//!
//! ```text
//!   demand ──▶ worth of each shape's next machine ──next──▶ booting ──ready──▶ in stock ──take──▶ a build
//!                                                              └────────┬─────────┘
//!                        lost · give way to a build · too old · worth too little · another image ──▶ gone
//! ```
//!
//! **Demand.** Every build that starts adds 1 to the demand for its shape, and demand halves every [`HALF_LIFE`].
//!
//! **Worth.** The nth machine of a shape is worth the shape's demand divided by n. The machine that is worth most is booted
//! next, if it is worth at least [`BOOT_WORTH`]. One that is worth less than [`LEAST_WORTH`] leaves: a single build keeps one
//! machine in stock for one half-life. With the stock full, the next machine takes the place of the least worthy one only if it
//! is worth [`DISPLACES`] times as much. So two shapes in equal demand don't drive each other out.
//!
//! **Bounds.** The stock has at most so many machines and so much memory, and only what builds leave of the budget. One machine
//! boots at a time, and none while a build waits or takes a machine. A machine leaves when it has reached its age. After one was
//! lost, none boots for [`PAUSE`].

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

use super::queue::{Budget, Need};

#[cfg(test)]
mod tests;

/// The time in which demand halves.
const HALF_LIFE: Duration = Duration::from_secs(60 * 60);

/// The least worth for which a machine boots. It is more than [`LEAST_WORTH`], so that the machine doesn't leave at once.
const BOOT_WORTH: f64 = 0.75;

/// The least worth of a machine in stock.
const LEAST_WORTH: f64 = 0.5;

/// How many times as much as another's a machine's worth must be to take its place.
const DISPLACES: f64 = 2.0;

/// How long no machine boots after one was lost, so that an image that can't boot doesn't keep the processors busy.
const PAUSE: Duration = Duration::from_secs(60);

/// Most shapes whose demand is known. Those in the least demand are forgotten.
const MAX_SHAPES: usize = 64;

/// Bounds on the stock. Without machines there is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct StockBounds {
    /// Machines at a time.
    pub machines: u32,
    /// Memory of the host for all of them, in bytes.
    pub memory_bytes: u64,
    /// How long a machine is kept.
    pub age: Duration,
}

/// Identifies a machine in stock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MachineId(u64);

/// Demand for a shape.
#[derive(Debug)]
struct Demand {
    need: Need,
    /// At the time `at`.
    value: f64,
    at: Instant,
}

impl Demand {
    fn now(&self, now: Instant) -> f64 {
        let half_lives = now.saturating_duration_since(self.at).as_secs_f64() / HALF_LIFE.as_secs_f64();
        self.value * (-half_lives).exp2()
    }

    /// When it has fallen to this value. `None` if it never was as high.
    fn falls_to(&self, value: f64) -> Option<Instant> {
        let half_lives = (self.value / value).log2();
        (half_lives >= 0.0).then(|| self.at + HALF_LIFE.mul_f64(half_lives))
    }
}

#[derive(Debug)]
struct Machine<S, E, M> {
    id: MachineId,
    shape: S,
    environment: E,
    need: Need,
    since: Instant,
    is_ready: bool,
    machine: M,
}

/// A machine to boot.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Order<S> {
    pub(super) shape: S,
    need: Need,
}

/// The machines `M` of the shapes `S` in the environments `E`.
#[derive(Debug)]
pub(super) struct Stock<S, E, M> {
    bounds: StockBounds,
    demand: HashMap<S, Demand>,
    machines: Vec<Machine<S, E, M>>,
    next_id: u64,
    paused_until: Option<Instant>,
}

impl<S: Copy + Eq + Hash, E: Copy + Eq, M> Stock<S, E, M> {
    /// An empty stock.
    pub(super) fn new(bounds: StockBounds) -> Self {
        Self { bounds, demand: HashMap::new(), machines: Vec::new(), next_id: 0, paused_until: None }
    }

    /// Counts a build of this shape.
    pub(super) fn count(&mut self, shape: S, need: Need, now: Instant) {
        let value = 1.0 + self.demand.get(&shape).map_or(0.0, |demand| demand.now(now));
        self.demand.insert(shape, Demand { need, value, at: now });
        if self.demand.len() > MAX_SHAPES {
            let least = self.demand.iter().min_by(|(_, a), (_, b)| a.now(now).total_cmp(&b.now(now)));
            if let Some(least) = least.map(|(shape, _)| *shape) {
                self.demand.remove(&least);
            }
        }
    }

    /// Takes a machine for a build; one that is ready before one that boots.
    pub(super) fn take(&mut self, shape: S, environment: E) -> Option<M> {
        let fits = |one: &&Machine<S, E, M>| one.shape == shape && one.environment == environment;
        let id = self.machines.iter().filter(fits).min_by_key(|one| !one.is_ready)?.id;
        self.remove(id)
    }

    /// Gives up machines until the others fit into this room; those that are worth least go first.
    pub(super) fn fit_into(&mut self, room: Budget, now: Instant) -> Vec<M> {
        let mut gone = Vec::new();
        while !self.used().fits(room)
            && let Some((id, _)) = self.least_worthy(now)
        {
            gone.extend(self.remove(id));
        }
        gone
    }

    /// Gives up the machines of all other environments.
    pub(super) fn keep(&mut self, environment: E) -> Vec<M> {
        self.remove_all(|one| one.environment != environment)
    }

    /// Gives up all machines.
    pub(super) fn clear(&mut self) -> Vec<M> {
        self.remove_all(|_| true)
    }

    /// Gives up machines that are too old or worth too little.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<M> {
        let age = self.bounds.age;
        let mut gone = self.remove_all(|one| now.saturating_duration_since(one.since) >= age);
        while let Some((id, worth)) = self.least_worthy(now)
            && worth < LEAST_WORTH
        {
            gone.extend(self.remove(id));
        }
        gone
    }

    /// The machine to boot next in what builds leave of the budget, and the one that gives it its place.
    pub(super) fn next(&mut self, room: Budget, now: Instant) -> Option<(Order<S>, Option<M>)> {
        if self.machines.iter().any(|one| !one.is_ready) || self.paused_until.is_some_and(|until| now < until) {
            return None;
        }
        let worth = |shape: &S, demand: &Demand| demand.now(now) / (self.of_shape(*shape) + 1.0);
        let mut wanted: Vec<_> = self.demand.iter().map(|(shape, demand)| (worth(shape, demand), *shape)).collect();
        wanted.retain(|(worth, _)| *worth >= BOOT_WORTH);
        wanted.sort_by(|(a, _), (b, _)| b.total_cmp(a));
        let weakest = self.least_worthy(now);
        for (worth, shape) in wanted {
            let need = self.demand.get(&shape)?.need;
            if self.has_room(need, None, room) {
                return Some((Order { shape, need }, None));
            }
            if let Some((id, other)) = weakest
                && worth >= DISPLACES * other
                && self.has_room(need, Some(id), room)
            {
                return Some((Order { shape, need }, self.remove(id)));
            }
        }
        None
    }

    /// Notes that a machine boots.
    pub(super) fn add(&mut self, order: &Order<S>, environment: E, now: Instant, machine: impl FnOnce(MachineId) -> M) {
        let id = MachineId(self.next_id);
        self.next_id += 1;
        let Order { shape, need } = *order;
        let machine = machine(id);
        self.machines.push(Machine { id, shape, environment, need, since: now, is_ready: false, machine });
    }

    /// A machine has booted. `false` if it isn't in stock any more.
    pub(super) fn ready(&mut self, id: MachineId) -> bool {
        let found = self.machines.iter_mut().find(|one| one.id == id);
        found.is_some_and(|one| !std::mem::replace(&mut one.is_ready, true))
    }

    /// A machine did not boot, or has died. `None` if it isn't in stock any more.
    pub(super) fn lost(&mut self, id: MachineId, now: Instant) -> Option<M> {
        let machine = self.remove(id)?;
        self.paused_until = Some(now + PAUSE);
        Some(machine)
    }

    /// When [`expire`](Self::expire) or [`next`](Self::next) may have an answer that they haven't now.
    pub(super) fn due(&self, now: Instant) -> Option<Instant> {
        let old = self.machines.iter().map(|one| one.since + self.bounds.age);
        let worthless = self.machines.iter().filter_map(|one| {
            // A moment later it is less.
            let at = self.demand.get(&one.shape)?.falls_to(LEAST_WORTH * self.of_shape(one.shape))?;
            Some(at + Duration::from_millis(1))
        });
        old.chain(worthless).chain(self.paused_until).filter(|at| *at > now).min()
    }

    /// What the machines take of the budget.
    pub(super) fn used(&self) -> Budget {
        self.machines.iter().fold(Budget::default(), |used, one| used.with(one.need))
    }

    /// How many machines boot, and how many are ready.
    pub(super) fn counts(&self) -> (usize, usize) {
        let ready = self.machines.iter().filter(|one| one.is_ready).count();
        (self.machines.len() - ready, ready)
    }

    fn has_room(&self, need: Need, without: Option<MachineId>, room: Budget) -> bool {
        let others = self.machines.iter().filter(|one| Some(one.id) != without);
        let used = others.fold(Budget::default().with(need), |used, one| used.with(one.need));
        let bounds = Budget { memory_bytes: self.bounds.memory_bytes, cpus: u32::MAX, builds: self.bounds.machines };
        used.fits(room) && used.fits(bounds)
    }

    fn of_shape(&self, shape: S) -> f64 {
        self.machines.iter().fold(0.0, |count, one| count + if one.shape == shape { 1.0 } else { 0.0 })
    }

    /// The machine to give up first, and its worth: of equal ones the one that boots, or the youngest.
    fn least_worthy(&self, now: Instant) -> Option<(MachineId, f64)> {
        let worth = |one: &Machine<S, E, M>| {
            self.demand.get(&one.shape).map_or(0.0, |demand| demand.now(now) / self.of_shape(one.shape))
        };
        self.machines.iter().rev().map(|one| (one.id, worth(one))).min_by(|(_, a), (_, b)| a.total_cmp(b))
    }

    fn remove(&mut self, id: MachineId) -> Option<M> {
        let index = self.machines.iter().position(|one| one.id == id)?;
        Some(self.machines.remove(index).machine)
    }

    fn remove_all(&mut self, is_gone: impl Fn(&Machine<S, E, M>) -> bool) -> Vec<M> {
        self.machines.extract_if(.., |one| is_gone(one)).map(|one| one.machine).collect()
    }
}
