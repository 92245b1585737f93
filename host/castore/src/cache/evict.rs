//! Evicts cached blobs that take more bytes than allowed.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use parking_lot::Mutex;
use tokio::sync::RwLock;

use super::pending::Pending;
use crate::{B3Digest, LocalBlobService};

/// Most bytes that are added between two sweeps.
const MAX_SLACK_BYTES: u64 = 256 * 1024 * 1024;

#[derive(Debug)]
pub(super) struct Evictor {
    pub(super) local: Arc<LocalBlobService>,
    pending: Arc<Pending>,
    max_bytes: u64,
    /// How many batches have used each blob.
    pins: Mutex<HashMap<B3Digest, usize>>,
    /// Bytes that were added since the last sweep.
    new_bytes: AtomicU64,
    /// Locked while a blob is removed. Locked shared from finding or adding a blob until it is pinned or open.
    pub(super) removing: RwLock<()>,
    sweeping: Mutex<()>,
}

impl Evictor {
    pub(super) fn new(local: Arc<LocalBlobService>, pending: Arc<Pending>, max_bytes: u64) -> Self {
        Self {
            local,
            pending,
            max_bytes,
            pins: Mutex::default(),
            // An earlier process may have left too many.
            new_bytes: AtomicU64::new(max_bytes),
            removing: RwLock::default(),
            sweeping: Mutex::default(),
        }
    }

    /// Keeps a blob until it is unpinned as often as it was pinned.
    pub(super) fn pin(&self, digest: &B3Digest) {
        *self.pins.lock().entry(*digest).or_default() += 1;
    }

    pub(super) fn unpin(&self, digest: &B3Digest) {
        let mut pins = self.pins.lock();
        if let Some(count) = pins.get_mut(digest) {
            *count -= 1;
            if *count == 0 {
                pins.remove(digest);
            }
        }
    }

    /// Counts bytes that were added. `true` when it is time for a sweep.
    pub(super) fn add_bytes(&self, bytes: u64) -> bool {
        let new_bytes = self.new_bytes.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        new_bytes >= self.slack() && self.new_bytes.swap(0, Ordering::Relaxed) > 0
    }

    /// Bytes that are added between two sweeps.
    fn slack(&self) -> u64 {
        (self.max_bytes / 8).clamp(1, MAX_SLACK_BYTES)
    }

    /// If the blobs take too many bytes, removes the least recently used until the additions before the next sweep fit.
    pub(super) fn sweep(&self) -> io::Result<()> {
        let _sweeping = self.sweeping.lock();
        let mut blobs = self.scan()?;
        let mut bytes: u64 = blobs.iter().map(|blob| blob.bytes).sum();
        if bytes <= self.max_bytes {
            return Ok(());
        }
        blobs.sort_unstable_by_key(|blob| blob.used);
        for blob in blobs {
            if bytes <= self.max_bytes - self.slack() {
                break;
            }
            if self.remove_unused(&blob.digest)? {
                bytes -= blob.bytes;
            }
        }
        Ok(())
    }

    /// Takes the outcome of opening a cached blob, and marks the blob as used. A damaged blob is removed, and counts as not
    /// cached, unless the remote store lacks it.
    pub(super) fn opened(&self, digest: &B3Digest, opened: io::Result<Option<File>>) -> io::Result<Option<File>> {
        match opened {
            Err(error) if error.kind() == io::ErrorKind::InvalidData && !self.pending.contains(digest)? => {
                tracing::warn!("will be downloaded again: {error}");
                match self.local.remove(digest) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                    _ => Ok(None),
                }
            }
            opened => Ok(opened?.inspect(|file| self.local.mark_used(digest, file))),
        }
    }

    fn scan(&self) -> io::Result<Vec<Blob>> {
        let mut blobs = Vec::new();
        for fan_out in fs::read_dir(format!("/proc/self/fd/{}", self.local.committed().as_raw_fd()))? {
            for entry in fs::read_dir(fan_out?.path())? {
                let entry = entry?;
                let Some(digest) = B3Digest::from_hex(entry.file_name().as_encoded_bytes()) else { continue };
                match entry.metadata() {
                    Ok(metadata) => blobs.push(Blob { used: metadata.modified()?, bytes: metadata.len(), digest }),
                    // Another process sweeps, too.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(blobs)
    }

    /// Removes a blob that is not used. `true` when it is gone.
    fn remove_unused(&self, digest: &B3Digest) -> io::Result<bool> {
        let _removing = self.removing.blocking_write();
        // Locked until the blob is gone, so that no reader pins it meanwhile.
        let pins = self.pins.lock();
        if pins.contains_key(digest) || self.pending.contains(digest)? {
            return Ok(false);
        }
        let hex = digest.to_hex();
        let path = format!("/proc/self/fd/{}/{}/{hex}", self.local.committed().as_raw_fd(), &hex[..2]);
        match File::open(path) {
            // `LocalBlobService::mark_used` has locked it, so a reader has it open.
            Ok(file) if file.try_lock().is_err() => Ok(false),
            Ok(_) => self.local.remove(digest).map(|()| true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(error) => Err(error),
        }
    }
}

struct Blob {
    used: SystemTime,
    bytes: u64,
    digest: B3Digest,
}
