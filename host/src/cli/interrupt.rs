//! Ctrl-C, SIGTERM and SIGHUP: the first ends the command in order, the second at once.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::{CliError, Exit, terminal};

/// Runs a command on its own runtime, with a token that the first signal cancels.
///
/// Returns as soon as the command does. Work on blocking threads, such as an interrupted import, is not waited for; the
/// store stays consistent.
pub(super) fn until_interrupted<F>(command: impl FnOnce(CancellationToken) -> F) -> Result<(), CliError>
where
    F: Future<Output = Result<(), CliError>>,
{
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| CliError::failed("can't start the runtime's threads", error))?;
    let _terminal = terminal::TakeBack;
    let cancel = CancellationToken::new();
    let result = runtime.block_on(async {
        listen(&cancel).map_err(|error| CliError::failed("can't listen for signals", error))?;
        command(cancel).await
    });
    runtime.shutdown_background();
    result
}

fn listen(cancel: &CancellationToken) -> std::io::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let cancel = cancel.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            if cancel.is_cancelled() {
                terminal::take_back();
                std::process::exit(Exit::Executor.code().into());
            }
            cancel.cancel();
        }
    });
    Ok(())
}

/// Runs blocking work on a thread of its own, and stops waiting for it when interrupted.
pub(super) async fn blocking<T, E>(
    cancel: &CancellationToken,
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, CliError>
where
    T: Send + 'static,
    E: Into<CliError> + Send + 'static,
{
    tokio::select! {
        biased;
        () = cancel.cancelled() => Err(CliError::interrupted()),
        done = tokio::task::spawn_blocking(work) => match done {
            Ok(result) => result.map_err(Into::into),
            Err(panic) => Err(CliError::failed("a thread panicked", panic)),
        },
    }
}
