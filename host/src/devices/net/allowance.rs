//! How many of a guest's packets may lead nowhere.
//!
//! A packet that is answered at once or dropped takes processor time that no limit on connections, bytes or questions counts.

use std::time::{Duration, Instant};

/// The time in which one such packet is allowed: 20,000 a second.
const EACH: Duration = Duration::from_micros(50);

/// The time whose packets may come at once: 2,000.
const AT_ONCE: Duration = Duration::from_millis(100);

/// What a guest has left of it.
#[derive(Debug)]
pub(super) struct Allowance {
    /// When the packets that there were are all allowed.
    earned: Instant,
}

impl Allowance {
    pub(super) fn new(now: Instant) -> Self {
        Self { earned: now }
    }

    /// Counts a packet.
    pub(super) fn spend(&mut self, now: Instant) {
        self.earned = self.earned.max(now) + EACH;
    }

    /// How long the guest has to wait before another of its packets is taken.
    pub(super) fn wait(&self, now: Instant) -> Option<Duration> {
        self.earned.checked_duration_since(now)?.checked_sub(AT_ONCE).filter(|wait| !wait.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_thousand_come_at_once_and_then_one_at_a_time() {
        let start = Instant::now();
        let mut allowance = Allowance::new(start);
        for _ in 0..2000 {
            assert_eq!(allowance.wait(start), None);
            allowance.spend(start);
        }
        allowance.spend(start);
        assert_eq!(allowance.wait(start), Some(EACH));
        let later = start + EACH;
        assert_eq!(allowance.wait(later), None);
        allowance.spend(later);
        assert_eq!(allowance.wait(later), Some(EACH));
    }

    #[test]
    fn a_second_without_any_earns_no_more_than_two_thousand() {
        let start = Instant::now();
        let mut allowance = Allowance::new(start);
        let later = start + Duration::from_secs(1);
        (0..=2000).for_each(|_| allowance.spend(later));
        assert_eq!(allowance.wait(later), Some(EACH));
    }
}
