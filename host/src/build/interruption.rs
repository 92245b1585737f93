//! What ends a build from outside of its guest: its client, or a limit on its time.

use std::future::Future;

use tokio_util::sync::CancellationToken;

use super::{
    error::{BuildError, ExecutorError, Failed, Reason},
    progress::Progress,
};

/// Why a build is to end now.
pub(super) enum Interruption {
    /// Its client wants no result any more.
    Cancelled,
    /// It has reached a limit on its time.
    Overdue(Reason),
}

impl From<Interruption> for BuildError {
    fn from(interruption: Interruption) -> Self {
        match interruption {
            Interruption::Cancelled => Self::Executor(ExecutorError::Interrupted),
            Interruption::Overdue(reason) => Self::Failed(Box::new(Failed { reason, usage: None, kept: None })),
        }
    }
}

/// Where interruptions of one build come from.
pub(super) struct Interruptions<'b> {
    pub(super) cancel: &'b CancellationToken,
    pub(super) progress: &'b Progress,
}

impl Interruptions<'_> {
    /// Waits for the next one.
    pub(super) async fn next(&self) -> Interruption {
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Interruption::Cancelled,
            reason = self.progress.overdue() => Interruption::Overdue(reason),
        }
    }

    /// Waits for something unless the build is interrupted before.
    pub(super) async fn before<T>(&self, future: impl Future<Output = T>) -> Result<T, BuildError> {
        tokio::select! {
            biased;
            interruption = self.next() => Err(interruption.into()),
            value = future => Ok(value),
        }
    }
}
