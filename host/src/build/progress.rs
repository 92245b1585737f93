//! Where a build is, for its observer, for its error messages and for the times of its result.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use cofferdam_protocol::Stream;

use super::{Observer, Phase, Times};

pub(super) struct Progress {
    observer: Arc<dyn Observer>,
    state: Mutex<State>,
}

struct State {
    phase: Phase,
    since: Instant,
    times: Times,
}

impl Progress {
    /// Begins with [`Phase::Resolving`].
    pub(super) fn new(observer: Arc<dyn Observer>) -> Self {
        observer.phase(Phase::Resolving);
        let state = State { phase: Phase::Resolving, since: Instant::now(), times: Times::default() };
        Self { observer, state: Mutex::new(state) }
    }

    pub(super) fn enter(&self, phase: Phase) {
        self.book(phase);
        self.observer.phase(phase);
    }

    pub(super) fn phase(&self) -> Phase {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).phase
    }

    /// The times of all phases, the current one up to now.
    pub(super) fn times(&self) -> Times {
        self.book(self.phase());
        self.state.lock().unwrap_or_else(PoisonError::into_inner).times
    }

    pub(super) fn log(&self, stream: Stream, bytes: &[u8]) {
        self.observer.log(stream, bytes);
    }

    fn book(&self, next: Phase) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let spent = now - state.since;
        let State { phase, times, .. } = &mut *state;
        *match phase {
            Phase::Resolving => &mut times.resolve,
            Phase::Booting => &mut times.boot,
            Phase::Running => &mut times.run,
            Phase::Ingesting => &mut times.ingest,
        } += spent;
        state.phase = next;
        state.since = now;
    }
}
