//! Decides which records are deleted. It is pure: times and sizes are passed in.

use std::time::{Duration, SystemTime};

/// Most that the age clock advances between two readings of the wall clock.
const MAX_STEP: Duration = Duration::from_secs(24 * 60 * 60);

/// How long finished builds are kept, and how many bytes of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Retention {
    /// Age at which a record is deleted, from its build's end. Time without a daemon counts as a day at most.
    pub max_age: Duration,
    /// Most bytes of compressed logs and records. The oldest are deleted first.
    pub max_bytes: u64,
}

impl Default for Retention {
    fn default() -> Self {
        Self { max_age: Duration::from_secs(90 * 24 * 60 * 60), max_bytes: 10 << 30 }
    }
}

/// The clock by which records age. It never goes back, and a jump of the wall clock advances it by at most [`MAX_STEP`]. So
/// a jump can neither delete all records at once nor keep them for ever.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct AgeClock {
    /// Its time, in microseconds.
    pub(super) age_us: u64,
    /// The last reading of the wall clock, in microseconds since 1970.
    pub(super) wall_us: u64,
}

impl AgeClock {
    /// Its time now.
    pub(super) fn at(self, now: SystemTime) -> Self {
        let wall_us = micros(now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
        let step = wall_us.saturating_sub(self.wall_us).min(micros(MAX_STEP));
        Self { age_us: self.age_us + step, wall_us }
    }
}

/// Age and size of a finished build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kept<K> {
    pub(super) key: K,
    /// [`AgeClock::age_us`] at its end.
    pub(super) ended_us: u64,
    pub(super) bytes: u64,
}

/// The records to delete.
pub(super) fn expired<K: Copy + Ord>(mut kept: Vec<Kept<K>>, clock: AgeClock, retention: &Retention) -> Vec<K> {
    kept.sort_unstable_by_key(|kept| (kept.ended_us, kept.key));
    let mut bytes = kept.iter().fold(0_u64, |sum, kept| sum.saturating_add(kept.bytes));
    let mut gone = Vec::new();
    for kept in kept {
        let is_old = clock.age_us.saturating_sub(kept.ended_us) > micros(retention.max_age);
        if !is_old && bytes <= retention.max_bytes {
            break;
        }
        bytes = bytes.saturating_sub(kept.bytes);
        gone.push(kept.key);
    }
    gone
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const DAY: u64 = 24 * 60 * 60;

    fn day(day: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(day * DAY)
    }

    proptest! {
        #[test]
        fn too_old_records_are_deleted_then_the_oldest_until_the_rest_fits(
            builds in vec((0..100_u64, 0..100_u64), 0..20),
            max_age in 0..100_u64,
            max_bytes in 0..1000_u64,
        ) {
            let kept: Vec<_> =
                builds.iter().enumerate().map(|(key, &(ended_us, bytes))| Kept { key, ended_us, bytes }).collect();
            let retention = Retention { max_age: Duration::from_micros(max_age), max_bytes };
            let clock = AgeClock { age_us: 100, wall_us: 0 };
            let gone = expired(kept.clone(), clock, &retention);
            let (gone, stays): (Vec<&Kept<usize>>, Vec<_>) = kept.iter().partition(|kept| gone.contains(&kept.key));
            let bytes = |kept: &[&Kept<usize>]| kept.iter().map(|kept| kept.bytes).sum::<u64>();
            prop_assert!(stays.iter().all(|kept| 100 - kept.ended_us <= max_age));
            prop_assert!(bytes(&stays) <= max_bytes);
            let youngest = gone.iter().max_by_key(|kept| (kept.ended_us, kept.key));
            if let Some(youngest) = youngest {
                let key = (youngest.ended_us, youngest.key);
                prop_assert!(stays.iter().all(|kept| (kept.ended_us, kept.key) > key));
                prop_assert!(100 - youngest.ended_us > max_age || bytes(&stays) + youngest.bytes > max_bytes);
            }
        }
    }

    #[test]
    fn a_jump_of_the_clock_ages_records_by_a_day_at_most() {
        let clock = AgeClock::default().at(day(20_000));
        let age_days = |before: AgeClock, after: AgeClock| (after.age_us - before.age_us) / (DAY * 1_000_000);
        let jumped = clock.at(day(60_000));
        assert_eq!(age_days(clock, jumped), 1);
        let back = jumped.at(day(20_000));
        assert_eq!(age_days(jumped, back), 0);
        assert_eq!(age_days(back, back.at(day(20_001))), 1);
        let before_1970 = back.at(SystemTime::UNIX_EPOCH - Duration::from_secs(DAY));
        assert_eq!(before_1970, AgeClock { wall_us: 0, ..back });
    }
}
