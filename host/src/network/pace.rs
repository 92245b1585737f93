//! How many things may begin in a second. Pure decisions: the time is passed in.

use std::time::{Duration, Instant};

const SECOND: Duration = Duration::from_secs(1);

/// A bucket that holds as many tokens as are added in a second. It is full at first.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// Time for one token.
    interval: Duration,
    /// When the bucket is full again. Nothing: it is full.
    full_at: Option<Instant>,
}

impl Pace {
    /// So many things in a second.
    pub(super) fn new(in_a_second: u32) -> Self {
        Self { interval: SECOND / in_a_second.max(1), full_at: None }
    }

    /// Takes a token if there is one.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let full_at = self.full_at.map_or(now, |at| at.max(now)) + self.interval;
        let has_one = full_at.duration_since(now) <= SECOND;
        if has_one {
            self.full_at = Some(full_at);
        }
        has_one
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_seconds_worth_may_begin_at_once_and_then_one_for_each_interval() {
        let (mut pace, now) = (Pace::new(4), Instant::now());
        let taken = |pace: &mut Pace, at_ms| (0..10).filter(|_| pace.take(now + Duration::from_millis(at_ms))).count();
        assert_eq!([0, 249, 250, 750, 60_000].map(|at_ms| taken(&mut pace, at_ms)), [4, 0, 1, 2, 4]);
    }

    proptest! {
        #[test]
        fn no_second_has_more_than_twice_as_many(
            rate in 1..50_u32,
            gaps_ms in proptest::collection::vec(0..300_u64, 1..200),
        ) {
            let (mut pace, mut now) = (Pace::new(rate), Instant::now());
            let mut taken = Vec::new();
            for gap_ms in gaps_ms {
                now += Duration::from_millis(gap_ms);
                if pace.take(now) {
                    taken.push(now);
                }
            }
            for first in &taken {
                let within = taken.iter().filter(|at| *at >= first && **at < *first + SECOND).count();
                prop_assert!(within <= 2 * rate as usize, "{within}");
            }
        }
    }
}
