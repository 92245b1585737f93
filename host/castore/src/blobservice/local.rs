//! Blobs as plain files.
//!
//! ```text
//!   open_write ─▶ buffer ── small ──────────────────┐
//!                   └────── grows ─▶ staging file ──┴─ close ─▶ staged ── commit ─▶ DIR/b3/XX/HEX
//! ```
//!
//! `commit` syncs the file system and only then gives names, so a name in `b3` always stands for a whole blob, whenever the
//! machine stops. Until then a blob can be read through its own service only. The names are synced too, those that
//! others have made included: a blob found in `b3` may have got there a moment ago. The empty blob is never stored.
//! `DIR/format` has the number of this layout.
//!
//! What is read is checked: by the reader as it goes, which gives an error instead of the last bytes, and before a descriptor
//! is given out, since who has that reads without us. A file is read for that once a process; another one is read when its
//! times or its size have changed otherwise than by ourselves. So the first to open a large blob waits until it has been read.
//!
//! A batch notes in its staging directory when it began, and finding a blob renews its time: [`crate::gc`] says what for.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::SystemTime,
};

use async_trait::async_trait;
use nix::{
    errno::Errno,
    fcntl::{AtFlags, Flock, FlockArg, OFlag, RenameFlags, openat, renameat, renameat2},
    sys::{
        stat::{Mode, UtimensatFlags, fstatat, mkdirat, utimensat},
        time::TimeSpec,
    },
    unistd::{UnlinkatFlags, linkat, syncfs, unlinkat},
};
use parking_lot::{Mutex, MutexGuard};

use super::{
    BlobReader, BlobService, BlobWriter, Lease,
    layout::{check_layout, note_layout},
    local_io::{LocalBlobReader, LocalBlobWriter},
    staging::{Staging, at_path},
    verified::{Verified, Version},
};
use crate::{B3Digest, Node};

pub(super) const BLOBS: &str = "b3";
const STAGING: &str = "staging";
const LEASES: &str = "leases";

/// How often a blob may come and go while another one takes its name.
const MOST_TRIES: usize = 8;

/// Bytes of the largest blob that is checked for somebody who may not need it.
const AT_HAND_BYTES: u64 = 1024 * 1024;

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
    /// Blobs in `b3` that are no older than the batch; batches have it.
    held: Option<Mutex<HashSet<B3Digest>>>,
    committing: Mutex<()>,
    pub(super) verified: Arc<Verified>,
    /// Somebody counts on names in `b3` that may not be durable.
    unsynced: AtomicBool,
}

impl LocalBlobService {
    /// The store in this directory, which is made when it is not there. Sweeps what dead processes have left.
    ///
    /// # Errors
    ///
    /// When the directory can't be made, read or swept; `Unsupported` when another version has given it another layout.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let says_layout = check_layout(dir)?;
        let staging_parent = dir.join(STAGING);
        fs::create_dir_all(dir.join(BLOBS))?;
        fs::create_dir_all(&staging_parent)?;
        match Staging::sweep(&staging_parent) {
            // A store that may only be read.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem) => {}
            swept => swept?,
        }
        if !says_layout && let Err(error) = note_layout(dir, &staging_parent) {
            // It may only be read, or the disk is full. Without the note it has this layout, too.
            tracing::debug!("{}: can't note the layout of the store: {error}", dir.display());
        }
        let blobs = Arc::new(File::open(dir.join(BLOBS))?);
        let verified = Arc::new(Verified::new(dir.join(BLOBS)));
        Ok(Self { shared: Arc::new(Shared::new(blobs, staging_parent, verified, None)) })
    }
}

impl LocalBlobService {
    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// This store for one job, as a batch is, for whoever removes blobs: what is found can be removed.
    pub(crate) fn apart(&self) -> Arc<dyn BlobService> {
        Arc::new(self.with_staging(None))
    }

    fn with_staging(&self, held: Option<Mutex<HashSet<B3Digest>>>) -> Self {
        let Shared { blobs, staging_parent, verified, .. } = &*self.shared;
        let shared = Shared::new(blobs.clone(), staging_parent.clone(), verified.clone(), held);
        Self { shared: Arc::new(shared) }
    }

    /// The directory of committed blobs, each in the directory of its first two digits.
    pub(crate) fn committed(&self) -> &File {
        &self.shared.blobs
    }

    /// Says that an open blob is used, now and as long as this descriptor is open anywhere.
    pub(crate) fn use_file(&self, digest: &B3Digest, file: &File) {
        // Neither is possible in a store that may only be read, which can't be swept either.
        let touch = || file.set_modified(SystemTime::now());
        let _ = self.shared.verified.touch(digest, || Version::of(file), touch);
        let _ = file.try_lock_shared();
    }

