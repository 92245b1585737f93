//! Any sequence of requests and ends, against a model of the queue.

use std::collections::BTreeMap;

use proptest::{collection::vec, prelude::*};

use super::*;

/// One client may run a single build, another two, and one has little of the disk.
fn terms(client: u8) -> Terms {
    let running = match client {
        4 => Some(1),
        5 => Some(2),
        _ => None,
    };
    Terms { running, disk: (client == 6).then_some(10), ..Terms::default() }
}

/// A queue, and a model of it made of simple lists.
struct Checked {
    queue: Queue<u8>,
    waiting: Vec<(Ticket, u8, Need)>,
    running: Vec<(Ticket, u8, Need)>,
    started_cost: BTreeMap<u8, u64>,
}

impl Checked {
    fn new(bounds: Bounds) -> Self {
        let queue = Queue::new(BUDGET, bounds);
        Self { queue, waiting: Vec::new(), running: Vec::new(), started_cost: BTreeMap::new() }
    }

    fn push(&mut self, client: u8, need: Need) -> Option<Ticket> {
        let of_client = self.waiting.iter().filter(|(_, other, _)| *other == client).count();
        let pushed = self.queue.push(client, terms(client), need);
        match &pushed {
            Ok(ticket) => {
                assert!(self.waiting.len() < self.queue.bounds.queued);
                assert!(of_client < self.queue.bounds.queued_per_client);
                self.waiting.push((*ticket, client, need));
            }
            Err(Refusal::Unsatisfiable { .. }) => {
                assert!(need.memory_bytes > BUDGET.memory_bytes || need.cpus > BUDGET.cpus);
            }
            Err(Refusal::Disk { .. }) => assert!(terms(client).disk.is_some_and(|most| need.disk_bytes > most)),
            Err(Refusal::Full { limit: "queued", .. }) => assert_eq!(self.waiting.len(), self.queue.bounds.queued),
            Err(Refusal::Full { .. }) => assert_eq!(of_client, self.queue.bounds.queued_per_client),
        }
        pushed.ok()
    }

    fn free(&self) -> (u64, u32, usize) {
        let memory: u64 = self.running.iter().map(|(_, _, need)| need.memory_bytes).sum();
        let cpus: u32 = self.running.iter().map(|(_, _, need)| need.cpus).sum();
        // Underflows, and so panics, if the budget is exceeded.
        (BUDGET.memory_bytes - memory, BUDGET.cpus - cpus, BUDGET.builds as usize - self.running.len())
    }

    fn is_bounded(&self, client: u8, need: Need) -> bool {
        let running: Vec<_> = self.running.iter().filter(|(_, other, _)| *other == client).collect();
        let disk_bytes: u64 = running.iter().map(|(_, _, need)| need.disk_bytes).sum();
        terms(client).running.is_some_and(|most| running.len() >= most as usize)
            || terms(client).disk.is_some_and(|most| disk_bytes + need.disk_bytes > most)
    }

    /// Whether an earlier build of its client must wait for the client's own builds.
    fn is_behind(&self, ticket: Ticket, client: u8) -> bool {
        let mut earlier = self.waiting.iter().filter(|(other, of, _)| *of == client && *other < ticket);
        earlier.any(|(_, client, need)| self.is_bounded(*client, *need))
    }

    fn fits(&self, client: u8, need: Need) -> bool {
        let (memory, cpus, builds) = self.free();
        need.memory_bytes <= memory && need.cpus <= cpus && builds > 0 && !self.is_bounded(client, need)
    }

