//! The progress of a build: its phase and times, for its observer, error messages, result and time limits.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use cofferdam_protocol::Sample;
use cofferdam_rpc::Turn;
use parking_lot::Mutex;
use tokio::{sync::Notify, time::sleep_until};

use super::{
    built::Times, ending::Ending, error::Reason, observer::Observer, options::Options, phase::Phase,
    standby::StandbyUse, terminal::Terminal,
};
use crate::{
    limits::Limits,
    network::{Connection, Denials},
};

/// Time limit for the guest to end a command that is being stopped, and for the host to read the rest of its log.
const STOPPING: Duration = Duration::from_secs(30);

/// Time limit for keeping the remains of a failed build.
const KEEPING: Duration = Duration::from_secs(10 * 60);

pub(super) struct Progress {
    observer: Arc<dyn Observer>,
    timeout: Duration,
    silence: Duration,
    shell: Option<Duration>,
    state: Mutex<State>,
    denials: Mutex<Denials>,
    ending: Arc<Ending>,
    /// Notified when a limit may be reached earlier than before.
    sooner: Notify,
}

struct State {
    begun: Instant,
    phase: Phase,
    since: Instant,
    times: Times,
    /// The time of the command's last output, or of its start.
    written: Instant,
    /// Whether the observer is still busy with the command's last output.
    observing: bool,
}

impl Progress {
    /// Begins with [`Phase::Resolving`].
    pub(super) fn new(observer: Arc<dyn Observer>, options: &Options, ending: Arc<Ending>) -> Self {
        observer.phase(Phase::Resolving);
        let now = Instant::now();
        let times = Times::default();
        let state = State { begun: now, phase: Phase::Resolving, since: now, times, written: now, observing: false };
        let Options { limits: Limits { timeout, silence, .. }, shell, interactive, .. } = *options;
        // A person may think.
        let silence = if interactive { Duration::MAX } else { silence };
        let (state, denials) = (Mutex::new(state), Mutex::default());
        Self { observer, timeout, silence, shell, state, denials, ending, sooner: Notify::new() }
    }

    pub(super) fn enter(&self, phase: Phase) {
        self.book(phase);
        self.sooner.notify_one();
        self.observer.phase(phase);
    }

    pub(super) async fn turn(&self) -> Option<Turn> {
        self.observer.turn().await
    }

    pub(super) fn resolved(&self, memory_bytes: u64) {
        self.observer.resolved(memory_bytes);
    }

    pub(super) fn standby(&self, standby: StandbyUse) {
        self.observer.standby(standby);
    }

    pub(super) fn phase(&self) -> Phase {
        self.state.lock().phase
    }

    /// The durations of all phases. The current one counts up to now.
    pub(super) fn times(&self) -> Times {
        self.book(self.phase());
        self.state.lock().times
    }

    pub(super) fn log(&self, bytes: &[u8]) {
        self.state.lock().observing = true;
        self.observer.log(bytes);
        let mut state = self.state.lock();
        state.observing = false;
        state.written = Instant::now();
    }

    pub(super) fn sample(&self, sample: &Sample) {
        self.observer.sample(sample);
    }

    pub(super) fn connection(&self, connection: &Connection) {
        self.denials.lock().add(connection);
        self.observer.connection(connection);
    }

    /// What the build has been denied so far.
    pub(super) fn denials(&self) -> Denials {
        self.denials.lock().clone()
    }

    pub(super) fn terminal(&self, failure: Option<&Reason>) -> Option<Terminal> {
        self.observer.terminal(failure)
    }

    /// Records that the running command is being stopped, so that the build fails for this reason. Returns `false` if the
    /// command doesn't run, or if something else came first.
    pub(super) fn stop(&self, reason: Reason) -> bool {
        let is_first = self.phase() == Phase::Running && self.ending.stop(reason);
        if is_first {
            self.sooner.notify_one();
        }
        is_first
    }

    /// Waits until a limit on the build's time is reached.
    pub(super) async fn overdue(&self) -> Reason {
        loop {
            let now = Instant::now();
            let due = self.due(now);
            match due {
                Some((at, reason)) if at <= now => return reason,
                Some((at, _)) => tokio::select! {
                    () = sleep_until(at.into()) => {}
                    () = self.sooner.notified() => {}
                },
                None => self.sooner.notified().await,
            }
        }
    }