    /// Removes a committed blob. Whoever has it open keeps it.
    pub(crate) fn remove(&self, digest: &B3Digest) -> io::Result<()> {
        Ok(unlinkat(&*self.shared.blobs, blob_path(digest).as_str(), UnlinkatFlags::NoRemoveDir)?)
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
        let Some(file) = self.shared.open_unchecked(digest)? else { return Ok(None) };
        let reader = LocalBlobReader::checking(file, *digest, self.shared.verified.clone())?;
        Ok(Some(Box::new(reader)))
    }

    async fn open_write(&self) -> Box<dyn BlobWriter> {
        Box::new(LocalBlobWriter::new(self.shared.clone()))
    }

    async fn open_file(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        if *digest == B3Digest::EMPTY {
            return super::sealed_copy(Box::new(io::Cursor::new([]))).await.map(Some);
        }
        self.shared.open_file(digest, u64::MAX)
    }

    async fn open_file_at_hand(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        if *digest == B3Digest::EMPTY {
            return self.open_file(digest).await;
        }
        self.shared.open_file(digest, AT_HAND_BYTES)
    }

    fn batch(&self) -> Arc<dyn BlobService> {
        Arc::new(self.with_staging(Some(Mutex::default())))
    }

    fn lease(&self, nodes: &[Node]) -> io::Result<Lease> {
        Lease::take(&self.shared.leases(), nodes)
    }

    async fn commit(&self) -> io::Result<()> {
        self.shared.commit()
    }
}

impl Shared {
    fn new(
        blobs: Arc<File>,
        staging_parent: PathBuf,
        verified: Arc<Verified>,
        held: Option<Mutex<HashSet<B3Digest>>>,
    ) -> Self {
        Self {
            blobs,
            staging_parent,
            verified,
            staging: OnceLock::new(),
            staged: Mutex::default(),
            held,
            committing: Mutex::default(),
            unsynced: AtomicBool::new(false),
        }
    }

    pub(super) fn has(&self, digest: &B3Digest) -> io::Result<bool> {
        let is_held = || self.held().is_some_and(|held| held.contains(digest));
        if *digest == B3Digest::EMPTY || self.staged.lock().contains_key(digest) || is_held() {
            return Ok(true);
        }
        let found = self.keep(digest)?;
        if found {
            self.unsynced.store(true, Ordering::Relaxed);
        }
        Ok(found)
    }

    /// Finds a blob in `b3`, and sees to it that it stays.
    fn keep(&self, digest: &B3Digest) -> io::Result<bool> {
        match fstatat(&*self.blobs, blob_path(digest).as_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => return Ok(false),
            stat => drop(stat?),
        }
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir = match openat(&*self.blobs, fan_out(digest).as_str(), flags, Mode::empty()) {
            Err(Errno::ENOENT) => return Ok(false),
            dir => File::from(dir?),
        };
        if self.held.is_some() {
            // It notes when this batch began, which must be before. It locks, too: never while the lock below is held.
            self.staging()?;
        }
        // No collector looks at a blob and removes it meanwhile.
        let dir = Flock::lock(dir, FlockArg::LockShared).map_err(|(_, errno)| errno)?;
        let hex = digest.to_hex();
        let look = || Ok(fstatat(&*dir, hex.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW)?.into());
        let kept = self.verified.touch(digest, look, || self.renew(&dir, &hex))?;
        if kept && let Some(mut held) = self.held() {
            held.insert(*digest);
        }
        Ok(kept)
    }

