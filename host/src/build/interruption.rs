//! Interruptions of a build from outside its guest: by its client, or by a limit on its time.

use std::future::Future;

use tokio_util::sync::CancellationToken;

use super::{
    error::{BuildError, ExecutorError, Failed, Reason},
    progress::Progress,
};

/// Why a build must end now.
pub(super) enum Interruption {
    /// Its client has cancelled it.
    Cancelled,
    /// It has exceeded a limit on its time.
    Overdue(Reason),
}

impl From<Interruption> for BuildError {
    fn from(interruption: Interruption) -> Self {
        match interruption {
            Interruption::Cancelled => Self::Executor(ExecutorError::Interrupted),
            Interruption::Overdue(reason) => Self::Failed(Box::new(Failed::new(reason, None))),
        }
    }
}

/// The sources of one build's interruptions.
pub(super) struct Interruptions<'b> {
    pub(super) cancel: &'b CancellationToken,
    pub(super) progress: &'b Progress,
}

impl Interruptions<'_> {
    /// Waits for an interruption.
    pub(super) async fn next(&self) -> Interruption {
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Interruption::Cancelled,
            reason = self.progress.overdue() => Interruption::Overdue(reason),
        }
    }

    /// Waits for a future, or for an interruption if that comes first.
    pub(super) async fn before<T>(&self, future: impl Future<Output = T>) -> Result<T, BuildError> {
        tokio::select! {
            biased;
            interruption = self.next() => Err(interruption.into()),
            value = future => Ok(value),
        }
    }
}