    fn next(&mut self) -> Option<Ticket> {
        let Some(ticket) = self.queue.next(at(0)) else {
            assert!(!self.running.is_empty() || self.waiting.is_empty(), "an idle machine starts something");
            let may_start = |ticket, client, need| self.fits(client, need) && !self.is_behind(ticket, client);
            let starts = self.waiting.iter().find(|(ticket, client, need)| may_start(*ticket, *client, *need));
            assert!(starts.is_none() || self.queue.reserved.is_some() || self.is_beyond_window(), "{starts:?}");
            return None;
        };
        let index = self.waiting.iter().position(|(waiting, _, _)| *waiting == ticket).expect("it waits");
        let (_, client, need) = self.waiting.remove(index);
        assert!(self.fits(client, need) && !self.is_behind(ticket, client));
        let earlier = &self.waiting[..index];
        assert!(
            !earlier.iter().any(|(_, other, need)| *other == client && self.fits(client, *need)),
            "a client's own order"
        );
        self.running.push((ticket, client, need));
        *self.started_cost.entry(client).or_default() += self.queue.cost(need);
        Some(ticket)
    }

    fn is_beyond_window(&self) -> bool {
        let is_able = |rank: &Rank, build: &Build<u8>| {
            !self.is_bounded(build.client, build.need) && !self.is_behind(rank.ticket, build.client)
        };
        let mut able = self.queue.waiting.iter().filter(|(rank, build)| is_able(rank, build));
        let Some(first) = able.next().map(|(rank, _)| rank.tag) else { return true };
        let mut fitting = able.filter(|(_, build)| self.fits(build.client, build.need));
        fitting.all(|(rank, _)| rank.tag > first + self.queue.window())
    }

    fn finish(&mut self, index: usize) {
        if !self.running.is_empty() {
            let (ticket, ..) = self.running.remove(index % self.running.len());
            assert!(self.queue.finish(ticket, at(1)));
            assert!(!self.queue.finish(ticket, at(1)) && !self.queue.remove(ticket));
        }
    }

    fn give_back(&mut self, index: usize, memory_bytes: u64) {
        if !self.running.is_empty() {
            let index = index % self.running.len();
            let (ticket, _, need) = &mut self.running[index];
            assert!(self.queue.give_back(*ticket, memory_bytes));
            need.memory_bytes = need.memory_bytes.saturating_sub(memory_bytes);
        }
        if let Some((waiting, _, _)) = self.waiting.first() {
            assert!(!self.queue.give_back(*waiting, memory_bytes));
        }
    }

    fn remove(&mut self, index: usize) {
        if !self.waiting.is_empty() {
            let (ticket, _, _) = self.waiting.remove(index % self.waiting.len());
            assert!(self.queue.remove(ticket));
            assert!(!self.queue.remove(ticket) && !self.queue.finish(ticket, at(1)));
            assert!(self.queue.order().all(|other| other != ticket) && self.queue.waiting_for(ticket).is_none());
        }
    }

    fn join(&mut self, index: usize, client: u8) {
        if self.waiting.is_empty() {
            return;
        }
        let index = index % self.waiting.len();
        let (ticket, _, need) = self.waiting[index];
        let place = |queue: &Queue<u8>, wanted| queue.order().position(|ticket| ticket == wanted).expect("it waits");
        let before = place(&self.queue, ticket);
        if let Some(moved) = self.queue.join(ticket, &client, terms(client)) {
            assert!(!self.queue.remove(ticket) && place(&self.queue, moved) <= before);
            self.waiting.remove(index);
            self.waiting.push((moved, client, need));
        }
    }

    fn check(&self) {
        let (memory, cpus, builds) = self.free();
        let used = self.queue.used();
        assert_eq!(used.memory_bytes, BUDGET.memory_bytes - memory);
        assert_eq!((used.cpus, used.builds as usize), (BUDGET.cpus - cpus, BUDGET.builds as usize - builds));
        let mut order: Vec<_> = self.queue.order().collect();
        order.sort_unstable();
        assert_eq!(order, self.waiting.iter().map(|(ticket, _, _)| *ticket).collect::<Vec<_>>());
        for (ticket, client, need) in &self.waiting {
            let waiting = self.queue.waiting_for(*ticket);
            assert_eq!(waiting == Some(Waiting::Turn), self.fits(*client, *need));
            let is_bounded = matches!(waiting, Some(Waiting::Tenant { .. } | Waiting::Quota { .. }));
            assert_eq!(is_bounded, self.is_bounded(*client, *need));
        }
        assert_eq!(self.queue.ranks.len(), self.waiting.len());
        assert_eq!(self.queue.running.len(), self.running.len());
        let of_clients: usize = self.queue.clients.values().map(|client| client.waiting.len()).sum();
        assert_eq!(of_clients, self.waiting.len());
    }

