//! Collects garbage from a local store, while others use it.
//!
//! Kept is what can be reached from
//!
//! - named roots ([`LocalStore::roots`]),
//! - the inputs of running builds, each of which holds a [`Lease`](crate::Lease),
//! - trees that were put, and blobs that were written or found, within a time before now,
//!
//! and whatever a living batch has written or found. Nothing of it is ever missing, not for a moment, whoever imports,
//! builds, collects or is killed meanwhile, in however many processes. This is why:
//!
//! 1. A batch ([`Store::batch`](crate::Store::batch)) notes in its staging directory when it begins, before it finds or
//!    writes a blob. What it finds it renews the time of, under a shared lock on the blob's directory; what it writes is
//!    new. So nothing that it counts on is older than its note, which goes with the batch: after the directories that refer
//!    to the blobs have been put, and not before. A blob that is in the store is never replaced by its like, which may be
//!    older.
//! 2. A collection first notes the time, and then the begin of each batch that lives. It removes a blob only while it has
//!    the blob's directory locked for itself, and only if the blob is older than all of these. So a batch that began before
//!    the first note, and still lives, is in the second; what one counts on that began later is newer than the first; and
//!    one that had ended before had put its directories. What is written without a batch has a name in a staging
//!    directory until it is committed, and what had one then stays.
//! 3. Directories are put, and the time of their root noted, in one transaction; and the collection looks for such
//!    roots again in the transaction that removes directories.
//! 4. A build takes its lease before it looks for its inputs, and looking renews the times of blobs.
//! 5. Directories go before the blobs that they refer to, and all at once.
//! 6. A root is added under a lock that a collection has to itself, and only when all that it refers to is there.
//!
//! Beyond this stands an upload that comes over the network without a batch: the time alone protects it. And all of it
//! trusts the clock of the file system not to be set back while a collection runs.

use std::{
    collections::HashSet,
    io,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use nix::fcntl::FlockArg;

use crate::{
    B3Digest, LocalBlobService, LocalStore, PathComponent,
    blobservice::{Age, lock},
    directoryservice::Reachable,
};

/// What a collection has removed, or would remove, and what it has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Collected {
    /// Blobs that are gone.
    pub blobs: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Directories that are gone.
    pub directories: u64,
    /// Blobs that are left.
    pub blobs_left: u64,
    /// Directories that are left.
    pub directories_left: u64,
}

/// Why nothing could be collected, or not all.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// What a root refers to is not there: this is the wrong store, or it is damaged. Nothing was removed.
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

/// Removes what nothing needs, see the [module](self), and what is older than `keep`; unless `dry`.
///
/// Waits for another collection to end. Blocks: call it from a thread that may.
///
/// # Errors
///
/// What was removed until then was garbage.
pub fn collect(store: &LocalStore, keep: Duration, dry: bool) -> Result<Collected, CollectError> {
    let failed = |action| move |source| CollectError::Store { path: store.dir().to_owned(), action, source };
    let roots_dir = store.roots_dir().map_err(failed("make the directory of roots"))?;
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
    let swept = store.directories().sweep(&mut reachable, cutoff, dry).map_err(failed("remove directories"))?;
    let (directories, directories_left) = swept;
    let mut collected = Collected { directories, directories_left, ..Collected::default() };
    sweep_blobs(store, &reachable.blobs, &age, dry, &mut collected).map_err(failed("remove blobs"))?;
    Ok(collected)
}

fn sweep_blobs(
    store: &LocalStore,
    wanted: &HashSet<B3Digest>,
    age: &Age,
    dry: bool,
    collected: &mut Collected,
) -> io::Result<()> {
    for fan_out in LocalBlobService::fan_outs(store.dir())? {
        let swept = LocalBlobService::sweep(&fan_out, wanted, age, dry)?;
        collected.blobs += swept.removed;
        collected.bytes += swept.removed_bytes;
        collected.blobs_left += swept.kept;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
