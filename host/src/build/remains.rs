//! The end of a failed build: its remains are kept, and a client may use a shell in its guest.

use cofferdam_castore::refscan::ReferencePattern;
use cofferdam_protocol::{FromGuest, FromHost};

use super::{
    ending::{Claim, Party},
    error::{BuildError, ExecutorError, Failed, Kept},
    exchange::{Exchange, frame, next, out_of_place, receive_failed},
    line::Reader,
    phase::Phase,
};
use crate::outputs::Receiver;

impl Exchange<'_> {
    /// Keeps the remains of a failed build and runs its shell, as the options say. Its guest waits for orders. An error here
    /// is only logged: the build's own failure stands.
    pub(super) fn look_after(&self, mut failed: Failed, reader: &mut Reader<'_>) -> BuildError {
        if self.options.needs_failed_guest() && self.ending.claim(Party::Session) == Claim::Won {
            match self.take_remains(&mut failed, reader) {
                // The build was interrupted, and that was reported elsewhere.
                Err(_) if self.ending.is_over() => {}
                Err(error) => {
                    let error: &dyn std::error::Error = &error;
                    tracing::warn!(error, "the remains of the failed build can't be kept, or its shell failed");
                }
                Ok(()) => {}
            }
        }
        BuildError::Failed(Box::new(failed))
    }

    fn take_remains(&self, failed: &mut Failed, reader: &mut Reader<'_>) -> Result<(), BuildError> {
        if self.options.keep_failed {
            self.progress.enter(Phase::Keeping);
            failed.kept = self.keep(reader)?;
        }
        if self.options.shell.is_some()
            && let Some(terminal) = self.progress.terminal(Some(&failed.reason))
        {
            self.progress.enter(Phase::Shell);
            self.run_shell(terminal, reader)?;
        }
        Ok(())
    }

    /// Ingests the build's remains, as a tree with the layout of its root.
    fn keep(&self, reader: &mut Reader<'_>) -> Result<Option<Kept>, BuildError> {
        let store = |error| BuildError::Executor(ExecutorError::Store(error));
        self.line.say(&FromHost::Keep(self.options.limits.outputs())).map_err(frame)?;
        let needles = ReferencePattern::new::<&[u8]>([]).map_err(|error| store(std::io::Error::other(error)))?;
        let batch = self.store.batch();
        let mut receiver = Receiver::new(&batch, self.handle.clone(), &needles, self.options.limits.outputs());
        let mut node = None;
        let skipped = loop {
            match next(reader)? {
                FromGuest::Tree(event) if node.is_none() => {
                    let tree = receiver.take(&event).map_err(receive_failed)?;
                    node = tree.map(|tree| tree.node);
                }
                FromGuest::Kept { skipped } if !receiver.is_inside_tree() => break skipped,
                other => return Err(out_of_place(&other, "among the remains")),
            }
        };
        if self.ending.is_over() {
            return Err(BuildError::Executor(ExecutorError::Interrupted));
        }
        receiver.commit().map_err(store)?;
        Ok(node.map(|node| Kept { node, skipped }))
    }
}
