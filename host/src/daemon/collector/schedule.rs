//! Decides when garbage is collected. It is pure: times are passed in.

use std::time::{Duration, SystemTime};

/// Least time from the end of a collection to the next one for want of space, or if the stamp can't be written.
const PAUSE: Duration = Duration::from_secs(10 * 60);

/// The configured collections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::daemon) struct Collection {
    /// The time from one to the next.
    pub every: Duration,
    /// What is younger stays.
    pub keep: Duration,
    /// The same while the disk is too full.
    pub low_keep: Duration,
}

/// Why garbage is collected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// It is time.
    Time,
    /// The disk is below its watermark.
    Disk,
}

impl Cause {
    /// A word for machines, stable across versions.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Time => "time",
            Self::Disk => "disk",
        }
    }
}

/// A collection that is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Due {
    pub(super) cause: Cause,
    /// What is younger stays.
    pub(super) keep: Duration,
}

/// When the next collection is due.
#[derive(Debug)]
pub(super) struct Schedule {
    pub(super) settings: Collection,
    /// The ends of this process's latest collections, by the time since boot: for one cause, and for the other.
    time_ended: Option<Duration>,
    disk_ended: Option<Duration>,
}

impl Schedule {
    pub(super) fn new(settings: Collection) -> Self {
        Self { settings, time_ended: None, disk_ended: None }
    }

    /// A collection has ended.
    pub(super) fn ended(&mut self, cause: Cause, now: Duration) {
        match cause {
            Cause::Time => self.time_ended = Some(now),
            Cause::Disk => self.disk_ended = Some(now),
        }
    }

    /// The collection that is due now. `now` is the time since boot, `wall` the clock, `last` when the latest collection of any
    /// process began by that clock.
    ///
    /// After a jump of the clock, the ages of what was put before it are wrong. So nothing is due until the clock has been
    /// `steady` for as long as things are kept: what was put before the jump is older than that then.
    pub(super) fn due(
        &self,
        now: Duration,
        wall: SystemTime,
        last: Option<SystemTime>,
        is_low: bool,
        steady: Duration,
    ) -> Option<Due> {
        let Collection { every, keep, low_keep } = self.settings;
        let since = |ended: Option<Duration>| ended.map_or(Duration::MAX, |ended| now.saturating_sub(ended));
        if is_low && since(self.disk_ended) >= PAUSE && steady >= low_keep {
            return Some(Due { cause: Cause::Disk, keep: low_keep });
        }
        // A time in the future is wrong.
        let age = last.map_or(Duration::MAX, |last| wall.duration_since(last).unwrap_or(Duration::MAX));
        let is_time = age >= every && since(self.time_ended) >= every.min(PAUSE) && steady >= keep;
        is_time.then_some(Due { cause: Cause::Time, keep })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);
    const SETTINGS: Collection =
        Collection { every: HOUR.saturating_mul(24), keep: HOUR.saturating_mul(72), low_keep: HOUR };
    const NOW: Duration = HOUR.saturating_mul(1000);

    fn wall() -> SystemTime {
        SystemTime::UNIX_EPOCH + HOUR * 500_000
    }

    #[test]
    fn it_is_time_a_day_after_the_last_one_also_of_another_process() {
        let schedule = Schedule::new(SETTINGS);
        let due = |last| schedule.due(NOW, wall(), last, false, Duration::MAX);
        let time = Some(Due { cause: Cause::Time, keep: SETTINGS.keep });
        assert_eq!(due(None), time);
        assert_eq!(due(Some(wall() - HOUR * 23)), None);
        assert_eq!(due(Some(wall() - HOUR * 24)), time);
        assert_eq!(due(Some(wall() + HOUR)), time, "the clock was set back");
    }

    #[test]
    fn a_full_disk_is_collected_at_once_and_then_after_a_pause() {
        let mut schedule = Schedule::new(SETTINGS);
        let last = Some(wall() - HOUR);
        let due = |schedule: &Schedule, now, is_low| schedule.due(now, wall(), last, is_low, Duration::MAX);
        let disk = Some(Due { cause: Cause::Disk, keep: HOUR });
        assert_eq!((due(&schedule, NOW, false), due(&schedule, NOW, true)), (None, disk));
        schedule.ended(Cause::Time, NOW);
        assert_eq!(due(&schedule, NOW, true), disk);
        schedule.ended(Cause::Disk, NOW);
        assert_eq!(due(&schedule, NOW + PAUSE / 2, true), None);
        assert_eq!(due(&schedule, NOW + PAUSE, true), disk);
    }

    #[test]
    fn after_a_jump_of_the_clock_nothing_is_due_until_all_ages_are_right_again() {
        let schedule = Schedule::new(SETTINGS);
        let due = |is_low, steady| schedule.due(NOW, wall(), None, is_low, steady).map(|due| due.cause);
        assert_eq!(due(true, HOUR / 2), None);
        assert_eq!(due(true, HOUR), Some(Cause::Disk));
        assert_eq!(due(false, HOUR * 71), None);
        assert_eq!(due(false, HOUR * 72), Some(Cause::Time));
    }

    #[test]
    fn one_that_cant_leave_its_stamp_is_not_repeated_at_once() {
        let mut schedule = Schedule::new(SETTINGS);
        schedule.ended(Cause::Time, NOW);
        assert_eq!(schedule.due(NOW + PAUSE / 2, wall(), None, false, Duration::MAX), None);
    }
}
