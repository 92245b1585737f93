//! The rate of the host's time stamp counter (TSC).
//!
//! A guest in QEMU's microvm can't reliably measure the rate of its own counter. The kernel tries with the PIT, which fails
//! on a busy host, and then the guest has no usable clock. The guest's counter runs at the host's rate, even when emulated,
//! so the host tells the guest that rate.
//!
//! The host measures it: two readings of the counter and of the monotonic clock, some time apart. Without privileges no file
//! has the rate, and not every CPU reports it.

use std::arch::x86_64::_rdtsc;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The least time between the two readings. Readings are accurate to about 100 ns, so the rate is accurate to 20 ppm.
const BASELINE: Duration = Duration::from_millis(10);

/// Attempts at one reading. The quickest counts, since a slower one was interrupted between counter and clock.
const ATTEMPTS: usize = 8;

static FIRST: OnceLock<Reading> = OnceLock::new();

#[derive(Clone, Copy, Debug)]
struct Reading {
    counter: u64,
    at: Instant,
    took: Duration,
}

impl Reading {
    fn take() -> Self {
        let once = || {
            let before = Instant::now();
            // SAFETY: the instruction reads a register, and every x86-64 CPU has it.
            let counter = unsafe { _rdtsc() };
            let took = before.elapsed();
            Self { counter, at: before + took / 2, took }
        };
        (1..ATTEMPTS).fold(once(), |best, _| {
            let next = once();
            if next.took < best.took { next } else { best }
        })
    }
}

/// Takes the first reading, so that [`khz`] need not wait later.
pub(super) fn prepare() {
    FIRST.get_or_init(Reading::take);
}

/// The rate in kHz.
pub(super) async fn khz() -> u64 {
    let first = *FIRST.get_or_init(Reading::take);
    tokio::time::sleep(BASELINE.saturating_sub(first.at.elapsed())).await;
    let second = Reading::take();
    let ticks = u128::from(second.counter.saturating_sub(first.counter));
    let nanoseconds = second.at.duration_since(first.at).as_nanos().max(1);
    u64::try_from((ticks * 1_000_000 + nanoseconds / 2) / nanoseconds).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_rate_is_stable() {
        let short = khz().await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        let long = khz().await;
        assert!((500_000..10_000_000).contains(&long), "{long} kHz");
        assert!(short.abs_diff(long) * 1000 < long, "{short} and {long} kHz differ by more than a thousandth");
    }
}
