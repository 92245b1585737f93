//! Garbage collection in a local store, while others use it.
//!
//! A collection keeps
//!
//! - everything below a named root ([`LocalStore::roots`]),
//! - the inputs of waiting and running builds, each of which holds a [`Lease`](crate::Lease),
//! - trees that were put, and blobs that were written or found, within a given time before now,
//! - blobs that a living batch has written or found.
//!
//! None of these is missing at any moment, however many processes import, build, collect or are killed meanwhile. The
//! reasons:
//!
//! 1. A batch ([`Store::batch`](crate::Store::batch)) records in its staging directory when it began, before it finds or
//!    writes a blob. When it finds a blob, it renews the blob's time, under a shared lock on the blob's directory. A blob that
//!    it writes is new. So no blob that it relies on is older than its record. The record lives as long as the batch, which
//!    ends after the directories that refer to the blobs have been put. A blob in the store is never replaced by an equal one,
//!    which might be older.
//! 2. A collection first takes the time, and then reads the records of all living batches. It removes a blob only under an
//!    exclusive lock on the blob's directory, and only if the blob is older than all of these. A batch may have begun before
//!    the collection took the time: then either it still lives, and its record is read; or it has ended, and its directories
//!    have been put. Or it began later: then its blobs are newer. A blob that is written without a batch has a name in a
//!    staging directory until it is committed, and the collection keeps blobs that had such a name.
//! 3. Directories are put in one transaction with the time of their root. The collection looks for new roots again in the
//!    transaction in which it removes directories.
//! 4. A build takes its lease before it looks for its inputs, which renews the times of blobs.
//! 5. Directories are removed before the blobs that they refer to, and in one transaction.
//! 6. What is removed is noted before, for those who keep something about the contents of the store; see `blobservice/local`.
//! 7. A root is added under a lock that excludes a collection, and only if everything that it refers to is in the store.
//!
//! Two cases are not covered. An upload over the network without a batch is protected by the time limit alone. And the clock
//! of the file system must not be set back during a collection.

use std::{
    collections::HashSet,
    io,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use nix::fcntl::FlockArg;

use crate::{
    B3Digest, LocalBlobService, LocalStore, PathComponent,
    blobservice::{Age, Kind, lock, note_collected},
    directoryservice::Reachable,
};

/// The result of a collection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Collected {
    /// Removed blobs.
    pub blobs: u64,
    /// Bytes in the removed blobs.
    pub bytes: u64,
    /// Removed directories.
    pub directories: u64,
    /// Remaining blobs.
    pub blobs_left: u64,
    /// Remaining directories.
    pub directories_left: u64,
}

/// Why a collection failed.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// A root refers to a missing directory, so this is the wrong store or a damaged one. Nothing was removed.
    #[error("the root \"{name}\" refers to the directory {digest}, which is not in the store; nothing was removed")]
    Incomplete {
        /// The root's name.
        name: PathComponent,
        /// What is missing.
        digest: B3Digest,
    },
    /// The store failed.
    #[error("{}: can't {action}", path.display())]
    Store {
        /// The store's directory.
        path: PathBuf,
        /// What was tried, as in "read the leases".
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Removes everything that is older than `keep` and that nothing needs, see the [module](self). A `dry` run only counts it.
///
/// Waits for another collection to end. Blocks: call it from a thread that may.
///
/// # Errors
///
/// The store failed, or is incomplete. Only garbage has been removed.
pub fn collect(store: &LocalStore, keep: Duration, dry: bool) -> Result<Collected, CollectError> {
    let failed = |action| move |source| CollectError::Store { path: store.dir().to_owned(), action, source };
    let roots_dir = store.roots_dir().map_err(failed("create the directory of roots"))?;
    let _alone = lock(&roots_dir, FlockArg::LockExclusive).map_err(failed("lock the roots"))?;

    LocalStore::sweep_roots(&roots_dir).map_err(failed("clean the directory of roots"))?;

    let now = store.blobs().now().map_err(failed("write to it"))?;
    let cutoff = now.checked_sub(keep).unwrap_or(SystemTime::UNIX_EPOCH);
    let age = store.blobs().age(cutoff).map_err(failed("read the staging directories"))?;

    let mut reachable = Reachable::default();
    for (name, node) in store.roots().map_err(failed("read the roots"))? {
        let directories = store.directories();
        directories.reach(&[node], &mut reachable).map_err(failed("read the directories"))?;
        if let Some(digest) = reachable.missing.iter().next() {
            return Err(CollectError::Incomplete { name, digest: *digest });
        }
    }
    let leased = store.blobs().leased().map_err(failed("read the leases"))?;
    let recent = store.directories().put_since(cutoff).map_err(failed("read the directories"))?;
    for nodes in [leased, recent] {
        store.directories().reach(&nodes, &mut reachable).map_err(failed("read the directories"))?;
    }
    let swept = sweep_directories(store, &mut reachable, cutoff, dry).map_err(failed("remove directories"))?;
    let (directories, directories_left) = swept;
    let mut collected = Collected { directories, directories_left, ..Collected::default() };
    sweep_blobs(store, &reachable.blobs, &age, dry, &mut collected).map_err(failed("remove blobs"))?;
    Ok(collected)
}

fn sweep_directories(
    store: &LocalStore,
    reachable: &mut Reachable,
    cutoff: SystemTime,
    dry: bool,
) -> io::Result<(u64, u64)> {
    let note = |removed: &[B3Digest]| note_collected(store.dir(), Kind::Directory, removed);
    store.directories().sweep(reachable, cutoff, dry, note)
}

fn sweep_blobs(
    store: &LocalStore,
    wanted: &HashSet<B3Digest>,
    age: &Age,
    dry: bool,
    collected: &mut Collected,
) -> io::Result<()> {
    for fan_out in LocalBlobService::fan_outs(store.dir())? {
        let swept = LocalBlobService::sweep((store.dir(), &fan_out), wanted, age, dry)?;
        collected.blobs += swept.removed;
        collected.bytes += swept.removed_bytes;
        collected.blobs_left += swept.kept;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
