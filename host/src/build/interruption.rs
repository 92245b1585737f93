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
    /// That of a machine without a build has no limit on its time.
    pub(super) progress: Option<&'b Progress>,
}

impl Interruptions<'_> {
    /// Waits for an interruption.
    pub(super) async fn next(&self) -> Interruption {
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Interruption::Cancelled,
            reason = self.overdue() => Interruption::Overdue(reason),
        }
    }

    async fn overdue(&self) -> Reason {
        match self.progress {
            Some(progress) => progress.overdue().await,
            None => std::future::pending().await,
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
