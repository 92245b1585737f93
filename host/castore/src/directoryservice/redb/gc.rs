//! Garbage collection of the directories in a redb file; [`crate::gc`] has the rules.

use std::{collections::HashSet, io, time::SystemTime};

use redb::{ReadableTable, ReadableTableMetadata as _, TableError};

use super::{
    super::decode_batch,
    database::{RECENT, TABLE, unix_nanos},
    service::RedbDirectoryService,
};
use crate::{B3Digest, Directory, Node};

/// Directories that are read in one transaction.
const BATCH: usize = 1024;

/// The nodes that can be reached from some roots.
#[derive(Debug, Default)]
pub(crate) struct Reachable {
    pub(crate) directories: HashSet<B3Digest>,
    pub(crate) blobs: HashSet<B3Digest>,
    /// Directories that are referred to but missing.
    pub(crate) missing: HashSet<B3Digest>,
}

impl Reachable {
    /// Adds a node. Returns the digest of a directory that was not reached before.
    fn reach(&mut self, node: &Node) -> Option<B3Digest> {
        match node {
            Node::Directory { digest, .. } => self.directories.insert(*digest).then_some(*digest),
            Node::File { digest, .. } => {
                self.blobs.insert(*digest);
                None
            }
            Node::Symlink { .. } => None,
        }
    }

    /// Adds everything below these directories. `get` returns at least the first of the directories that it is asked for,
    /// in order.
    fn walk(
        &mut self,
        mut waiting: Vec<B3Digest>,
        mut get: impl FnMut(&[B3Digest]) -> io::Result<Vec<Option<Directory>>>,
    ) -> io::Result<()> {
        while !waiting.is_empty() {
            let batch = waiting.split_off(waiting.len().saturating_sub(BATCH));
            let found = get(&batch)?;
            waiting.extend_from_slice(&batch[found.len()..]);
            for (digest, found) in batch.iter().zip(found) {
                match found {
                    Some(directory) => {
                        waiting.extend(directory.nodes().filter_map(|(_, node)| self.reach(node)));
                    }
                    None => {
                        self.missing.insert(*digest);
                    }
                }
            }
        }
        Ok(())
    }
}

impl RedbDirectoryService {
    /// Adds these nodes and everything below them.
    pub(crate) fn reach(&self, nodes: &[Node], reachable: &mut Reachable) -> io::Result<()> {
        let begin = nodes.iter().filter_map(|node| reachable.reach(node)).collect();
        reachable.walk(begin, |digests| self.database.get_many(digests))
    }

    /// The roots of trees that were put since `cutoff`.
    pub(crate) fn put_since(&self, cutoff: SystemTime) -> io::Result<Vec<Node>> {
        let shared = &self.database;
        let _turn = shared.turn.read();
        let Some(database) = shared.open_to_read()? else { return Ok(Vec::new()) };
        let read = database.begin_read().map_err(|error| shared.failed(error))?;
        match read.open_table(RECENT) {
            Ok(recent) => roots_since(&recent, cutoff).map_err(|error| shared.failed(error)),
            Err(TableError::TableDoesNotExist(_)) => Ok(Vec::new()),
            Err(error) => Err(shared.failed(error)),
        }
    }

