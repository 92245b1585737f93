//! How a build ends.
//!
//! Two parties can end a build that runs: its *session*, the thread that talks to the guest, and its *task*, which waits for
//! limits on time, cancellation and the deaths of processes. Both may want to end it at the same moment. Therefore each has
//! to claim the end, and the first claim wins:
//!
//! ```text
//!            ┌──────── stop ───────▶ Stopping ─┐
//!            │                          │      │
//!   Open ────┼── claim by the session ──┴──────┼──▶ Session ── hang_up ──▶ Over
//!            │                                 │                            ▲
//!            └── claim by the task ────────────┴──▶ Task ───── hang_up ─────┘
//! ```
//!
//! - **Open**: the guest boots, runs the command or sends outputs.
//! - **Stopping**: a limit was reached while the command ran, and the guest is needed after the failure. It was told to kill
//!   the command. The build fails because of the limit, even if the guest then reports another end. Only the first limit
//!   counts.
//! - **Session**: the session's claim has won. All outputs have arrived and are being stored, or the build has failed and
//!   its remains are kept or shown in a shell. The task can't undo this. It can hang up, which ends keeping and the shell
//!   but not the storing of outputs, and then waits for the session's outcome.
//! - **Task**: the task's claim has won, because of a limit, a cancellation or a death. The session stores nothing more, and
//!   the machine is killed at once.
//! - **Over**: the connection was closed on purpose, so errors on it are ignored. A build whose future is dropped goes to
//!   this state from any other, and then stores nothing.
//!
//! Before the session starts there is no second party, so the task ends the build without a claim.

use std::{future::Future, io, os::unix::net::UnixStream, sync::Arc, sync::OnceLock, time::Instant};

use cofferdam_protocol::FromHost;
use tokio::sync::watch;

use super::{error::Reason, line::Line};

/// The state of a build's end, see the module.
#[derive(Debug)]
enum State {
    Open,
    Stopping { since: Instant, reason: Reason },
    Session,
    Task,
    Over,
}

/// The parties that can end a build.
#[derive(Debug, Clone, Copy)]
pub(super) enum Party {
    Session,
    Task,
}

/// Whether a party may end the build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(super) enum Claim {
    Won,
    Lost,
}

/// A build's end and its connection, shared by both parties.
pub(super) struct Ending {
    state: watch::Sender<State>,
    line: OnceLock<Line>,
}

/// Hangs up when dropped, so that no session outlives its build.
pub(super) struct HangUp(pub(super) Arc<Ending>);

impl Drop for HangUp {
    fn drop(&mut self) {
        self.0.hang_up();
    }
}

impl Ending {
    pub(super) fn new() -> Self {
        Self { state: watch::Sender::new(State::Open), line: OnceLock::new() }
    }

    /// Claims the end of the build.
    pub(super) fn claim(&self, party: Party) -> Claim {
        let claimed = self.state.send_if_modified(|state| {
            let is_free = matches!(state, State::Open | State::Stopping { .. });
            if is_free {
                *state = match party {
                    Party::Session => State::Session,
                    Party::Task => State::Task,
                };
            }
            is_free
        });
        if claimed { Claim::Won } else { Claim::Lost }
    }

    /// Makes the build fail for this reason, once its command has been stopped. Returns `false` if something
    /// else came first.
    pub(super) fn stop(&self, reason: Reason) -> bool {
        self.state.send_if_modified(|state| {
            let is_open = matches!(state, State::Open);
            if is_open {
                *state = State::Stopping { since: Instant::now(), reason };
            }
            is_open
        })
    }

    /// When stopping the command began, and why. `None` if it isn't being stopped.
    pub(super) fn stopping(&self) -> Option<(Instant, Reason)> {
        match &*self.state.borrow() {
            State::Stopping { since, reason } => Some((*since, reason.clone())),
            _ => None,
        }
    }

    /// The guest has connected.
    pub(super) fn connect(&self, stream: UnixStream) -> io::Result<()> {
        self.line.set(Line::new(stream)?).map_err(|_| io::ErrorKind::AlreadyExists.into())
    }

    pub(super) fn line(&self) -> Option<&Line> {
        self.line.get()
    }

    /// Tells the guest to kill its command.
    pub(super) fn tell_to_stop(self: &Arc<Self>) {
        let this = Arc::clone(self);
        // A guest that never reads blocks this until its connection ends.
        tokio::task::spawn_blocking(move || this.line().map(|line| line.say(&FromHost::Stop)));
    }

    /// Ends the conversation, and with it all that the session waits for.
    pub(super) fn hang_up(&self) {
        self.state.send_replace(State::Over);
        if let Some(line) = self.line() {
            line.hang_up();
        }
    }

    /// Whether the conversation was ended.
    pub(super) fn is_over(&self) -> bool {
        matches!(*self.state.borrow(), State::Over)
    }

    /// Waits for a future, but not beyond the end of the conversation.
    pub(super) async fn unless_over<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        let mut state = self.state.subscribe();
        tokio::select! {
            biased;
            _ = state.wait_for(|state| matches!(state, State::Over)) => None,
            value = future => Some(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_party_has_the_end_and_keeps_it() {
        for (first, second) in [(Party::Session, Party::Task), (Party::Task, Party::Session)] {
            for is_stopped in [false, true] {
                let ending = Ending::new();
                assert!(!is_stopped || ending.stop(Reason::Signal(1)));
                assert_eq!(ending.claim(first), Claim::Won);
                assert_eq!((ending.claim(second), ending.claim(first)), (Claim::Lost, Claim::Lost));
                assert!(!ending.stop(Reason::Signal(2)) && ending.stopping().is_none());
                ending.hang_up();
                assert_eq!(ending.claim(second), Claim::Lost);
            }
        }
    }

    #[test]
    fn a_command_is_stopped_for_the_first_reason() {
        let ending = Ending::new();
        assert!(ending.stop(Reason::Signal(1)) && !ending.stop(Reason::Signal(2)));
        assert_eq!(ending.stopping().unwrap().1, Reason::Signal(1));
    }

    #[tokio::test]
    async fn nothing_is_waited_for_beyond_the_end_of_the_conversation() {
        let ending = Ending::new();
        assert_eq!(ending.unless_over(async { 1 }).await, Some(1));
        let (waited, ()) = tokio::join!(ending.unless_over(std::future::pending::<()>()), async { ending.hang_up() });
        assert!(waited.is_none() && ending.is_over());
    }
}
