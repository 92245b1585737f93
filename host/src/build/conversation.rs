//! The build's task during the conversation with the guest. It starts the session's thread, and waits for the first of three:
//! the session's outcome, a death, or an interruption. [`ending`](super::ending) decides which of them ends the build.

use std::{os::unix::net::UnixStream, pin::pin, sync::Arc};

use cofferdam_castore::{Store, refscan::ReferencePattern};
use cofferdam_protocol::Specification;
use tokio::{runtime::Handle, sync::oneshot, time::timeout};

use super::{
    ending::{Claim, Ending, Party},
    error::{BuildError, ExecutorError},
    exchange::{Exchange, is_disconnect},
    interruption::{Interruption, Interruptions},
    options::Options,
    progress::Progress,
    session::{AFTERMATH, Outcome, SILENCE, Session},
};
use crate::machine::Machine;

/// One conversation with a guest.
pub(super) struct Conversation {
    pub(super) specification: Specification,
    pub(super) store: Store,
    pub(super) needles: ReferencePattern,
    pub(super) options: Options,
    /// The build's promised memory, in bytes.
    pub(super) memory_bytes: u64,
    /// See [`Session::is_greeted`].
    pub(super) is_greeted: bool,
    pub(super) progress: Arc<Progress>,
    pub(super) ending: Arc<Ending>,
}

impl Conversation {
    /// Talks to the guest until the build's end.
    pub(super) async fn hold(
        self,
        machine: &mut Machine,
        stream: UnixStream,
        interruptions: &Interruptions<'_>,
    ) -> Outcome {
        let (progress, ending) = (Arc::clone(&self.progress), Arc::clone(&self.ending));
        let needs_failed_guest = self.options.needs_failed_guest();
        let session = self.start(stream).map_err(|error| BuildError::Executor(ExecutorError::Thread(error)))?;
        let mut outcome = pin!(outcome(session, machine, &progress, &ending));
        loop {
            let interruption = tokio::select! {
                biased;
                interruption = interruptions.next() => interruption,
                outcome = &mut outcome => return outcome,
            };
            if let Interruption::Overdue(reason) = &interruption
                && needs_failed_guest
                && progress.stop(reason.clone())
            {
                ending.tell_to_stop();
                continue;
            }
            return match ending.claim(Party::Task) {
                Claim::Won => Err(interruption.into()),
                // Outputs that are being stored can't be taken back, and their result is worth the wait. A failure stands.
                Claim::Lost => {
                    ending.hang_up();
                    outcome.await
                }
            };
        }
    }

    /// Starts the thread that talks to the guest. It ends at the latest when the guest's processes do, since its
    /// connection does.
    fn start(self, stream: UnixStream) -> std::io::Result<oneshot::Receiver<Outcome>> {
        self.ending.connect(stream)?;
        let handle = Handle::current();
        let (sender, receiver) = oneshot::channel();
        std::thread::Builder::new().name("session".to_owned()).spawn(move || {
            let Self { specification, store, needles, options, memory_bytes, is_greeted, progress, ending } = self;
            let Some(line) = ending.line() else { return };
            let exchange =
                Exchange { line, store: &store, handle, progress: &progress, ending: &ending, options: &options };
            let needles = &needles;
            let session = Session { exchange, specification, needles, memory_bytes, is_greeted, silence: SILENCE };
            // If the build was stopped, nothing waits for the outcome.
            let _ = sender.send(session.converse());
        })?;
        Ok(receiver)
    }
}

/// Waits for the session's outcome, or for a death that keeps it from having one.
async fn outcome(
    mut session: oneshot::Receiver<Outcome>,
    machine: &mut Machine,
    progress: &Progress,
    ending: &Ending,
) -> Outcome {
    tokio::select! {
        biased;
        outcome = &mut session => match outcome {
            Ok(Err(error)) if is_disconnect(&error) => {
                let death = timeout(AFTERMATH, machine.died()).await;
                Err(death.map_or(error, |death| BuildError::Executor(ExecutorError::died(death, progress.phase()))))
            }
            outcome => outcome.unwrap_or_else(|_| Err(BuildError::Executor(ExecutorError::SessionPanicked))),
        },
        found = machine.died() => {
            let outcome = match timeout(AFTERMATH, &mut session).await {
                Err(_) if ending.claim(Party::Task) == Claim::Lost => session.await.ok(),
                outcome => outcome.ok().and_then(Result::ok),
            };
            let is_told = |outcome: &Outcome| !outcome.as_ref().is_err_and(is_disconnect);
            let death = || Err(BuildError::Executor(ExecutorError::died(found, progress.phase())));
            outcome.filter(is_told).unwrap_or_else(death)
        }
    }
}
