//! The crate's own threads, so that callers may use any executor, inside a runtime or outside.

use std::{io, sync::LazyLock};

use futures::channel::oneshot;
use tokio::runtime::{Builder, EnterGuard, Runtime};
use tokio_util::task::AbortOnDropHandle;

static RUNTIME: LazyLock<io::Result<Runtime>> =
    LazyLock::new(|| Builder::new_multi_thread().thread_name("store").enable_all().build());

/// Starts a task on these threads. Dropping the result aborts it.
///
/// The result does not use tokio to wait. tokio's futures sometimes yield to other tasks, and would never be polled again on
/// a runtime's thread that is blocked.
pub(crate) fn spawn<T: Send + 'static>(
    work: impl Future<Output = io::Result<T>> + Send + 'static,
) -> impl Future<Output = io::Result<T>> + Send {
    let (done, outcome) = oneshot::channel();
    let task = runtime().map(|runtime| {
        AbortOnDropHandle::new(runtime.spawn(async move {
            // Fails if the caller no longer waits for the result.
            let _ = done.send(work.await);
        }))
    });
    async {
        let _task = task?;
        outcome.await.unwrap_or_else(|_| Err(io::Error::other("the task of a store was lost")))
    }
}

/// Enters the runtime, to create something that starts tasks on these threads.
pub(crate) fn enter() -> io::Result<EnterGuard<'static>> {
    runtime().map(Runtime::enter)
}

/// Starts a detached task.
pub(crate) fn detach(work: impl Future<Output = ()> + Send + 'static) -> io::Result<()> {
    runtime().map(|runtime| drop(runtime.spawn(work)))
}

/// Starts detached blocking work.
pub(crate) fn spawn_blocking(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    runtime().map(|runtime| drop(runtime.spawn_blocking(work)))
}

fn runtime() -> io::Result<&'static Runtime> {
    let failed = |error: &io::Error| io::Error::new(error.kind(), format!("the store has no threads: {error}"));
    RUNTIME.as_ref().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn runtime_threads_can_block_on_work_repeatedly() {
        for number in 0..1000 {
            let worked = futures::executor::block_on(spawn(async move { Ok(number) }));
            assert_eq!(worked.unwrap(), number);
        }
    }
}