    /// Removes all directories that are neither reachable nor in a tree that was put since `cutoff`, in one transaction.
    /// Adds such trees to `reachable`. Returns the numbers of removed and of remaining directories. A `dry` run removes
    /// nothing. Otherwise `note` is called with those that are about to be removed.
    pub(crate) fn sweep(
        &self,
        reachable: &mut Reachable,
        cutoff: SystemTime,
        dry: bool,
        note: impl FnOnce(&[B3Digest]) -> io::Result<()>,
    ) -> io::Result<(u64, u64)> {
        let shared = &self.database;
        let _turn = shared.turn.write();
        let database = shared.retry(|| shared.open_to_write())?;
        let failed = |error: redb::Error| shared.failed(error);
        let write = database.begin_write().map_err(|error| failed(error.into()))?;
        let (removed, left) = {
            let mut table = write.open_table(TABLE).map_err(|error| failed(error.into()))?;
            let mut recent = write.open_table(RECENT).map_err(|error| failed(error.into()))?;
            let new = roots_since(&recent, cutoff).map_err(|error| failed(error.into()))?;
            let begin = new.iter().filter_map(|node| reachable.reach(node)).collect();
            reachable.walk(begin, |digests| {
                decode_batch(digests, |digest| {
                    let encoded = table.get(digest.as_bytes()).map_err(|error| failed(error.into()))?;
                    Ok(encoded.map(|encoded| encoded.value()))
                })
            })?;
            let mut removed = Vec::new();
            let is_kept = |digest: [u8; B3Digest::LENGTH], _: Vec<u8>| {
                let digest = digest.into();
                let is_kept = reachable.directories.contains(&digest);
                removed.extend((!is_kept).then_some(digest));
                is_kept
            };
            table.retain(is_kept).map_err(|error| failed(error.into()))?;
            let cutoff = unix_nanos(cutoff);
            recent.retain(|_, put| put >= cutoff).map_err(|error| failed(error.into()))?;
            let left = table.len().map_err(|error| failed(error.into()))?;
            (removed, left)
        };
        if dry || removed.is_empty() {
            write.abort().map_err(|error| failed(error.into()))?;
        } else {
            note(&removed)?;
            write.commit().map_err(|error| failed(error.into()))?;
        }
        Ok((removed.len() as u64, left))
    }

    /// The next batch of stored directories after `last`, encoded, in the order of their digests.
    pub(crate) fn stored_after(&self, last: Option<&B3Digest>) -> io::Result<Vec<(B3Digest, Vec<u8>)>> {
        use std::ops::Bound::{Excluded, Unbounded};
        let shared = &self.database;
        let _turn = shared.turn.read();
        let Some(database) = shared.open_to_read()? else { return Ok(Vec::new()) };
        let read = database.begin_read().map_err(|error| shared.failed(error))?;
        let table = match read.open_table(TABLE) {
            Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            table => table.map_err(|error| shared.failed(error))?,
        };
        let begin = last.map_or(Unbounded, |digest| Excluded(*digest.as_bytes()));
        let range = table.range::<[u8; B3Digest::LENGTH]>((begin, Unbounded)).map_err(|error| shared.failed(error))?;
        let mut stored = Vec::new();
        for entry in range.take(BATCH) {
            let (digest, encoded) = entry.map_err(|error| shared.failed(error))?;
            stored.push((B3Digest::from(digest.value()), encoded.value()));
        }
        Ok(stored)
    }
}

fn roots_since(
    recent: &impl ReadableTable<&'static [u8], u64>,
    cutoff: SystemTime,
) -> Result<Vec<Node>, redb::StorageError> {
    let cutoff = unix_nanos(cutoff);
    let mut roots = Vec::new();
    for entry in recent.iter()? {
        let (digest, put) = entry?;
        if put.value() >= cutoff {
            let digest = B3Digest::try_from(digest.value());
            let digest = digest.map_err(|error| redb::StorageError::Corrupted(format!("a root: {error}")))?;
            // The size is not used.
            roots.push(Node::Directory { digest, size: 0 });
        }
    }
    Ok(roots)
}

#[cfg(test)]
impl RedbDirectoryService {
    /// Sets the time of all trees.
    pub(crate) fn age_all(&self, then: SystemTime) -> io::Result<()> {
        let _turn = self.database.turn.write();
        let database = self.database.retry(|| self.database.open_to_write())?;
        let write = database.begin_write().map_err(io::Error::other)?;
        {
            let mut recent = write.open_table(RECENT).map_err(io::Error::other)?;
            let roots: Vec<_> =
                recent.iter().map_err(io::Error::other)?.map(|entry| entry.unwrap().0.value().to_vec()).collect();
            for root in roots {
                recent.insert(root.as_slice(), unix_nanos(then)).map_err(io::Error::other)?;
            }
        }
        write.commit().map_err(io::Error::other)
    }
}
