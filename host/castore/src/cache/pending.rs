//! Records what the remote store lacks yet, as empty files that outlive the process.

use std::{
    fs::{self, File},
    io,
    path::PathBuf,
    sync::LazyLock,
    time::Duration,
};

use nix::fcntl::{Flock, FlockArg};
use tokio::sync::{Notify, watch};

use crate::{
    B3Digest,
    blobservice::{digests_in, lock},
};

/// Delay before a failed upload is tried again.
const RETRY: Duration = Duration::from_secs(30);

/// Signals that some cache of this process has uploaded blobs.
static UPLOADED: LazyLock<watch::Sender<()>> = LazyLock::new(watch::Sender::default);

/// Tells all caches of this process that blobs have been uploaded.
pub(super) fn signal_upload() {
    UPLOADED.send_replace(());
}

/// Changes with each [`signal_upload`].
pub(super) fn watch_uploads() -> watch::Receiver<()> {
    UPLOADED.subscribe()
}

/// Digests that are to be uploaded.
#[derive(Debug)]
pub(super) struct Pending {
    dir: PathBuf,
    added: Notify,
}

impl Pending {
    /// The records in this directory, which is created if it is missing.
    pub(super) fn open(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        Ok(Self { dir, added: Notify::new() })
    }

    /// Adds these, durably.
    pub(super) fn add<'a>(&self, digests: impl IntoIterator<Item = &'a B3Digest>) -> io::Result<()> {
        for digest in digests {
            File::create(self.dir.join(digest.to_hex()))?;
        }
        File::open(&self.dir)?.sync_all()
    }

    pub(super) fn contains(&self, digest: &B3Digest) -> io::Result<bool> {
        self.dir.join(digest.to_hex()).try_exists()
    }

    pub(super) fn list(&self) -> io::Result<Vec<B3Digest>> {
        digests_in(&self.dir)
    }

    pub(super) fn remove(&self, digest: &B3Digest) -> io::Result<()> {
        match fs::remove_file(self.dir.join(digest.to_hex())) {
            // Another process has done the same.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }

    /// Locks the records, against other processes and threads that do the same.
    pub(super) fn lock(&self, how: FlockArg) -> io::Result<Flock<File>> {
        lock(&self.dir, how)
    }

    /// Has the uploads begin.
    pub(super) fn wake(&self) {
        self.added.notify_one();
    }

    /// Waits until it is time for the next upload; `uploaded` is the outcome of the last one, and `uploads` comes from
    /// [`watch_uploads`].
    pub(super) async fn wait_after(&self, uploaded: io::Result<()>, uploads: &mut watch::Receiver<()>) {
        let Err(error) = uploaded else { return self.added.notified().await };
        // `WouldBlock` only means that other uploads have to come first.
        if error.kind() != io::ErrorKind::WouldBlock {
            tracing::warn!("can't write back to the remote store, will try again: {error}");
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY) => {}
            () = self.added.notified() => {}
            _ = uploads.changed() => {}
        }
    }
}
