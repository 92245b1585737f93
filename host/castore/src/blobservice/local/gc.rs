//! Garbage collection of local blobs; [`crate::gc`] has the rules.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, SystemTime},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, Flock, FlockArg},
    sys::stat::fstatat,
    unistd::{UnlinkatFlags, unlinkat},
};

use super::{
    LocalBlobService,
    collected::{Kind, note_collected},
    layout::{BLOBS, digest_of},
    lease::Lease,
    staging::Staging,
};
use crate::{B3Digest, Node};

/// Where a cache records the blobs that its remote store lacks yet: an empty file each, named by the digest.
pub(crate) const PENDING_BLOBS: &str = "pending-blobs";

/// The same for trees of directories, by their roots.
pub(crate) const PENDING_TREES: &str = "pending-trees";

/// How often to look whether a clock has ticked that may tick every 10 ms only.
const TICK: Duration = Duration::from_millis(1);

/// Divides old blobs from new ones.
#[derive(Debug, Clone)]
pub(crate) struct Age {
    /// Blobs that were written or found at this time or later are new.
    pub(crate) cutoff: SystemTime,
    /// Blobs with these inodes are new, too: a writer has them staged.
    pub(crate) staged: HashSet<u64>,
}

/// The result of a sweep.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Swept {
    pub(crate) removed: u64,
    pub(crate) removed_bytes: u64,
    pub(crate) kept: u64,
}

impl LocalBlobService {
    /// The time by the clock of the file system, once that has ticked: all that was written before this call is older.
    pub(crate) fn now(&self) -> io::Result<SystemTime> {
        let staging = self.blobs().staging()?;
        let stamp = || {
            let (number, file) = staging.create_file()?;
            let now = file.metadata()?.modified();
            staging.remove(number)?;
            now
        };
        let before = stamp()?;
        loop {
            let now = stamp()?;
            if now != before {
                return Ok(now);
            }
            thread::sleep(TICK);
        }
    }

    /// The age limit for a collection: `cutoff`, or the beginning of the oldest living batch if that is earlier.
    pub(crate) fn age(&self, cutoff: SystemTime) -> io::Result<Age> {
        let parent = self.blobs().staging_parent();
        Staging::sweep(parent)?;
        let cutoff = Staging::first_begun(parent)?.map_or(cutoff, |begun| begun.min(cutoff));
        Ok(Age { cutoff, staged: Staging::inodes(parent)? })
    }

    /// The nodes that must stay: running builds have leased them, or the remote store lacks them yet.
    pub(crate) fn leased(&self) -> io::Result<Vec<Node>> {
        let leases = self.blobs().leases();
        let mut nodes = Lease::read_all(&leases)?;
        // The sizes are not used.
        let blob = |digest| Node::File { digest, size: 0, executable: false };
        let tree = |digest| Node::Directory { digest, size: 0 };
        nodes.extend(digests_in(&leases.with_file_name(PENDING_BLOBS))?.into_iter().map(blob));
        nodes.extend(digests_in(&leases.with_file_name(PENDING_TREES))?.into_iter().map(tree));
        Ok(nodes)
    }

    /// The fan-out directories of the store in `dir`, `b3/XX`, sorted.
    pub(crate) fn fan_outs(dir: &Path) -> io::Result<Vec<PathBuf>> {
        let mut paths =
            fs::read_dir(dir.join(BLOBS))?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
        paths.sort_unstable();
        Ok(paths)
    }

    /// Removes the blobs of a fan-out directory of the store that are neither `wanted` nor new. A `dry` run only counts them.
    pub(crate) fn sweep(
        (store, fan_out): (&Path, &Path),
        wanted: &HashSet<B3Digest>,
        age: &Age,
        dry: bool,
    ) -> io::Result<Swept> {
        let mut swept = Swept::default();
        let mut candidates = Vec::new();
        for entry in fs::read_dir(fan_out)? {
            match digest_of(&entry?.path()) {
                Some(digest) if !wanted.contains(&digest) => candidates.push(digest),
                _ => swept.kept += 1,
            }
        }
        if candidates.is_empty() {
            return Ok(swept);
        }
        // A process that looks for one of them has either renewed its time before, or waits and finds it gone.
        let dir = Flock::lock(File::open(fan_out)?, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
        let mut old = Vec::new();
        for digest in candidates {
            let stat = match fstatat(&*dir, digest.to_hex().as_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
                Err(Errno::ENOENT) => continue,
                stat => stat?,
            };
            if modified(&stat) >= age.cutoff || age.staged.contains(&stat.st_ino) {
                swept.kept += 1;
                continue;
            }
            old.push(digest);
            swept.removed += 1;
            swept.removed_bytes += u64::try_from(stat.st_size).unwrap_or(0);
        }
        if dry || old.is_empty() {
            return Ok(swept);
        }
        note_collected(store, Kind::Blob, &old)?;
        for digest in old {
            unlinkat(&*dir, digest.to_hex().as_str(), UnlinkatFlags::NoRemoveDir)?;
        }
        Ok(swept)
    }
}

/// The digests that name files in a directory.
pub(crate) fn digests_in(dir: &Path) -> io::Result<Vec<B3Digest>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let digest = |entry: io::Result<fs::DirEntry>| {
        entry.map(|entry| B3Digest::from_hex(entry.file_name().as_encoded_bytes())).transpose()
    };
    entries.filter_map(digest).collect()
}

fn modified(stat: &nix::sys::stat::FileStat) -> SystemTime {
    let seconds =
        std::time::Duration::new(stat.st_mtime.unsigned_abs(), u32::try_from(stat.st_mtime_nsec).unwrap_or(0));
    if stat.st_mtime < 0 { SystemTime::UNIX_EPOCH } else { SystemTime::UNIX_EPOCH + seconds }
}
