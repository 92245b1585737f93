//! Decides which records are deleted. It is pure: times and sizes are passed in.

use std::{
    collections::{BTreeMap, BinaryHeap, VecDeque},
    time::{Duration, SystemTime},
};

use super::Recorded;
use crate::tenants::Tenants;

/// How much less than a bound is left when it is exceeded, as a part of it. So the next deletion, which looks at all records, is some
/// builds away.
const SLACK: u64 = 64;

/// Most that the age clock advances between two readings of the wall clock.
const MAX_STEP: Duration = Duration::from_secs(24 * 60 * 60);

/// How long finished builds are kept, and how many bytes of them.
#[derive(Debug, Clone)]
pub(crate) struct Retention {
    /// Age at which a record is deleted, from its build's end. Time without a daemon counts as a day at most.
    pub max_age: Duration,
    /// Most bytes of compressed logs and records. The client that has the most loses its oldest ones first, so no client makes
    /// another lose what is within its equal share.
    pub max_bytes: u64,
    /// What single clients may have. Beyond that they lose their oldest ones, too.
    pub tenants: Tenants,
}

impl Default for Retention {
    fn default() -> Self {
        Self { max_age: Duration::from_secs(90 * 24 * 60 * 60), max_bytes: 10 << 30, tenants: Tenants::default() }
    }
}

impl Retention {
    /// Whether somebody has more than it may.
    pub(super) fn is_exceeded(&self, recorded: &BTreeMap<String, Recorded>) -> bool {
        let total = recorded.values().fold(0, |sum: u64, of_client| sum.saturating_add(of_client.bytes));
        let is_beyond =
            |(client, of_client): (&String, &Recorded)| self.most(client).is_some_and(|most| of_client.bytes > most);
        total > self.max_bytes || recorded.iter().any(is_beyond)
    }

    /// Most bytes that a client may have by its own bound.
    fn most(&self, client: &str) -> Option<u64> {
        client.parse().ok().and_then(|client| self.tenants.of(&client).records)
    }
}

/// What is left of what is bounded by `most`.
fn left_of(most: u64) -> u64 {
    most - most / SLACK
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

/// Owner, age and size of a finished build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kept<K> {
    pub(super) key: K,
    pub(super) client: String,
    /// [`AgeClock::age_us`] at its end.
    pub(super) ended_us: u64,
    pub(super) bytes: u64,
}

