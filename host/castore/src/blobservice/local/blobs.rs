//! What one service knows: the committed blobs in `b3`, and the blobs that it has staged.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

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
    layout::{LEASES, blob_path, fan_out},
    staging::{Staging, at_path},
    verified::{Verified, Version, mark_damaged},
};
use crate::B3Digest;

/// How often to try to name a blob while others add and remove the same one.
const MAX_ATTEMPTS: usize = 8;

/// The result of looking for a committed blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lookup {
    Missing,
    /// Its file is marked as damaged.
    Damaged,
    /// It is there, and its time has been renewed.
    Kept,
}

#[derive(Debug)]
pub(super) struct LocalBlobs {
    /// `DIR/b3`
    committed: Arc<File>,
    /// `DIR/staging`
    staging_parent: PathBuf,
    /// Created for the first blob that is written, so that readers need no permission to write.
    staging: OnceLock<Staging>,
    /// The number of each staged blob's file.
    staged: Mutex<HashMap<B3Digest, u64>>,
    /// In a batch: committed blobs whose time is not before the batch began.
    held: Option<Mutex<HashSet<B3Digest>>>,
    committing: Mutex<()>,
    pub(super) verified: Arc<Verified>,
    /// Whether a caller relies on names in `b3` that may not be durable.
    unsynced: AtomicBool,
}

impl LocalBlobs {
    pub(super) fn new(
        committed: Arc<File>,
        staging_parent: PathBuf,
        verified: Arc<Verified>,
        held: Option<Mutex<HashSet<B3Digest>>>,
    ) -> Self {
        Self {
            committed,
            staging_parent,
            verified,
            staging: OnceLock::new(),
            staged: Mutex::default(),
            held,
            committing: Mutex::default(),
            unsynced: AtomicBool::new(false),
        }
    }

    /// The same committed blobs, with nothing staged.
    pub(super) fn with_staging(&self, held: Option<Mutex<HashSet<B3Digest>>>) -> Self {
        Self::new(self.committed.clone(), self.staging_parent.clone(), self.verified.clone(), held)
    }

    /// `DIR/b3`
    pub(super) fn committed(&self) -> &File {
        &self.committed
    }

    /// `DIR/staging`
    pub(super) fn staging_parent(&self) -> &Path {
        &self.staging_parent
    }

    /// `DIR/leases`
    pub(super) fn leases(&self) -> PathBuf {
        self.staging_parent.with_file_name(LEASES)
    }

    /// Whether the store has this blob, which nothing has found damaged. A writer of the whole blob passes its size in
    /// `bytes`, and a file of another size counts as damaged.
    pub(super) fn has(&self, digest: &B3Digest, bytes: Option<u64>) -> io::Result<bool> {
        let is_held = || self.held().is_some_and(|held| held.contains(digest));
        if *digest == B3Digest::EMPTY || self.staged.lock().contains_key(digest) || is_held() {
            return Ok(true);
        }
        let found = self.keep(digest, bytes)? == Lookup::Kept;
        if found {
            self.unsynced.store(true, Ordering::Relaxed);
        }
        Ok(found)
    }

    /// Looks for a committed blob, and renews its time so that no collection removes it. A file that doesn't have the
    /// expected size in `bytes` gets the mark.
    fn keep(&self, digest: &B3Digest, bytes: Option<u64>) -> io::Result<Lookup> {
        let version = match fstatat(&*self.committed, blob_path(digest).as_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => return Ok(Lookup::Missing),
            stat => Version::from(stat?),
        };
        if version.is_damaged() {
            return Ok(Lookup::Damaged);
        }
        if let Some(bytes) = bytes.filter(|bytes| *bytes != version.bytes()) {
            let Some(file) = self.open_unchecked(digest)? else { return Ok(Lookup::Missing) };
            let wrong = || format!("{} bytes instead of {bytes}", version.bytes());
            mark_damaged(&file).map_err(|_| self.verified.damaged(digest, &wrong(), false))?;
            return Ok(Lookup::Damaged);
        }
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir = match openat(&*self.committed, fan_out(digest).as_str(), flags, Mode::empty()) {
            Err(Errno::ENOENT) => return Ok(Lookup::Missing),
            dir => File::from(dir?),
        };
        if self.held.is_some() {
            // Records when this batch began, which has to come before the blob's new time. It takes a lock, which must
            // not happen under the lock below.
            self.staging()?;
        }
        // A collection decides on a blob and removes it under an exclusive lock.
        let dir = Flock::lock(dir, FlockArg::LockShared).map_err(|(_, errno)| errno)?;
        let hex = digest.to_hex();
        let look = || Ok(fstatat(&*dir, hex.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW)?.into());
        let kept = self.verified.touch(digest, look, || self.renew(&dir, &hex))?;
        if kept && let Some(mut held) = self.held() {
            held.insert(*digest);
        }
        Ok(if kept { Lookup::Kept } else { Lookup::Missing })
    }

