//! How many pages a visitor may ask for in a second.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use cofferdam_rpc::Client;
use parking_lot::Mutex;

/// Pages that a visitor may ask for at once.
const BURST: f64 = 100.0;

/// Pages a second that it may ask for in the long run.
const RATE: f64 = 20.0;

/// Visitors that are remembered. Beyond that, those that have asked for the least lately are forgotten.
const MAX_VISITORS: usize = 4096;

/// How long somebody waits who is told to ask less.
pub(super) const PENALTY: Duration = Duration::from_secs(1);

/// The pages that each visitor has left.
#[derive(Debug, Default)]
pub(super) struct Pace(Mutex<HashMap<Client, Bucket>>);

#[derive(Debug)]
struct Bucket {
    left: f64,
    at: Instant,
}

impl Bucket {
    fn left(&self, now: Instant) -> f64 {
        (self.left + now.saturating_duration_since(self.at).as_secs_f64() * RATE).min(BURST)
    }
}

impl Pace {
    /// Takes one page of what a visitor has left. `false` if there is none.
    pub(super) fn take(&self, visitor: &Client, now: Instant) -> bool {
        let mut buckets = self.0.lock();
        if buckets.len() >= MAX_VISITORS && !buckets.contains_key(visitor) {
            // All that have their whole burst again; or else every second one of those that have most of it.
            buckets.retain(|_, bucket| bucket.left(now) < BURST);
            if buckets.len() >= MAX_VISITORS {
                let mut lefts: Vec<_> = buckets.values().map(|bucket| bucket.left(now)).collect();
                let (_, median, _) = lefts.select_nth_unstable_by(MAX_VISITORS / 2, f64::total_cmp);
                let median = *median;
                buckets.retain(|_, bucket| bucket.left(now) < median);
            }
        }
        let bucket = buckets.entry(visitor.clone()).or_insert(Bucket { left: BURST, at: now });
        *bucket = Bucket { left: bucket.left(now), at: now };
        let has_one = bucket.left >= 1.0;
        if has_one {
            bucket.left -= 1.0;
        }
        has_one
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_visitor_has_a_burst_and_then_a_rate_of_its_own() {
        let (pace, start) = (Pace::default(), Instant::now());
        let taken = |visitor, at, tries| (0..tries).filter(|_| pace.take(&Client::User(visitor), at)).count();
        assert_eq!(taken(1, start, 1000), 100);
        assert_eq!(taken(2, start, 10), 10);
        assert_eq!(taken(1, start + Duration::from_secs(2), 1000), 40);
        assert_eq!(taken(1, start + Duration::from_secs(3600), 1000), 100);
    }

    #[test]
    fn many_visitors_take_little_memory_and_give_no_greedy_one_more() {
        let (pace, now) = (Pace::default(), Instant::now());
        while pace.take(&Client::User(0), now) {}
        for visitor in 1..100_000 {
            assert!(pace.take(&Client::User(visitor), now));
        }
        assert!(pace.0.lock().len() <= MAX_VISITORS);
        assert!(!pace.take(&Client::User(0), now));
    }
}
