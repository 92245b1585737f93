//! What is done with the guest of a failed build before it ends: what the build has left is kept, and somebody may look
//! around in a shell.

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
    /// The build has failed, and its guest waits to be told what to do next. Whatever becomes of that, the failure
    /// stands.
    pub(super) fn look_after(&self, mut failed: Failed, reader: &mut Reader<'_>) -> BuildError {
        if self.options.needs_failed_guest() && self.ending.claim(Party::Session) == Claim::Won {
            match self.take_remains(&mut failed, reader) {
                // Somebody has hung up, and knows.
                Err(_) if self.ending.is_over() => {}
                Err(error) => {
                    let error: &dyn std::error::Error = &error;
                    tracing::warn!(error, "the guest of the failed build is of no more use");
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
            && let Some(terminal) = self.progress.terminal(&failed.reason)
        {
            self.progress.enter(Phase::Shell);
            self.run_shell(terminal, reader)?;
        }
        Ok(())
    }

    /// Ingests what the build has left, as a tree that is laid out as its root was.
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
                other => return Err(out_of_place(&other, "where a piece of what is kept was due")),
            }
        };
        if self.ending.is_over() {
            return Err(BuildError::Executor(ExecutorError::Interrupted));
        }
        receiver.commit().map_err(store)?;
        Ok(node.map(|node| Kept { node, skipped }))
    }
}
