//! Garbage collection of the daemon's store: at times, and at once when the disk is too full.
//!
//! What it keeps is decided by [`cofferdam_castore::gc`]. Its own thread decides when, by [`Schedule`].

mod clock;
mod schedule;

use std::{
    fs::{self, File},
    io,
    path::PathBuf,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use cofferdam_castore::{
    LocalStore,
    blobservice::Lease,
    gc::{Collected, collect},
};

use self::{
    clock::{Clock, since_boot},
    schedule::{Cause, Due, Schedule},
};
use crate::{disk::Disk, store_paths::StorePaths, telemetry::Metrics};
pub(super) use schedule::Collection;

/// Pause between two looks at the clock and the disk.
const TICK: Duration = Duration::from_secs(1);

/// How long the daemon's end waits for a running collection. One that is cut off has removed only garbage.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// Collects until it is dropped.
pub(super) struct Collector {
    stop: Option<Sender<()>>,
    ended: Receiver<()>,
}

impl Collector {
    /// Starts to collect garbage in `store`. `stamp` is a file whose time tells when that was last done.
    ///
    /// # Errors
    ///
    /// There is no thread for it.
    pub(super) fn start(
        store: LocalStore,
        settings: Collection,
        stamp: PathBuf,
        paths: Arc<StorePaths>,
        disk: Arc<Disk>,
        metrics: Arc<Metrics>,
    ) -> io::Result<Self> {
        let ((stop, stopped), (end, ended)) = (channel(), channel());
        let run = Run { store, stamp, paths, disk, metrics, schedule: Schedule::new(settings) };
        thread::Builder::new().name("collector".to_owned()).spawn(move || {
            run.until(&stopped);
            drop(end);
        })?;
        Ok(Self { stop: Some(stop), ended })
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.stop = None;
        // It sends nothing: this waits for its end.
        let _ = self.ended.recv_timeout(END_PATIENCE);
    }
}

struct Run {
    store: LocalStore,
    stamp: PathBuf,
    /// Those of Nix.
    paths: Arc<StorePaths>,
    disk: Arc<Disk>,
    metrics: Arc<Metrics>,
    schedule: Schedule,
}

impl Run {
    fn until(mut self, stopped: &Receiver<()>) {
        let mut clock = Clock::default();
        while stopped.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
            let (now, wall) = (since_boot(), SystemTime::now());
            if let Some(jump) = clock.look(now, wall) {
                let keep = humantime::format_duration(self.schedule.settings.keep);
                tracing::warn!("the clock was set {jump}: garbage is next collected when {keep} have passed");
            }
            let last = fs::metadata(&self.stamp).and_then(|stamp| stamp.modified());
            let is_low = self.disk.low().is_some();
            if let Some(due) = self.schedule.due(now, wall, last.ok(), is_low, clock.steady_for(now)) {
                self.collect(due);
            }
        }
    }

    /// Keeps what recent store paths refer to, however old that is.
    fn recent(&self, keep: Duration) -> Option<Lease> {
        let since = SystemTime::now().checked_sub(keep).and_then(|since| since.duration_since(UNIX_EPOCH).ok());
        let nodes = self.paths.since(since.unwrap_or_default().as_secs());
        let nodes = nodes
            .map_err(|error| tracing::warn!(error = &error as &dyn std::error::Error, "store paths can't be kept"));
        self.store.store().blobs.lease(&nodes.ok()?).ok()
    }

    fn collect(&mut self, Due { cause, keep }: Due) {
        let begun = Instant::now();
        // First, so that a collection that fails is not tried again and again.
        let stamped = File::create(&self.stamp).map(drop);
        let recent = self.recent(keep);
        let collected = collect(&self.store, keep, false);
        drop(recent);
        if let Err(error) = self.paths.prune(&self.store.store()) {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "store paths whose contents are gone can't be removed"
            );
        }
        self.schedule.ended(cause, since_boot());
        self.metrics.collected(cause.word(), collected.as_ref().ok().map(|collected| collected.bytes));
        match collected {
            Ok(Collected { blobs, bytes, directories, .. }) => {
                let seconds = begun.elapsed().as_secs_f64();
                tracing::info!(cause = cause.word(), blobs, bytes, directories, seconds, "garbage collected");
            }
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "garbage can't be collected");
            }
        }
        if let (Err(error), Cause::Time) = (stamped, cause) {
            tracing::warn!("{}: can't be written: {error}", self.stamp.display());
        }
    }
}