    /// Runs all builds. `choices` picks the next one to end.
    fn drain(&mut self, mut choices: impl Iterator<Item = usize>) {
        while !self.waiting.is_empty() || !self.running.is_empty() {
            while self.next().is_some() {}
            self.check();
            self.finish(choices.next().unwrap_or_default());
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Push(u8, Need),
    Next,
    Finish(usize),
    GiveBack(usize, u64),
    Remove(usize),
    Join(usize, u8),
}

fn arb_need() -> impl Strategy<Value = Need> {
    let exact = (1..=16_u64, 1..=8_u32, 0..12_u64);
    let exact = exact.prop_map(|(gib, cpus, disk_bytes)| Need { memory_bytes: gib * GIB, cpus, disk_bytes });
    prop_oneof![6 => Just(SMALL), 1 => Just(WHOLE), 6 => exact]
}

fn arb_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..7_u8, arb_need()).prop_map(|(client, need)| Step::Push(client, need)),
        1 => Just(Step::Push(0, Need { memory_bytes: 17 * GIB, cpus: 1, disk_bytes: 0 })),
        4 => Just(Step::Next),
        2 => any::<usize>().prop_map(Step::Finish),
        1 => (any::<usize>(), 0..20 * GIB).prop_map(|(index, bytes)| Step::GiveBack(index, bytes)),
        1 => any::<usize>().prop_map(Step::Remove),
        1 => (any::<usize>(), 0..7_u8).prop_map(|(index, client)| Step::Join(index, client)),
    ]
}

