//! How many bytes a build's connections carry in a second.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::time::sleep;

const SECOND: Duration = Duration::from_secs(1);

/// One build's rate. Connections that take from it wait in the order in which they ask.
#[derive(Debug)]
pub(crate) struct Rate(Mutex<Bucket>);

/// A bucket that holds as many bytes as are added in a second. It is full at first. The time is passed in.
#[derive(Debug)]
struct Bucket {
    bytes_a_second: NonZeroU64,
    /// When it would be full again: in more than a second if bytes were taken that are yet to be added. Nothing: it is full.
    full_at: Option<Instant>,
}

impl Rate {
    /// So many bytes in a second.
    pub(super) fn new(bytes_a_second: NonZeroU64) -> Self {
        Self(Mutex::new(Bucket { bytes_a_second, full_at: None }))
    }

    /// Waits until so many bytes may be carried. They are taken even if nobody waits to the end.
    pub(crate) async fn take(&self, bytes: usize) {
        let wait = self.0.lock().take(bytes, Instant::now());
        if !wait.is_zero() {
            sleep(wait).await;
        }
    }
}

impl Bucket {
    /// Takes so many bytes, which may be carried after the time that is returned.
    fn take(&mut self, bytes: usize, now: Instant) -> Duration {
        let nanos = (bytes as u128 * SECOND.as_nanos()).div_ceil(self.bytes_a_second.get().into());
        let full_at = self.full_at.map_or(now, |at| at.max(now));
        let full_at = full_at + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.full_at = Some(full_at);
        full_at.duration_since(now).saturating_sub(SECOND)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KIB: usize = 1024;

    fn bucket(bytes_a_second: u64) -> Bucket {
        Bucket { bytes_a_second: NonZeroU64::new(bytes_a_second).unwrap(), full_at: None }
    }

    #[test]
    fn a_seconds_worth_goes_at_once_and_the_rest_as_it_is_added() {
        let (mut bucket, now) = (bucket(64 * KIB as u64), Instant::now());
        let waits = [(); 7].map(|()| bucket.take(16 * KIB, now).as_millis());
        assert_eq!(waits, [0, 0, 0, 0, 250, 500, 750]);
        let later = now + Duration::from_secs(3600);
        let waits = [64, 1, 63].map(|kib| bucket.take(kib * KIB, later));
        assert_eq!(waits, [Duration::ZERO, SECOND / 64, SECOND], "it holds a second's worth, however long it waits");
    }

    proptest! {
        #[test]
        fn no_time_has_more_than_its_bytes_and_a_seconds_worth(
            rate in 1..1_000_000_u64,
            taken in proptest::collection::vec((0..500_u64, 1..100_000_usize), 1..200),
        ) {
            let (mut bucket, began, mut carried) = (bucket(rate), Instant::now(), Vec::new());
            let mut now = began;
            for (gap_ms, bytes) in taken {
                now += Duration::from_millis(gap_ms);
                carried.push((now + bucket.take(bytes, now), bytes as u128));
            }
            prop_assert!(carried.is_sorted_by_key(|(at, _)| *at), "somebody has overtaken another");
            let mut sum = 0;
            for (at, bytes) in carried {
                sum += bytes;
                let most = u128::from(rate) * (at - began + SECOND).as_nanos() / SECOND.as_nanos() + 1;
                prop_assert!(sum <= most, "{sum} of {most}");
            }
        }
    }
}
