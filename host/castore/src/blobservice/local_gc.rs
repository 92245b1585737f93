//! What the collector and the verifier do with local blobs; the rules are in [`crate::gc`].

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use data_encoding::HEXLOWER;
use nix::{
    errno::Errno,
    fcntl::{AtFlags, Flock, FlockArg},
    sys::stat::fstatat,
    unistd::{UnlinkatFlags, unlinkat},
};

use super::{LocalBlobService, lease::Lease, local::BLOBS, staging::Staging};
use crate::{B3Digest, Node};

/// Where a near store has empty files for blobs, named by their digests, that the far store lacks.
pub(crate) const PENDING_BLOBS: &str = "pending-blobs";

/// The same for roots of trees of directories.
pub(crate) const PENDING_TREES: &str = "pending-trees";

/// What divides the old from the new.
#[derive(Debug, Clone)]
pub(crate) struct Age {
    /// Blobs that have been written or found since are new.
    pub(crate) cutoff: SystemTime,
    /// So are those with these inodes.
    pub(crate) held: HashSet<u64>,
}

/// What a sweep has done, or would do.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Swept {
    pub(crate) removed: u64,
    pub(crate) removed_bytes: u64,
    pub(crate) kept: u64,
}

impl LocalBlobService {
    /// The time, as the file system tells it.
    pub(crate) fn now(&self) -> io::Result<SystemTime> {
        let (_, file) = self.shared().staging()?.create_file()?;
        file.metadata()?.modified()
    }

    /// What is old where this time divides the old from the new, as far as living batches and writers are concerned.
    pub(crate) fn age(&self, cutoff: SystemTime) -> io::Result<Age> {
        let parent = self.shared().staging_parent();
        Staging::sweep(parent)?;
        let cutoff = Staging::first_begun(parent)?.map_or(cutoff, |begun| begun.min(cutoff));
        Ok(Age { cutoff, held: Staging::inodes(parent)? })
    }

    /// What running builds count on, and what a far store is still to get from here.
    pub(crate) fn leased(&self) -> io::Result<Vec<Node>> {
        let leases = self.shared().leases();
        let mut nodes = Lease::read_all(&leases)?;
        // The sizes are nobody's business here.
        let blob = |digest| Node::File { digest, size: 0, executable: false };
        let tree = |digest| Node::Directory { digest, size: 0 };
        nodes.extend(digests_in(&leases.with_file_name(PENDING_BLOBS))?.into_iter().map(blob));
        nodes.extend(digests_in(&leases.with_file_name(PENDING_TREES))?.into_iter().map(tree));
        Ok(nodes)
    }

    /// The directories of committed blobs, in the store in `dir`.
    pub(crate) fn fan_outs(dir: &Path) -> io::Result<Vec<PathBuf>> {
        let mut paths =
            fs::read_dir(dir.join(BLOBS))?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
        paths.sort_unstable();
        Ok(paths)
    }

    /// Removes the blobs of a fan-out directory that are neither `wanted` nor new; unless `dry`.
    pub(crate) fn sweep(fan_out: &Path, wanted: &HashSet<B3Digest>, age: &Age, dry: bool) -> io::Result<Swept> {
        let mut swept = Swept::default();
        let mut candidates = Vec::new();
        for entry in fs::read_dir(fan_out)? {
            match digest_of(&entry?.path()) {
                Some(digest) if !wanted.contains(&digest) => candidates.push(digest.to_hex()),
                _ => swept.kept += 1,
            }
        }
        if candidates.is_empty() {
            return Ok(swept);
        }
        // Whoever finds one of them meanwhile waits, and then finds it gone or has made it new before.
        let dir = Flock::lock(File::open(fan_out)?, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
        for name in candidates {
            let stat = match fstatat(&*dir, name.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
                Err(Errno::ENOENT) => continue,
                stat => stat?,
            };
            if modified(&stat) >= age.cutoff || age.held.contains(&stat.st_ino) {
                swept.kept += 1;
                continue;
            }
            if !dry {
                unlinkat(&*dir, name.as_str(), UnlinkatFlags::NoRemoveDir)?;
            }
            swept.removed += 1;
            swept.removed_bytes += u64::try_from(stat.st_size).unwrap_or(0);
        }
        Ok(swept)
    }
}

/// The digests that are the names of files in a directory.
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

/// The digest of the blob whose file this is; `None` when it is not where a blob's file would be.
pub(crate) fn digest_of(path: &Path) -> Option<B3Digest> {
    let name = path.file_name()?.to_str()?;
    let fan_out = path.parent()?.file_name()?.to_str()?;
    let digest = B3Digest::try_from(&*HEXLOWER.decode(name.as_bytes()).ok()?).ok()?;
    name.starts_with(fan_out).then_some(digest).filter(|_| fan_out.len() == 2)
}
