//! Open blobs, at most so many, the ones used last.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::Arc;

use cofferdam_castore::B3Digest;
use parking_lot::Mutex;

use super::wire::{Host, MAX_BLOBS};

/// Most blobs that are open at a time.
pub(super) const MAX_OPEN: usize = 512;

/// Open blobs of one device.
#[derive(Debug)]
pub(super) struct Blobs {
    host: Arc<Host>,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    files: HashMap<B3Digest, (Arc<File>, u64)>,
    /// Counts uses, so that the oldest can be told.
    clock: u64,
}

impl Blobs {
    pub(super) fn new(host: Arc<Host>) -> Self {
        Self { host, open: Mutex::default() }
    }

    /// The file with these contents. If it must be asked for, those that are likely to come next are asked for with it:
    /// a round trip to the host process costs as much as a small file's READ.
    pub(super) fn get(&self, digest: B3Digest, next: impl Iterator<Item = B3Digest>) -> io::Result<Arc<File>> {
        let mut open = self.open.lock();
        if let Some(file) = open.find(&digest) {
            return Ok(file);
        }
        let mut wanted = vec![digest];
        wanted.extend(next.filter(|next| *next != digest && !open.files.contains_key(next)).take(MAX_BLOBS - 1));
        drop(open);

        let files = self.host.blobs(wanted)?;
        let mut open = self.open.lock();
        for (digest, file) in files {
            open.insert(digest, file);
        }
        // The one wanted was inserted first; the others must not have driven it out.
        open.find(&digest).ok_or_else(|| io::Error::from_raw_os_error(libc::EIO))
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.open.lock().files.len()
    }
}

impl Open {
    fn find(&mut self, digest: &B3Digest) -> Option<Arc<File>> {
        self.clock += 1;
        let (file, used) = self.files.get_mut(digest)?;
        *used = self.clock;
        Some(Arc::clone(file))
    }

    fn insert(&mut self, digest: B3Digest, file: File) {
        if self.files.len() >= MAX_OPEN {
            self.close_the_older_half();
        }
        self.clock += 1;
        self.files.insert(digest, (Arc::new(file), self.clock));
    }

    fn close_the_older_half(&mut self) {
        let mut uses: Vec<u64> = self.files.values().map(|(_, used)| *used).collect();
        let middle = uses.len() / 2;
        let (_, median, _) = uses.select_nth_unstable(middle);
        let median = *median;
        self.files.retain(|_, (_, used)| *used >= median);
    }
}
