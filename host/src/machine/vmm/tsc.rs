//! The rate of the host's time stamp counter (TSC).
//!
//! QEMU's microvm has no clock that a guest could calibrate it against reliably: on a busy host the kernel's attempt
//! with the PIT fails, and the guest has no usable clock. Emulated or not, the guest's counter runs at the host's rate,
//! so the guest is told that rate. No file tells it without privileges and CPUs differ in what they reveal, hence it is
//! measured: two readings of the counter and of the monotonic clock, some time apart.

use std::arch::x86_64::_rdtsc;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The least time between the two readings. With readings good to about 100 ns, the rate is good to 20 ppm.
const BASELINE: Duration = Duration::from_millis(10);

/// Readings of which the quickest is used: the others were interrupted in the middle.
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

/// Takes the first reading, so that [`khz`] needn't wait later.
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
