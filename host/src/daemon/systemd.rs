//! Notifications to systemd: ready, alive, stopping.

use sd_notify::NotifyState;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::scheduler::Scheduler;

/// Reports that the daemon is ready, and notifies the watchdog until the handle is dropped. Does nothing without systemd.
pub(super) fn ready(scheduler: Scheduler) -> AbortOnDropHandle<()> {
    notify(&[NotifyState::Ready]);
    AbortOnDropHandle::new(tokio::spawn(async move { watchdog(&scheduler).await }))
}

/// Reports that the daemon is stopping, once it is.
pub(super) async fn stopping(ending: &CancellationToken) {
    ending.cancelled().await;
    notify(&[NotifyState::Stopping]);
}

/// Notifies the watchdog as long as the scheduler's event loop answers.
async fn watchdog(scheduler: &Scheduler) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let mut ticks = tokio::time::interval(limit / 2);
    loop {
        ticks.tick().await;
        scheduler.answers().await;
        notify(&[NotifyState::Watchdog]);
    }
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "can't notify systemd");
    }
}