    /// Renews the time of the blob of this name.
    fn renew(&self, dir: &File, hex: &str) -> io::Result<bool> {
        let (unchanged, now, flags) = (TimeSpec::UTIME_OMIT, TimeSpec::UTIME_NOW, UtimensatFlags::NoFollowSymlink);
        match utimensat(dir, hex, &unchanged, &now, flags) {
            Ok(()) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            // Who may not write to a store can only hope that it stays; a batch, again, writes its own.
            Err(Errno::EACCES | Errno::EPERM | Errno::EROFS) => Ok(self.held.is_none()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn held(&self) -> Option<MutexGuard<'_, HashSet<B3Digest>>> {
        self.held.as_ref().map(Mutex::lock)
    }

    /// A blob that has been checked; `None`, too, when that would mean to read more than so many bytes.
    fn open_file(&self, digest: &B3Digest, max_bytes: u64) -> io::Result<Option<File>> {
        let Some(file) = self.open_unchecked(digest)? else { return Ok(None) };
        let version = Version::of(&file)?;
        if version.bytes() > max_bytes && !self.verified.knows(digest, &version) {
            return Ok(None);
        }
        self.verified.check_file(digest, &file)?;
        Ok(Some(file))
    }

    fn open_unchecked(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        {
            let staged = self.staged.lock();
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

    /// `DIR/staging`
    pub(super) fn staging_parent(&self) -> &Path {
        &self.staging_parent
    }

    /// `DIR/leases`
    pub(super) fn leases(&self) -> PathBuf {
        self.staging_parent.with_file_name(LEASES)
    }

    /// Where new blobs go.
    pub(super) fn staging(&self) -> io::Result<&Staging> {
        if let Some(staging) = self.staging.get() {
            return Ok(staging);
        }
        // Another thread may be faster; then this one's directory goes again.
        let staging = Staging::create(&self.staging_parent, self.held.is_some())?;
        Ok(self.staging.get_or_init(|| staging))
    }

    /// Takes over a whole blob from its writer.
    pub(super) fn stage(&self, digest: B3Digest, number: u64, file: &File) -> io::Result<()> {
        match self.staged.lock().entry(digest) {
            // Two writers had the same contents. The first one's file stays: a commit may have synced it already.
            Entry::Occupied(_) => self.staging()?.remove(number),
            Entry::Vacant(free) => {
                self.verified.add(digest, Version::of(file)?);
                free.insert(number);
                Ok(())
            }
        }
    }

    fn commit(&self) -> io::Result<()> {
        let _committing = self.committing.lock();
        if let Some(staging) = self.staging.get() {
            self.publish_all(staging).map_err(|error| at_path(&self.staging_parent, &error))?;
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
        let mut batch: Vec<(B3Digest, u64)> =
            self.staged.lock().iter().map(|(digest, number)| (*digest, *number)).collect();
        if batch.is_empty() {
            return Ok(());
        }
        batch.sort_unstable();
        syncfs(staging.dir())?;
        self.unsynced.store(true, Ordering::Relaxed);
        // Held, so that no reader looks between the two places.
        let mut staged = self.staged.lock();
        for (digest, number) in &batch {
            self.publish(staging, digest, *number)?;
            staged.remove(digest);
        }
        Ok(())
    }

    fn publish(&self, staging: &Staging, digest: &B3Digest, number: u64) -> io::Result<()> {
        match self.name(staging, digest, number) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                match mkdirat(&*self.blobs, fan_out(digest).as_str(), Mode::from_bits_retain(0o755)) {
                    Ok(()) | Err(Errno::EEXIST) => self.name(staging, digest, number),
                    Err(errno) => Err(errno.into()),
                }
            }
            named => named,
        }
    }

    /// Gives a staged blob its name in `b3`. One that is there already stays, since others may count on its time.
    fn name(&self, staging: &Staging, digest: &B3Digest, number: u64) -> io::Result<()> {
        let (from, to) = (number.to_string(), blob_path(digest));
        let link = || linkat(staging.dir(), from.as_str(), &*self.blobs, to.as_str(), AtFlags::empty());
        let rename = |flags| renameat2(staging.dir(), from.as_str(), &*self.blobs, to.as_str(), flags);
        for _ in 0..MOST_TRIES {
            let named = match rename(RenameFlags::RENAME_NOREPLACE) {
                // NFS, and others that know no flags.
                Err(Errno::EINVAL) => {
                    link().and_then(|()| unlinkat(staging.dir(), from.as_str(), UnlinkatFlags::NoRemoveDir))
                }
                renamed => renamed,
            };
            match named {
                Ok(()) => {
                    if let Some(mut held) = self.held() {
                        held.insert(*digest);
                    }
                    return Ok(());
                }
                Err(Errno::EEXIST) if self.keep(digest)? => return staging.remove(number),
                // It is gone again.
                Err(Errno::EEXIST) => {}
                Err(errno) if can_not_link(errno) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(renameat(staging.dir(), from.as_str(), &*self.blobs, to.as_str())?)
    }
}

/// Whether a file can't have one more name, or none of this user's, or none on this file system.
fn can_not_link(errno: Errno) -> bool {
    matches!(errno, Errno::EMLINK | Errno::EPERM | Errno::EOPNOTSUPP)
}

/// The directory of a blob below `b3`.
fn fan_out(digest: &B3Digest) -> String {
    let mut hex = digest.to_hex();
    hex.truncate(2);
    hex
}

/// The file of a blob below `b3`.
pub(super) fn blob_path(digest: &B3Digest) -> String {
    let hex = digest.to_hex();
    format!("{}/{hex}", &hex[..2])
}

#[cfg(test)]
mod tests;
