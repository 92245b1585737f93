//! Blobs as plain files.
//!
//! ```text
//!   open_write ─▶ buffer ── small ──────────────────┐
//!                   └────── grows ─▶ staging file ──┴─ close ─▶ staged ── commit ─▶ DIR/b3/XX/HEX
//! ```
//!
//! `commit` syncs the file system and only then renames, so a name in `b3` always stands for a whole blob, whenever the
//! machine stops. Until then a blob can be read through its own service only. The names are synced too, those that
//! others have made included: a blob found in `b3` may have got there a moment ago. The empty blob is never stored.

use std::{
    collections::{HashMap, hash_map::Entry},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use async_trait::async_trait;
use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat, renameat},
    sys::stat::{Mode, fstatat, mkdirat},
    unistd::syncfs,
};

use super::{
    BlobReader, BlobService, BlobWriter,
    local_io::{LocalBlobReader, LocalBlobWriter},
    staging::Staging,
};
use crate::B3Digest;

const BLOBS: &str = "b3";
const STAGING: &str = "staging";

/// Blobs as plain files, `DIR/b3/XX/HEX` with mode 0444: HEX the digest in hexadecimal, XX its first two digits.
/// Several processes may have the same directory open.
#[derive(Debug)]
pub struct LocalBlobService {
    shared: Arc<Shared>,
}

#[derive(Debug)]
pub(super) struct Shared {
    /// `DIR/b3`
    blobs: Arc<File>,
    /// `DIR/staging`
    staging_parent: PathBuf,
    /// Made when the first blob is written, so that readers need no permission to write.
    staging: OnceLock<Staging>,
    staged: Mutex<HashMap<B3Digest, u64>>,
    committing: Mutex<()>,
    /// Somebody counts on names in `b3` that may not be durable.
    unsynced: AtomicBool,
}

impl LocalBlobService {
    /// The store in this directory, which is made when it is not there. Sweeps what dead processes have left.
    ///
    /// # Errors
    ///
    /// When the directory can't be made, read or swept.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let staging_parent = dir.join(STAGING);
        fs::create_dir_all(dir.join(BLOBS))?;
        fs::create_dir_all(&staging_parent)?;
        match Staging::sweep(&staging_parent) {
            // A store that may only be read.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem) => {}
            swept => swept?,
        }
        Ok(Self { shared: Arc::new(Shared::new(File::open(dir.join(BLOBS))?.into(), staging_parent)) })
    }
}

#[async_trait]
impl BlobService for LocalBlobService {
    async fn has(&self, digest: &B3Digest) -> io::Result<bool> {
        self.shared.has(digest)
    }

    async fn open_read(&self, digest: &B3Digest) -> io::Result<Option<Box<dyn BlobReader>>> {
        if *digest == B3Digest::EMPTY {
            return Ok(Some(Box::new(io::Cursor::new([]))));
        }
        Ok(self.shared.open_file(digest)?.map(|file| Box::new(LocalBlobReader::new(file)) as _))
    }

    async fn open_write(&self) -> Box<dyn BlobWriter> {
        Box::new(LocalBlobWriter::new(self.shared.clone()))
    }

    async fn open_file(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        if *digest == B3Digest::EMPTY {
            return super::sealed_copy(Box::new(io::Cursor::new([]))).await.map(Some);
        }
        self.shared.open_file(digest)
    }

    fn batch(&self) -> Arc<dyn BlobService> {
        let Shared { blobs, staging_parent, .. } = &*self.shared;
        Arc::new(Self { shared: Arc::new(Shared::new(blobs.clone(), staging_parent.clone())) })
    }

    async fn commit(&self) -> io::Result<()> {
        self.shared.commit()
    }
}

impl Shared {
    fn new(blobs: Arc<File>, staging_parent: PathBuf) -> Self {
        Self {
            blobs,
            staging_parent,
            staging: OnceLock::new(),
            staged: Mutex::default(),
            committing: Mutex::default(),
            unsynced: AtomicBool::new(false),
        }
    }