/// The records to delete.
pub(super) fn expired<K: Copy + Ord>(mut kept: Vec<Kept<K>>, clock: AgeClock, retention: &Retention) -> Vec<K> {
    kept.sort_unstable_by_key(|kept| (kept.ended_us, kept.key));
    let is_old = |kept: &Kept<K>| clock.age_us.saturating_sub(kept.ended_us) > micros(retention.max_age);
    let first_young = kept.partition_point(is_old);
    let mut gone: Vec<_> = kept.drain(..first_young).map(|kept| kept.key).collect();

    let sum = |sum: u64, kept: &Kept<K>| sum.saturating_add(kept.bytes);
    let mut clients = BTreeMap::<_, VecDeque<_>>::new();
    for kept in kept {
        clients.entry(kept.client.clone()).or_default().push_back(kept);
    }
    let mut by_size = BinaryHeap::new();
    for (client, kept) in &mut clients {
        let mut of_client = kept.iter().fold(0, sum);
        let left = retention.most(client).filter(|most| of_client > *most).map(left_of);
        while left.is_some_and(|left| of_client > left)
            && let Some(oldest) = kept.pop_front()
        {
            of_client = of_client.saturating_sub(oldest.bytes);
            gone.push(oldest.key);
        }
        by_size.push((of_client, client.clone()));
    }
    let mut bytes = by_size.iter().fold(0, |bytes: u64, (of_client, _)| bytes.saturating_add(*of_client));
    let left = if bytes > retention.max_bytes { left_of(retention.max_bytes) } else { bytes };
    while bytes > left
        && let Some((of_client, client)) = by_size.pop()
        && let Some(oldest) = clients.get_mut(&client).and_then(VecDeque::pop_front)
    {
        bytes = bytes.saturating_sub(oldest.bytes);
        gone.push(oldest.key);
        by_size.push((of_client.saturating_sub(oldest.bytes), client));
    }
    gone
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use cofferdam_rpc::Patterns;

    use super::*;
    use crate::tenants::Tenant;

    const DAY: u64 = 24 * 60 * 60;

    fn day(day: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(day * DAY)
    }

    proptest! {
        #[test]
        fn too_old_records_are_deleted_then_the_oldest_of_the_largest_clients_until_the_rest_fits(
            builds in vec((0..100_u64, 1..100_u64, 0..4_u8), 0..20),
            max_age in 0..100_u64,
            max_bytes in 0..1000_u64,
        ) {
            let kept = |(key, &(ended_us, bytes, client)): (usize, &(u64, u64, u8))| {
                Kept { key, client: client.to_string(), ended_us, bytes }
            };
            let kept: Vec<_> = builds.iter().enumerate().map(kept).collect();
            let retention =
                Retention { max_age: Duration::from_micros(max_age), max_bytes, tenants: Tenants::default() };
            let clock = AgeClock { age_us: 100, wall_us: 0 };
            let gone = expired(kept.clone(), clock, &retention);
            let (gone, stays): (Vec<&Kept<usize>>, Vec<_>) = kept.iter().partition(|kept| gone.contains(&kept.key));
            let bytes = |kept: &[&Kept<usize>]| kept.iter().map(|kept| kept.bytes).sum::<u64>();
            prop_assert!(stays.iter().all(|kept| 100 - kept.ended_us <= max_age));
            prop_assert!(bytes(&stays) <= max_bytes);
            let (old, evicted): (Vec<_>, Vec<_>) = gone.into_iter().partition(|kept| 100 - kept.ended_us > max_age);
            prop_assert!(evicted.is_empty() || bytes(&stays) + evicted.iter().map(|kept| kept.bytes).max().unwrap() > left_of(max_bytes));
            let clients: std::collections::BTreeSet<_> = kept.iter().map(|kept| &kept.client).collect();
            for client in &clients {
                let of_client = |kept: &[&Kept<usize>]| -> Vec<Kept<usize>> {
                    kept.iter().filter(|kept| kept.client == **client).map(|kept| Kept::clone(kept)).collect()
                };
                let (stays, evicted) = (of_client(&stays), of_client(&evicted));
                if let Some(youngest) = evicted.iter().max_by_key(|kept| (kept.ended_us, kept.key)) {
                    let key = (youngest.ended_us, youngest.key);
                    prop_assert!(stays.iter().all(|kept| (kept.ended_us, kept.key) > key), "its oldest go first");
                    let had = stays.iter().chain(&evicted).map(|kept| kept.bytes).sum::<u64>();
                    prop_assert!(had > left_of(max_bytes) / clients.len() as u64, "its share is its own");
                }
            }
            prop_assert!(old.iter().all(|kept| 100 - kept.ended_us > max_age));
        }
    }

    #[test]
    fn a_client_beyond_its_own_bound_loses_its_oldest() {
        let mut listed = Patterns::default();
        listed.insert("user:1".parse().unwrap(), Tenant { records: Some(25), ..Tenant::default() });
        listed.insert("user:*".parse().unwrap(), Tenant::default());
        let retention = Retention { tenants: Tenants::new(Some(listed), Vec::new()), ..Retention::default() };
        let kept = |key| Kept { key, client: format!("user:{}", key % 2), ended_us: key, bytes: 10 };
        let clock = AgeClock { age_us: 100, wall_us: 0 };
        assert_eq!(expired((0..10).map(kept).collect(), clock, &retention), [1, 3, 5]);
    }

    #[test]
    fn a_bound_is_exceeded_again_only_after_some_builds() {
        let mut listed = Patterns::default();
        listed.insert("user:1".parse().unwrap(), Tenant { records: Some(6400), ..Tenant::default() });
        listed.insert("user:*".parse().unwrap(), Tenant::default());
        let tenants = Tenants::new(Some(listed), Vec::new());
        let retention = Retention { tenants, max_bytes: 64_000, ..Retention::default() };
        for (client, most) in [("user:1", 640), ("user:2", 6400)] {
            let recorded =
                |records: u64| BTreeMap::from([(client.to_owned(), Recorded { bytes: records * 10, records })]);
            assert!(!retention.is_exceeded(&recorded(most)) && retention.is_exceeded(&recorded(most + 1)));
            let kept = |key| Kept { key, client: client.to_owned(), ended_us: key, bytes: 10 };
            let gone = expired((0..=most).map(kept).collect(), AgeClock::default(), &retention);
            assert_eq!(gone, (0..=most / SLACK).collect::<Vec<_>>());
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
