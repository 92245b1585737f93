//! Jumps of the host's clock. The age of what is in the store is told by that clock alone.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use nix::time::{ClockId, clock_gettime};

/// Most by which the clock may differ from what has passed: a second, and the thousandth by which it may be slewed.
const TOLERANCE: Duration = Duration::from_secs(1);
const SLEWED: u32 = 1000;

/// The time since the host was booted, which nobody can set, and which goes on while the host sleeps.
pub(super) fn since_boot() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

/// Compares the clock with the time that passes.
#[derive(Debug, Default)]
pub(super) struct Clock {
    /// The time since boot and the clock at the latest look.
    last: Option<(Duration, SystemTime)>,
    /// The time since boot when a jump was seen.
    jumped: Option<Duration>,
}

/// A jump of the clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Jump {
    Forward(Duration),
    Back(Duration),
}

impl fmt::Display for Jump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (by, direction) = match self {
            Self::Forward(by) => (by, "forward"),
            Self::Back(by) => (by, "back"),
        };
        write!(f, "{direction} by {}", humantime::format_duration(Duration::from_secs(by.as_secs())))
    }
}

impl Clock {
    /// Looks at the clock. Returns a jump since the look before.
    pub(super) fn look(&mut self, now: Duration, wall: SystemTime) -> Option<Jump> {
        let (then, was) = self.last.replace((now, wall))?;
        let passed = now.saturating_sub(then);
        let jump = match wall.duration_since(was + passed) {
            Ok(by) => Jump::Forward(by),
            Err(error) => Jump::Back(error.duration()),
        };
        let (Jump::Forward(by) | Jump::Back(by)) = jump;
        if by <= TOLERANCE + passed / SLEWED {
            return None;
        }
        self.jumped = Some(now);
        Some(jump)
    }

    /// How long the clock has had no jump.
    pub(super) fn steady_for(&self, now: Duration) -> Duration {
        self.jumped.map_or(Duration::MAX, |jumped| now.saturating_sub(jumped))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn jumps_are_seen_in_both_directions_and_drift_is_none() {
        let mut clock = Clock::default();
        let at = |wall| SystemTime::UNIX_EPOCH + seconds(wall);
        assert_eq!(clock.look(seconds(10), at(1000)), None);
        assert_eq!(clock.look(seconds(11), at(1001)), None);
        assert_eq!(clock.steady_for(seconds(11)), Duration::MAX);
        // A day without a look, and a clock that is a minute too fast.
        assert_eq!(clock.look(seconds(86_411), at(87_461)), None);
        assert_eq!(clock.look(seconds(86_412), at(187_462)), Some(Jump::Forward(seconds(100_000))));
        assert_eq!(clock.look(seconds(86_413), at(187_463)), None);
        assert_eq!(clock.steady_for(seconds(86_422)), seconds(10));
        assert_eq!(clock.look(seconds(86_423), at(0)), Some(Jump::Back(seconds(187_473))));
        assert_eq!(clock.steady_for(seconds(86_423)), Duration::ZERO);
        assert_eq!(Jump::Back(seconds(90)).to_string(), "back by 1m 30s");
    }
}