    pub(super) fn has(&self, digest: &B3Digest) -> io::Result<bool> {
        if *digest == B3Digest::EMPTY || self.staged().contains_key(digest) {
            return Ok(true);
        }
        match fstatat(&*self.blobs, blob_path(digest).as_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(_) => {
                self.unsynced.store(true, Ordering::Relaxed);
                Ok(true)
            }
            Err(Errno::ENOENT) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn open_file(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        {
            let staged = self.staged();
            if let (Some(number), Some(staging)) = (staged.get(digest), self.staging.get()) {
                return staging.open_file(*number).map(Some);
            }
        }
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        match openat(&*self.blobs, blob_path(digest).as_str(), flags, Mode::empty()) {
            Ok(file) => Ok(Some(file.into())),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Where new blobs go.
    pub(super) fn staging(&self) -> io::Result<&Staging> {
        if let Some(staging) = self.staging.get() {
            return Ok(staging);
        }
        // Another thread may be faster; then this one's directory goes again.
        let staging = Staging::create(&self.staging_parent)?;
        Ok(self.staging.get_or_init(|| staging))
    }

    /// Takes over a whole blob from its writer.
    pub(super) fn stage(&self, digest: B3Digest, number: u64) -> io::Result<()> {
        match self.staged().entry(digest) {
            // Two writers had the same contents. The first one's file stays: a commit may have synced it already.
            Entry::Occupied(_) => self.staging()?.remove(number),
            Entry::Vacant(free) => {
                free.insert(number);
                Ok(())
            }
        }
    }

    fn commit(&self) -> io::Result<()> {
        let _committing = self.committing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(staging) = self.staging.get() {
            self.publish_all(staging)?;
        }
        // The contents are durable, now their names. A second sync of what little has changed since costs less than one
        // for each directory.
        if self.unsynced.swap(false, Ordering::Relaxed)
            && let Err(errno) = syncfs(&*self.blobs)
        {
            self.unsynced.store(true, Ordering::Relaxed);
            return Err(errno.into());
        }
        Ok(())
    }

    fn publish_all(&self, staging: &Staging) -> io::Result<()> {
        let mut batch: Vec<(B3Digest, u64)> = self.staged().iter().map(|(digest, number)| (*digest, *number)).collect();
        if batch.is_empty() {
            return Ok(());
        }
        batch.sort_unstable();
        syncfs(staging.dir())?;
        self.unsynced.store(true, Ordering::Relaxed);
        // Held, so that no reader looks between the two places.
        let mut staged = self.staged();
        for (digest, number) in &batch {
            self.publish(staging, digest, *number)?;
            staged.remove(digest);
        }
        Ok(())
    }

    fn publish(&self, staging: &Staging, digest: &B3Digest, number: u64) -> io::Result<()> {
        let (from, to) = (number.to_string(), blob_path(digest));
        let rename = || renameat(staging.dir(), from.as_str(), &*self.blobs, to.as_str());
        match rename() {
            Err(Errno::ENOENT) => {
                match mkdirat(&*self.blobs, fan_out(digest).as_str(), Mode::from_bits_retain(0o755)) {
                    Ok(()) | Err(Errno::EEXIST) => Ok(rename()?),
                    Err(errno) => Err(errno.into()),
                }
            }
            renamed => Ok(renamed?),
        }
    }

    fn staged(&self) -> MutexGuard<'_, HashMap<B3Digest, u64>> {
        self.staged.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The directory of a blob below `b3`.
fn fan_out(digest: &B3Digest) -> String {
    let mut hex = digest.to_hex();
    hex.truncate(2);
    hex
}

/// The file of a blob below `b3`.
fn blob_path(digest: &B3Digest) -> String {
    let hex = digest.to_hex();
    format!("{}/{hex}", &hex[..2])
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use tokio::io::AsyncWriteExt as _;

    use super::*;

    async fn put(service: &LocalBlobService, contents: &[u8]) -> B3Digest {
        let mut writer = service.open_write().await;
        writer.write_all(contents).await.unwrap();
        writer.close().await.unwrap()
    }

    fn files_below(dir: &Path) -> usize {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        entries.map(|path| if path.is_dir() { files_below(&path) } else { 1 }).sum()
    }

    #[tokio::test]
    async fn a_committed_blob_is_a_plain_read_only_file_named_by_its_digest() {
        let dir = tempfile::tempdir().unwrap();
        let service = LocalBlobService::open(dir.path()).unwrap();
        let digest = put(&service, b"contents").await;
        assert_eq!(files_below(&dir.path().join(BLOBS)), 0);
        service.commit().await.unwrap();
        let hex = digest.to_hex();
        let path = dir.path().join("b3").join(&hex[..2]).join(&hex);
        assert_eq!(fs::read(&path).unwrap(), b"contents");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o444);
        assert_eq!(files_below(&dir.path().join(STAGING)), 0);
    }

    #[tokio::test]
    async fn blobs_that_are_not_committed_are_private_and_go_with_their_service() {
        let dir = tempfile::tempdir().unwrap();
        let service = LocalBlobService::open(dir.path()).unwrap();
        let digest = put(&service, b"uncommitted").await;
        let other = LocalBlobService::open(dir.path()).unwrap();
        assert!(service.has(&digest).await.unwrap());
        assert!(!other.has(&digest).await.unwrap());
        drop(service);
        assert!(!LocalBlobService::open(dir.path()).unwrap().has(&digest).await.unwrap());
        assert_eq!(files_below(dir.path()), 0);
    }

    #[tokio::test]
    async fn what_a_killed_process_left_is_swept_at_open() {
        let dir = tempfile::tempdir().unwrap();
        let living = LocalBlobService::open(dir.path()).unwrap();
        let staged = put(&living, b"in use").await;
        // A killed process runs no destructors, and the kernel drops its locks.
        let leftover = dir.path().join(STAGING).join("1-0");
        fs::create_dir(&leftover).unwrap();
        fs::write(leftover.join("0"), b"half a bl").unwrap();
        let service = LocalBlobService::open(dir.path()).unwrap();
        assert!(!leftover.exists());
        assert!(!service.has(&B3Digest::of(b"half a bl")).await.unwrap());
        living.commit().await.unwrap();
        assert!(service.has(&staged).await.unwrap());
    }

    #[tokio::test]
    async fn two_services_may_commit_the_same_blob() {
        let dir = tempfile::tempdir().unwrap();
        let one = LocalBlobService::open(dir.path()).unwrap();
        let other = LocalBlobService::open(dir.path()).unwrap();
        let digest = put(&one, b"same").await;
        assert_eq!(put(&other, b"same").await, digest);
        one.commit().await.unwrap();
        other.commit().await.unwrap();
        assert_eq!(files_below(&dir.path().join(BLOBS)), 1);
        assert_eq!(files_below(&dir.path().join(STAGING)), 0);
    }

    #[tokio::test]
    async fn a_blob_known_already_is_not_staged() {
        let dir = tempfile::tempdir().unwrap();
        let service = LocalBlobService::open(dir.path()).unwrap();
        let large = vec![7; 1024 * 1024];
        for contents in [b"known".as_slice(), &large] {
            put(&service, contents).await;
            put(&service, contents).await;
        }
        assert_eq!(files_below(&dir.path().join(STAGING)), 2);
        service.commit().await.unwrap();
        put(&service, b"known").await;
        put(&service, &large).await;
        assert_eq!(files_below(&dir.path().join(STAGING)), 0);
    }
}
