use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use nix::unistd::{UnlinkatFlags, unlinkat};
use parking_lot::Mutex;

use super::{
    super::{BlobReader, BlobService, BlobWriter, sealed_copy},
    blobs::LocalBlobs,
    layout::{BLOBS, STAGING, blob_path, check_layout, write_layout},
    lease::Lease,
    reader::LocalBlobReader,
    staging::Staging,
    verified::{Verified, Version},
    writer::LocalBlobWriter,
};
use crate::{B3Digest, Node};

/// Largest blob, in bytes, that is hashed for a caller who may not need it.
const MAX_READY_CHECK_BYTES: u64 = 1024 * 1024;

/// Precision of the time of a blob's last use: a time that is not older is not renewed, which saves a write to the disk.
const USE_RESOLUTION: Duration = Duration::from_secs(60);

/// Blobs as plain files: `DIR/b3/XX/HEX`, mode 0444. HEX is the digest in hexadecimal, XX its first two digits.
/// Several processes may use the same directory.
#[derive(Debug, Clone)]
pub struct LocalBlobService {
    blobs: Arc<LocalBlobs>,
}

impl LocalBlobService {
    /// Opens the store in this directory, and creates it if it is missing. Removes the leftovers of dead processes.
    ///
    /// # Errors
    ///
    /// The directory can't be created, read or cleaned. `Unsupported` when the store has the layout of another version.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let has_layout = check_layout(dir)?;
        let staging_parent = dir.join(STAGING);
        fs::create_dir_all(dir.join(BLOBS))?;
        fs::create_dir_all(&staging_parent)?;
        match Staging::sweep(&staging_parent) {
            // A read-only store.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem) => {}
            swept => swept?,
        }
        if !has_layout && let Err(error) = write_layout(dir, &staging_parent) {
            // The store is read-only, or the disk is full. A store without the file has this layout, too.
            tracing::debug!("{}: can't record the layout of the store: {error}", dir.display());
        }
        let committed = Arc::new(File::open(dir.join(BLOBS))?);
        let verified = Arc::new(Verified::new(dir.join(BLOBS)));
        Ok(Self { blobs: Arc::new(LocalBlobs::new(committed, staging_parent, verified, None)) })
    }

    pub(super) fn blobs(&self) -> &LocalBlobs {
        &self.blobs
    }

    /// A batch whose blobs may still be evicted: it does not hold the blobs that it finds.
    pub(crate) fn evictable_batch(&self) -> Arc<dyn BlobService> {
        Arc::new(self.with_staging(None))
    }

    fn with_staging(&self, held: Option<Mutex<HashSet<B3Digest>>>) -> Self {
        Self { blobs: Arc::new(self.blobs.with_staging(held)) }
    }

    /// The directory of committed blobs, `DIR/b3`.
    pub(crate) fn committed(&self) -> &File {
        self.blobs.committed()
    }

    /// Marks an open blob as used: renews its time if it is older than [`USE_RESOLUTION`], and locks it until the descriptor
    /// and its copies are closed.
    pub(crate) fn mark_used(&self, digest: &B3Digest, file: &File) {
        let modified = file.metadata().and_then(|metadata| metadata.modified());
        // A time in the future has no age, and is renewed.
        if !modified.is_ok_and(|time| time.elapsed().is_ok_and(|age| age < USE_RESOLUTION)) {
            let touch = || file.set_modified(SystemTime::now());
            // Fails, as the lock does, in a read-only store, from which nothing is evicted.
            let _ = self.blobs.verified.touch(digest, || Version::of(file), touch);
        }
        let _ = file.try_lock_shared();
    }

    /// Removes a committed blob. A process that has it open can still read it.
    pub(crate) fn remove(&self, digest: &B3Digest) -> io::Result<()> {
        Ok(unlinkat(self.committed(), blob_path(digest).as_str(), UnlinkatFlags::NoRemoveDir)?)
    }
}

#[async_trait]
impl BlobService for LocalBlobService {
    async fn has(&self, digest: &B3Digest) -> io::Result<bool> {
        self.blobs.has(digest, None)
    }

    async fn has_whole(&self, digest: &B3Digest, bytes: u64) -> io::Result<bool> {
        self.blobs.has(digest, Some(bytes))
    }

    async fn open_read(&self, digest: &B3Digest) -> io::Result<Option<Box<dyn BlobReader>>> {
        if *digest == B3Digest::EMPTY {
            return Ok(Some(Box::new(io::Cursor::new([]))));
        }
        let Some(file) = self.blobs.open_unchecked(digest)? else { return Ok(None) };
        let reader = LocalBlobReader::checking(file, *digest, self.blobs.verified.clone())?;
        Ok(Some(Box::new(reader)))
    }

    async fn open_write(&self) -> Box<dyn BlobWriter> {
        Box::new(LocalBlobWriter::new(self.blobs.clone()))
    }

    async fn open_write_unseen(&self) -> Box<dyn BlobWriter> {
        Box::new(LocalBlobWriter::unseen(self.blobs.clone()))
    }

    async fn open_file(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        if *digest == B3Digest::EMPTY {
            return sealed_copy(Box::new(io::Cursor::new([]))).await.map(Some);
        }
        self.blobs.open_file(digest, u64::MAX)
    }

    async fn open_file_if_ready(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        if *digest == B3Digest::EMPTY {
            return self.open_file(digest).await;
        }
        self.blobs.open_file(digest, MAX_READY_CHECK_BYTES)
    }

    fn batch(&self) -> Arc<dyn BlobService> {
        Arc::new(self.with_staging(Some(Mutex::default())))
    }

    fn lease(&self, nodes: &[Node]) -> io::Result<Lease> {
        Lease::take(&self.blobs.leases(), nodes)
    }

    async fn commit(&self) -> io::Result<()> {
        self.blobs.commit()
    }
}