    /// Renews the time of the blob of this name. `false` when it is gone.
    fn renew(&self, dir: &File, hex: &str) -> io::Result<bool> {
        let (unchanged, now, flags) = (TimeSpec::UTIME_OMIT, TimeSpec::UTIME_NOW, UtimensatFlags::NoFollowSymlink);
        match utimensat(dir, hex, &unchanged, &now, flags) {
            Ok(()) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            // In a read-only store nothing keeps the blob from being collected; a batch writes its own copy instead.
            Err(Errno::EACCES | Errno::EPERM | Errno::EROFS) => Ok(self.held.is_none()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn held(&self) -> Option<MutexGuard<'_, HashSet<B3Digest>>> {
        self.held.as_ref().map(Mutex::lock)
    }

    /// A blob that has been checked. Also `None` when the check would have to read more than `max_bytes`.
    pub(super) fn open_file(&self, digest: &B3Digest, max_bytes: u64) -> io::Result<Option<File>> {
        let Some(file) = self.open_unchecked(digest)? else { return Ok(None) };
        let version = Version::of(&file)?;
        if version.bytes() > max_bytes && !self.verified.knows(digest, &version) {
            return Ok(None);
        }
        self.verified.check_version(digest, &file, version)?;
        Ok(Some(file))
    }

    pub(super) fn open_unchecked(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        {
            let staged = self.staged.lock();
            if let (Some(number), Some(staging)) = (staged.get(digest), self.staging.get()) {
                return staging.open_file(*number).map(Some);
            }
        }
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        match openat(&*self.committed, blob_path(digest).as_str(), flags, Mode::empty()) {
            Ok(file) => Ok(Some(file.into())),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The staging directory for new blobs.
    pub(super) fn staging(&self) -> io::Result<&Staging> {
        if let Some(staging) = self.staging.get() {
            return Ok(staging);
        }
        // When another thread is faster, this one's directory is removed again.
        let staging = Staging::create(&self.staging_parent, self.held.is_some())?;
        Ok(self.staging.get_or_init(|| staging))
    }

    /// Takes over a whole blob from its writer.
    pub(super) fn stage(&self, digest: B3Digest, number: u64, file: &File) -> io::Result<()> {
        match self.staged.lock().entry(digest) {
            // Two writers had the same contents. The first file stays, since a commit may have synced it already.
            Entry::Occupied(_) => self.staging()?.remove(number),
            Entry::Vacant(free) => {
                self.verified.add(digest, Version::of(file)?);
                free.insert(number);
                Ok(())
            }
        }
    }

    pub(super) fn commit(&self) -> io::Result<()> {
        let _committing = self.committing.lock();
        if let Some(staging) = self.staging.get() {
            self.publish_all(staging).map_err(|error| at_path(&self.staging_parent, &error))?;
        }
        // The contents are durable, now the names. A second sync of the little that has changed since costs less than a
        // sync of each directory.
        if self.unsynced.swap(false, Ordering::Relaxed)
            && let Err(errno) = syncfs(&*self.committed)
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
        // Locked throughout, so that a reader finds each blob in one of the two places.
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
                match mkdirat(&*self.committed, fan_out(digest).as_str(), Mode::from_bits_retain(0o755)) {
                    Ok(()) | Err(Errno::EEXIST) => self.name(staging, digest, number),
                    Err(errno) => Err(errno.into()),
                }
            }
            named => named,
        }
    }

    /// Gives a staged blob its name in `b3`. A blob that is there already stays, unless it is damaged: others may rely on its
    /// time.
    fn name(&self, staging: &Staging, digest: &B3Digest, number: u64) -> io::Result<()> {
        let (from, to) = (number.to_string(), blob_path(digest));
        let link = || linkat(staging.dir(), from.as_str(), &*self.committed, to.as_str(), AtFlags::empty());
        let rename = |flags| renameat2(staging.dir(), from.as_str(), &*self.committed, to.as_str(), flags);
        for _ in 0..MAX_ATTEMPTS {
            let named = match rename(RenameFlags::RENAME_NOREPLACE) {
                // NFS and other file systems know no flags.
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
                Err(Errno::EEXIST) => match self.keep(digest, None)? {
                    Lookup::Kept => return staging.remove(number),
                    Lookup::Damaged => break,
                    // It has been removed meanwhile.
                    Lookup::Missing => {}
                },
                Err(errno) if is_link_refused(errno) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
        // If another process has repaired the blob meanwhile, a batch may rely on the time that this one replaces.
        let look = || Version::of(&staging.open_file(number)?);
        self.verified.touch(digest, look, || self.renew(staging.dir(), &from))?;
        Ok(renameat(staging.dir(), from.as_str(), &*self.committed, to.as_str())?)
    }
}

/// Whether the file can't get another name: not at all, not by this user, or not on this file system.
fn is_link_refused(errno: Errno) -> bool {
    matches!(errno, Errno::EMLINK | Errno::EPERM | Errno::EOPNOTSUPP)
}
