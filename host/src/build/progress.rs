//! Where a build is, for its observer, for its error messages, for the times of its result, and for its limits on time.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use cofferdam_protocol::{Sample, Stream};
use parking_lot::Mutex;
use tokio::{sync::Notify, time::sleep_until};

use super::{
    built::Times, ending::Ending, error::Reason, observer::Observer, options::Options, phase::Phase, terminal::Terminal,
};
use crate::limits::Limits;

/// How long a guest may take to end a command that is being stopped, and its host to take what that wrote last.
const STOPPING: Duration = Duration::from_secs(30);

/// How long it may take to keep what a failed build has left.
const KEEPING: Duration = Duration::from_secs(10 * 60);

pub(super) struct Progress {
    observer: Arc<dyn Observer>,
    timeout: Duration,
    silence: Duration,
    shell: Option<Duration>,
    state: Mutex<State>,
    ending: Arc<Ending>,
    /// A limit may be reached earlier than before.
    sooner: Notify,
}

struct State {
    begun: Instant,
    phase: Phase,
    since: Instant,
    times: Times,
    /// When the command wrote last, or began.
    written: Instant,
    /// The observer has what the command wrote last, and has not come back.
    observing: bool,
}

impl Progress {
    /// Begins with [`Phase::Resolving`].
    pub(super) fn new(observer: Arc<dyn Observer>, options: &Options, ending: Arc<Ending>) -> Self {
        observer.phase(Phase::Resolving);
        let now = Instant::now();
        let times = Times::default();
        let state = State { begun: now, phase: Phase::Resolving, since: now, times, written: now, observing: false };
        let Options { limits: Limits { timeout, silence, .. }, shell, .. } = *options;
        Self { observer, timeout, silence, shell, state: Mutex::new(state), ending, sooner: Notify::new() }
    }

    pub(super) fn enter(&self, phase: Phase) {
        self.book(phase);
        self.sooner.notify_one();
        self.observer.phase(phase);
    }

    pub(super) fn phase(&self) -> Phase {
        self.state.lock().phase
    }

    /// The times of all phases, the current one up to now.
    pub(super) fn times(&self) -> Times {
        self.book(self.phase());
        self.state.lock().times
    }

    pub(super) fn log(&self, stream: Stream, bytes: &[u8]) {
        self.state.lock().observing = true;
        self.observer.log(stream, bytes);
        let mut state = self.state.lock();
        state.observing = false;
        state.written = Instant::now();
    }

    pub(super) fn sample(&self, sample: &Sample) {
        self.observer.sample(sample);
    }

    pub(super) fn terminal(&self, reason: &Reason) -> Option<Terminal> {
        self.observer.terminal(reason)
    }

    /// The running command is to be stopped, and the build to fail for this reason, unless there is another one
    /// already. Says whether this is the first.
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
        // A limit beyond what a clock can show is none.
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
        // Not in a result: the queue is somebody else's, and results are of builds that succeed.
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
        fn log(&self, _: Stream, _: &[u8]) {}
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
    fn what_the_command_writes_ends_its_silence_and_a_slow_observer_is_no_silence() {
        let progress = progress(60 * SECOND, SECOND);
        progress.enter(Phase::Running);
        let at = |now| progress.due(now).unwrap().0;
        let begun = progress.state.lock().written;
        assert_eq!(at(begun), begun + SECOND);
        progress.log(Stream::Stdout, b"x");
        assert!(progress.state.lock().written > begun);
        progress.state.lock().observing = true;
        assert_eq!(at(begun + 30 * SECOND), begun + 31 * SECOND);
    }

    #[test]
    fn a_build_that_is_stopped_and_what_comes_after_a_failure_have_times_of_their_own() {
        let limits = Limits { timeout: SECOND, ..Limits::default() };
        let options = Options { limits, shell: Some(30 * SECOND), keep_failed: true };
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
    async fn a_limit_that_a_phase_brings_is_seen_by_who_waits_already() {
        let progress = progress(600 * SECOND, Duration::from_nanos(1));
        let waiting = tokio::time::timeout(60 * SECOND, progress.overdue());
        let (reason, ()) = tokio::join!(waiting, async { progress.enter(Phase::Running) });
        assert_eq!(reason.unwrap().code(), "silence");
    }
}
