//! What the far store lacks, noted as empty files, so that it outlives the process.

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

/// How long to wait before what failed is tried again.
const RETRY: Duration = Duration::from_secs(30);

/// Told, by whatever near store in this process, when the far one has got blobs.
static UPLOADED: LazyLock<watch::Sender<()>> = LazyLock::new(watch::Sender::default);

/// Says that a far store has got blobs.
pub(super) fn uploaded() {
    UPLOADED.send_replace(());
}

/// Hears it.
pub(super) fn uploads() -> watch::Receiver<()> {
    UPLOADED.subscribe()
}

#[derive(Debug)]
pub(super) struct Notes {
    dir: PathBuf,
    more: Notify,
}

impl Notes {
    /// The notes in this directory, which is made when it is not there.
    pub(super) fn open(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        Ok(Self { dir, more: Notify::new() })
    }

    /// Notes these, durably.
    pub(super) fn add<'a>(&self, digests: impl IntoIterator<Item = &'a B3Digest>) -> io::Result<()> {
        for digest in digests {
            File::create(self.dir.join(digest.to_hex()))?;
        }
        File::open(&self.dir)?.sync_all()
    }

    pub(super) fn has(&self, digest: &B3Digest) -> io::Result<bool> {
        self.dir.join(digest.to_hex()).try_exists()
    }

    /// All that is noted.
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

    /// Keeps other processes and threads from locking these in another way.
    pub(super) fn lock(&self, how: FlockArg) -> io::Result<Flock<File>> {
        lock(&self.dir, how)
    }

    /// Says that what was noted can be uploaded.
    pub(super) fn wake(&self) {
        self.more.notify_one();
    }

    /// Waits after an upload that has gone like this until it is time for the next.
    pub(super) async fn wait_after(&self, uploaded: io::Result<()>, others: &mut watch::Receiver<()>) {
        let Err(error) = uploaded else { return self.more.notified().await };
        // What has to wait its turn is no failure.
        if error.kind() != io::ErrorKind::WouldBlock {
            tracing::warn!("can't write back to the far store, to be tried again: {error}");
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY) => {}
            () = self.more.notified() => {}
            _ = others.changed() => {}
        }
    }
}