proptest! {
    #[test]
    fn the_budget_and_the_bounds_hold_and_nothing_is_lost(steps in vec(arb_step(), 0..200), choices in vec(any::<usize>(), 0..50)) {
        let mut checked = Checked::new(BOUNDS);
        for step in steps {
            match step {
                Step::Push(client, need) => drop(checked.push(client, need)),
                Step::Next => drop(checked.next()),
                Step::Finish(index) => checked.finish(index),
                Step::GiveBack(index, bytes) => checked.give_back(index, bytes),
                Step::Remove(index) => checked.remove(index),
                Step::Join(index, client) => checked.join(index, client),
            }
            checked.check();
        }
        checked.drain(choices.into_iter());
        prop_assert_eq!(checked.queue.used(), Budget::default());
        // The next start forgets clients without builds.
        checked.push(200, SMALL);
        checked.next();
        prop_assert!(checked.queue.clients.len() <= 8, "{:?}", checked.queue.clients);
    }

    #[test]
    fn clients_that_always_wait_get_as_much(
        needs in vec(vec(arb_need(), 1..6), 2..5),
        choices in vec(any::<usize>(), 300),
    ) {
        let mut checked = Checked::new(WIDE);
        let mut endless: Vec<_> = needs.iter().map(|needs| needs.iter().cycle()).collect();
        let mut top_up = |checked: &mut Checked| {
            for (client, needs) in (0..).zip(&mut endless) {
                while checked.waiting.iter().filter(|(_, other, _)| *other == client).count() < 20 {
                    checked.push(client, *needs.next().unwrap());
                }
            }
        };
        for choice in choices {
            top_up(&mut checked);
            while checked.next().is_some() {
                top_up(&mut checked);
                let got = (0..needs.len() as u8).map(|client| checked.started_cost.get(&client).copied().unwrap_or(0));
                let (least, most) = (got.clone().min().unwrap(), got.max().unwrap());
                prop_assert!(most - least <= WINDOW + MACHINE, "{:?}", checked.started_cost);
            }
            checked.finish(choice);
        }
    }

    #[test]
    fn positions_are_the_order_of_the_starts(
        pushes in vec((0..5_u8, arb_need()), 1..40),
        starts in 0..10_usize,
        removes in vec(any::<usize>(), 0..10),
    ) {
        let mut checked = Checked::new(WIDE);
        checked.queue.budget.builds = 1;
        for (client, need) in pushes {
            checked.push(client, need);
        }
        for _ in 0..starts {
            checked.next();
            checked.finish(0);
        }
        removes.into_iter().for_each(|index| checked.remove(index));
        for expected in checked.queue.order().collect::<Vec<_>>() {
            prop_assert_eq!(checked.next(), Some(expected));
            checked.finish(0);
        }
    }

    #[test]
    fn a_stream_of_small_builds_does_not_starve_a_large_one(choices in vec(any::<usize>(), 2000)) {
        let mut queue = Queue::new(BUDGET, WIDE);
        let mut running = Vec::new();
        let mut clients = 0_u32..;
        let mut push = |queue: &mut Queue<u32>, need| queue.put(clients.next().unwrap(), need).unwrap();
        for _ in 0..10 {
            push(&mut queue, SMALL);
        }
        let large = push(&mut queue, WHOLE);
        let mut starts = 0;
        for choice in choices {
            push(&mut queue, SMALL);
            push(&mut queue, SMALL);
            while let Some(ticket) = queue.next(at(0)) {
                if ticket == large {
                    prop_assert!(starts < 100, "{} builds started before it", starts);
                    return Ok(());
                }
                starts += 1;
                running.push(ticket);
            }
            if !running.is_empty() {
                queue.finish(running.swap_remove(choice % running.len()), at(1));
            }
        }
        prop_assert!(false, "it did not start");
    }

    #[test]
    fn clients_that_come_and_go_are_forgotten(clients in vec(any::<u16>(), 200)) {
        let mut queue = Queue::new(BUDGET, BOUNDS);
        queue.put(0, WHOLE).unwrap();
        queue.next(at(0)).unwrap();
        queue.put(1, WHOLE).unwrap();
        for client in clients {
            let ticket = queue.put(client, SMALL).unwrap();
            queue.remove(ticket);
            prop_assert!(queue.clients.len() <= 3, "{:?}", queue.clients);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn clients_that_always_wait_get_machine_time_by_their_shares_whatever_the_lengths_of_their_builds(
        clients in vec((1..60_u64, 1..4_u32), 2..4),
        jitter in vec(0..5_u64, 64),
    ) {
        const SIMULATED_SECONDS: u64 = 20_000;
        let mut queue = Queue::new(BUDGET, WIDE);
        let mut got = vec![0; clients.len()];
        let mut waiting = vec![0; clients.len()];
        let (mut owners, mut running, mut jitter) = (HashMap::new(), Vec::new(), jitter.iter().cycle());
        for now in 0..SIMULATED_SECONDS {
            running.retain(|(end, ticket)| *end != now || !queue.finish(*ticket, at(now)));
            loop {
                for (client, waiting) in waiting.iter_mut().enumerate() {
                    while *waiting < 10 {
                        let terms = Terms { share: clients[client].1, ..Terms::default() };
                        owners.insert(queue.push(client, terms, SMALL).unwrap(), client);
                        *waiting += 1;
                    }
                }
                let Some(ticket) = queue.next(at(now)) else { break };
                let client = owners.remove(&ticket).unwrap();
                waiting[client] -= 1;
                let length = clients[client].0 + jitter.next().unwrap();
                got[client] += length.min(SIMULATED_SECONDS - now);
                running.push((now + length, ticket));
            }
        }
        let by_share = || got.iter().zip(&clients).map(|(got, (_, share))| got / u64::from(*share));
        let (least, most) = (by_share().min().unwrap(), by_share().max().unwrap());
        prop_assert!(most * 10 <= least * 11, "{got:?} of {clients:?}");
    }
}
