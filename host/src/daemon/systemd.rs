//! What systemd is told: that the daemon is ready, that it is alive, that it ends.

use sd_notify::NotifyState;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::scheduler::Scheduler;

/// Says that the daemon is ready, and feeds the watchdog until what is returned is dropped. Without systemd, nobody hears
/// it.
pub(super) fn ready(scheduler: Scheduler) -> AbortOnDropHandle<()> {
    say(&[NotifyState::Ready]);
    AbortOnDropHandle::new(tokio::spawn(async move { watchdog(&scheduler).await }))
}

/// Says it when the daemon begins to end.
pub(super) async fn stopping(ending: &CancellationToken) {
    ending.cancelled().await;
    say(&[NotifyState::Stopping]);
}

/// Is fed as long as the event_loop of the builds answers.
async fn watchdog(scheduler: &Scheduler) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let mut ticks = tokio::time::interval(limit / 2);
    loop {
        ticks.tick().await;
        scheduler.answers().await;
        say(&[NotifyState::Watchdog]);
    }
}

fn say(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "systemd can't be told");
    }
}