    /// The limit that is reached first if nothing happens.
    fn due(&self, now: Instant) -> Option<(Instant, Reason)> {
        let state = self.state.lock();
        if state.phase == Phase::Running
            && let Some((since, reason)) = self.ending.stopping()
        {
            return Some((since + STOPPING, reason));
        }
        let own = match state.phase {
            Phase::Keeping => Some(KEEPING),
            Phase::Shell => self.shell,
            _ => None,
        };
        if let Some(limit) = own {
            return Some((state.since.checked_add(limit)?, Reason::Timeout { limit }));
        }
        // A limit beyond the clock's range has no effect.
        let timeout = state.begun.checked_add(self.timeout).map(|at| (at, Reason::Timeout { limit: self.timeout }));
        let silent_since = if state.observing { now } else { state.written };
        let silence = silent_since.checked_add(self.silence).filter(|_| state.phase == Phase::Running);
        let silence = silence.map(|at| (at, Reason::Silence { limit: self.silence }));
        [timeout, silence].into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    fn book(&self, next: Phase) {
        let mut state = self.state.lock();
        let now = Instant::now();
        let spent = now - state.since;
        // Not in a result: the queue belongs to the scheduler, and results are those of successful builds.
        let mut elsewhere = Duration::ZERO;
        let State { phase, times, .. } = &mut *state;
        *match phase {
            Phase::Resolving => &mut times.resolve,
            Phase::Booting => &mut times.boot,
            Phase::Running => &mut times.run,
            Phase::Ingesting => &mut times.ingest,
            Phase::Queued | Phase::Keeping | Phase::Shell => &mut elsewhere,
        } += spent;
        state.phase = next;
        state.since = now;
        state.written = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    struct Deaf;

    impl Observer for Deaf {
        fn phase(&self, _: Phase) {}
        fn log(&self, _: &[u8]) {}
    }

    fn progress(timeout: Duration, silence: Duration) -> Progress {
        let limits = Limits { timeout, silence, ..Limits::default() };
        let options = Options { limits, ..Options::default() };
        Progress::new(Arc::new(Deaf), &options, Arc::new(Ending::new()))
    }

    #[test]
    fn silence_counts_while_the_command_runs() {
        let progress = progress(60 * SECOND, SECOND);
        let reason = || progress.due(Instant::now()).unwrap().1.code();
        for (phase, first) in [
            (Phase::Resolving, "timeout"),
            (Phase::Booting, "timeout"),
            (Phase::Running, "silence"),
            (Phase::Ingesting, "timeout"),
        ] {
            progress.enter(phase);
            assert_eq!(reason(), first, "{phase:?}");
        }
    }

    #[test]
    fn silence_does_not_count_while_a_person_uses_the_command() {
        let limits = Limits { timeout: 60 * SECOND, silence: SECOND, ..Limits::default() };
        let options = Options { limits, interactive: true, ..Options::default() };
        let progress = Progress::new(Arc::new(Deaf), &options, Arc::new(Ending::new()));
        progress.enter(Phase::Running);
        assert_eq!(progress.due(Instant::now()).unwrap().1.code(), "timeout");
    }

    #[test]
    fn output_ends_silence_and_a_slow_observer_does_not_count() {
        let progress = progress(60 * SECOND, SECOND);
        progress.enter(Phase::Running);
        let at = |now| progress.due(now).unwrap().0;
        let begun = progress.state.lock().written;
        assert_eq!(at(begun), begun + SECOND);
        progress.log(b"x");
        assert!(progress.state.lock().written > begun);
        progress.state.lock().observing = true;
        assert_eq!(at(begun + 30 * SECOND), begun + 31 * SECOND);
    }

    #[test]
    fn stopping_and_keeping_have_their_own_time_limits() {
        let limits = Limits { timeout: SECOND, ..Limits::default() };
        let options = Options { limits, shell: Some(30 * SECOND), keep_failed: true, ..Options::default() };
        let progress = Progress::new(Arc::new(Deaf), &options, Arc::new(Ending::new()));
        assert!(!progress.stop(Reason::Signal(1)), "nothing runs yet");
        progress.enter(Phase::Running);
        let begun = progress.state.lock().since;
        assert!(progress.stop(Reason::Signal(2)) && !progress.stop(Reason::Signal(3)));
        assert_eq!(progress.ending.stopping().unwrap().1, Reason::Signal(2));
        let (at, reason) = progress.due(begun).unwrap();
        assert!(at >= begun + STOPPING && reason == Reason::Signal(2));
        for (phase, limit) in [(Phase::Keeping, KEEPING), (Phase::Shell, 30 * SECOND)] {
            progress.enter(phase);
            assert_eq!(progress.due(begun).unwrap().0, progress.state.lock().since + limit);
        }
    }

    #[test]
    fn times_that_no_clock_can_show_are_no_limits() {
        let progress = progress(Duration::MAX, Duration::MAX);
        progress.enter(Phase::Running);
        assert!(progress.due(Instant::now()).is_none());
    }

    #[tokio::test]
    async fn a_waiting_task_sees_the_limit_of_a_new_phase() {
        let progress = progress(600 * SECOND, Duration::from_nanos(1));
        let waiting = tokio::time::timeout(60 * SECOND, progress.overdue());
        let (reason, ()) = tokio::join!(waiting, async { progress.enter(Phase::Running) });
        assert_eq!(reason.unwrap().code(), "silence");
    }
}
