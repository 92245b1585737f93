//! Who may see what, in a redb file.
//!
//! ```text
//!   meta     name → number
//!   tenants  name → id
//!   grants   id of the tenant, kind, digest → bytes, seconds since 1970
//!   usage    id of the tenant → bytes, objects
//! ```
//!
//! The tenant comes first in a key, so that a look-up reads only pages with grants of its own tenant, whatever others have.

use std::{
    collections::{HashMap, HashSet},
    io,
    path::Path,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use parking_lot::RwLock;
use redb::{
    Builder, Database, Durability, ReadableDatabase as _, ReadableTable as _, ReadableTableMetadata as _,
    TableDefinition, WriteTransaction,
};

use crate::{
    B3Digest,
    blobservice::{Collected, Kind},
    reopening::Reopening,
    runtime,
};

/// The format of the tables.
const FORMAT: u64 = 1;

const KEY_BYTES: usize = 4 + 1 + B3Digest::LENGTH;

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const TENANTS: TableDefinition<'_, &str, u32> = TableDefinition::new("tenants");
const GRANTS: TableDefinition<'_, [u8; KEY_BYTES], (u64, u64)> = TableDefinition::new("grants");
const USAGE: TableDefinition<'_, u32, (u64, u64)> = TableDefinition::new("usage");

const CACHE_BYTES: usize = 64 * 1024 * 1024;

/// How long a grant may be in memory only.
const FLUSH_AFTER: Duration = Duration::from_secs(1);

/// Something in a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Object {
    pub(super) kind: Kind,
    pub(super) digest: B3Digest,
    /// Of a directory, those of its encoding.
    pub(super) bytes: u64,
}

/// What a tenant has been granted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Contents of blobs, and encodings of directories.
    pub bytes: u64,
    /// Blobs and directories.
    pub objects: u64,
}

/// The grants of all tenants in one store. A tenant's grants are for what it put, and for what its builds made.
#[derive(Debug)]
pub struct Grants {
    database: Reopening,
    /// Of the tenants that are durable.
    ids: RwLock<HashMap<String, u32>>,
    /// `None` if nothing is removed from the store.
    collected: Option<Collected>,
    /// Whether some grants are in memory only.
    is_dirty: AtomicBool,
}

impl Grants {
    /// Opens the grants in this file, or creates it. `blobs` is the directory of the store's blobs if it can be collected:
    /// then what a collection removes is granted to nobody any more.
    ///
    /// # Errors
    ///
    /// A file can't be opened, or this version doesn't know its format.
    pub fn open(path: &Path, blobs: Option<&Path>) -> io::Result<Arc<Self>> {
        let database = Reopening::new(path.to_owned(), builder, fill).map_err(|error| failed(path, &error))?;
        let collected = blobs.map(Collected::open).transpose()?;
        let grants = Self { database, ids: RwLock::default(), collected, is_dirty: AtomicBool::new(false) };
        let (format, ids) = grants.with(|database| {
            let read = database.begin_read()?;
            let format = read.open_table(META)?.get("format")?.map(|format| format.value());
            let tenants = read.open_table(TENANTS)?;
            let ids = tenants.iter()?.map(|entry| entry.map(|(name, id)| (name.value().to_owned(), id.value())));
            Ok((format, ids.collect::<Result<_, _>>()?))
        })?;
        if format != Some(FORMAT) {
            return Err(grants.failed(&redb::Error::Corrupted(format!("its format is {format:?}, not {FORMAT}"))));
        }
        *grants.ids.write() = ids;
        Ok(Arc::new(grants))
    }

    /// What a tenant has. 0 for an unknown one.
    ///
    /// # Errors
    ///
    /// The file can't be read.
    pub fn usage(&self, tenant: &str) -> io::Result<Usage> {
        match self.forget_collected() {
            // On a full disk, what was collected still counts.
            Err(error) if error.kind() != io::ErrorKind::StorageFull => return Err(error),
            _ => {}
        }
        let Some(id) = self.id(tenant) else { return Ok(Usage::default()) };
        self.with(|database| {
            let usage = database.begin_read()?.open_table(USAGE)?.get(id)?.map(|usage| usage.value());
            let (bytes, objects) = usage.unwrap_or_default();
            Ok(Usage { bytes, objects })
        })
    }

    /// What each tenant has, by name.
    ///
    /// # Errors
    ///
    /// The file can't be read.
    pub fn usages(&self) -> io::Result<Vec<(String, Usage)>> {
        let mut names: Vec<_> = self.ids.read().keys().cloned().collect();
        names.sort_unstable();
        names.into_iter().map(|name| self.usage(&name).map(|usage| (name, usage))).collect()
    }

    /// Whether a tenant has this.
    pub(super) fn has(&self, tenant: &str, kind: Kind, digest: &B3Digest) -> io::Result<bool> {
        let Some(id) = self.id(tenant) else { return Ok(false) };
        let key = key(id, kind, digest);
        loop {
            if !self.with(|database| Ok(database.begin_read()?.open_table(GRANTS)?.get(key)?.is_some()))? {
                return Ok(false);
            }
            match (self.forget_collected(), &self.collected) {
                (Ok(true), _) => {}
                (Ok(false), _) => return Ok(true),
                (Err(error), Some(collected)) if error.kind() == io::ErrorKind::StorageFull => {
                    return Ok(!collected.contains(kind, digest)?);
                }
                (Err(error), _) => return Err(error),
            }
        }
    }

    /// Grants these to a tenant, in one transaction. Without `durably` a crash within the next second may undo that.
    pub(super) fn add(self: &Arc<Self>, tenant: &str, mut objects: Vec<Object>, durably: bool) -> io::Result<()> {
        self.forget_collected()?;
        // A B-tree fills best in the order of its keys.
        objects.sort_unstable();
        objects.dedup();
        self.keep_new(tenant, &mut objects)?;
        if objects.is_empty() {
            return if durably { self.flush() } else { Ok(()) };
        }
        let known = self.id(tenant);
        // An id that was lost could become another tenant's.
        let durably = durably || known.is_none();
        if durably {
            self.is_dirty.store(false, Ordering::Relaxed);
        }
        let id = self.write(durably, |write| insert(write, tenant, &objects))?;
        if known.is_none() {
            self.ids.write().insert(tenant.to_owned(), id);
        }
        if !durably {
            self.flush_soon();
        }
        Ok(())
    }

    fn id(&self, tenant: &str) -> Option<u32> {
        self.ids.read().get(tenant).copied()
    }

    /// Leaves out what the tenant has.
    fn keep_new(&self, tenant: &str, objects: &mut Vec<Object>) -> io::Result<()> {
        let Some(id) = self.id(tenant) else { return Ok(()) };
        let is_new = self.with(|database| {
            let grants = database.begin_read()?.open_table(GRANTS)?;
            let is_new = |object: &Object| Ok(grants.get(key(id, object.kind, &object.digest))?.is_none());
            objects.iter().map(is_new).collect::<Result<Vec<_>, redb::Error>>()
        })?;
        let mut is_new = is_new.into_iter();
        objects.retain(|_| is_new.next().unwrap_or(true));
        Ok(())
    }

    /// Removes the grants of what collections have removed. Returns whether they have removed anything.
    fn forget_collected(&self) -> io::Result<bool> {
        let Some(collected) = &self.collected else { return Ok(false) };
        if collected.is_empty()? {
            return Ok(false);
        }
        collected.take(|gone| {
            let gone: HashSet<_> = gone.into_iter().collect();
            self.write(true, |write| remove(write, &gone))
        })?;
        Ok(true)
    }

    /// Makes all grants durable.
    pub(super) fn flush(&self) -> io::Result<()> {
        if self.is_dirty.swap(false, Ordering::Relaxed) {
            self.write(true, |_| Ok(()))?;
        }
        Ok(())
    }

    fn flush_soon(self: &Arc<Self>) {
        if self.is_dirty.swap(true, Ordering::Relaxed) {
            return;
        }
        let this: Weak<Self> = Arc::downgrade(self);
        let flush = move || {
            if let Some(this) = this.upgrade()
                && let Err(error) = this.flush()
            {
                tracing::warn!(error = &error as &dyn std::error::Error, "grants are not durable yet");
            }
        };
        let later = runtime::detach(async {
            tokio::time::sleep(FLUSH_AFTER).await;
            let _ = tokio::task::spawn_blocking(flush).await;
        });
        // Without threads, the next durable grant makes this one durable, too.
        let _ = later;
    }

    fn write<T>(&self, durably: bool, work: impl Fn(&WriteTransaction) -> Result<T, redb::Error>) -> io::Result<T> {
        self.with(|database| {
            let mut write = database.begin_write()?;
            write.set_durability(if durably { Durability::Immediate } else { Durability::None })?;
            let done = work(&write)?;
            write.commit()?;
            Ok(done)
        })
    }

    fn with<T>(&self, work: impl Fn(&Database) -> Result<T, redb::Error>) -> io::Result<T> {
        self.database.with(work).map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &redb::Error) -> io::Error {
        failed(self.database.path(), error)
    }
}

impl Drop for Grants {
    fn drop(&mut self) {
        // What is lost is put again.
        let _ = self.flush();
    }
}

fn failed(path: &Path, error: &redb::Error) -> io::Error {
    let kind = match error {
        redb::Error::Io(error) => error.kind(),
        redb::Error::DatabaseAlreadyOpen => io::ErrorKind::WouldBlock,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, format!("the grants in {}: {error}", path.display()))
}

/// The tables of a new file.
fn fill(write: &WriteTransaction) -> Result<(), redb::Error> {
    write.open_table(META)?.insert("format", FORMAT)?;
    write.open_table(TENANTS)?;
    write.open_table(GRANTS)?;
    write.open_table(USAGE)?;
    Ok(())
}

/// Inserts new grants, and returns the tenant's id.
fn insert(write: &WriteTransaction, tenant: &str, objects: &[Object]) -> Result<u32, redb::Error> {
    let (mut tenants, mut usage) = (write.open_table(TENANTS)?, write.open_table(USAGE)?);
    let known = tenants.get(tenant)?.map(|id| id.value());
    let id = match known {
        Some(id) => id,
        None => {
            let id = usage.last()?.map_or(0, |(last, _)| last.value() + 1);
            tenants.insert(tenant, id)?;
            id
        }
    };
    let mut grants = write.open_table(GRANTS)?;
    let (mut bytes, mut count) = usage.get(id)?.map(|usage| usage.value()).unwrap_or_default();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    for object in objects {
        if grants.insert(key(id, object.kind, &object.digest), (object.bytes, now))?.is_none() {
            bytes = bytes.saturating_add(object.bytes);
            count += 1;
        }
    }
    usage.insert(id, (bytes, count))?;
    Ok(id)
}

/// Removes all grants of these objects.
fn remove(write: &WriteTransaction, gone: &HashSet<(Kind, B3Digest)>) -> Result<(), redb::Error> {
    let tenants = write.open_table(TENANTS)?;
    let ids = tenants.iter()?.map(|entry| entry.map(|(_, id)| id.value())).collect::<Result<Vec<_>, _>>()?;
    let mut freed: HashMap<u32, (u64, u64)> = HashMap::new();
    let mut free = |id, bytes| {
        let freed = freed.entry(id).or_default();
        *freed = (freed.0.saturating_add(bytes), freed.1 + 1);
    };
    let mut grants = write.open_table(GRANTS)?;
    if gone.len().saturating_mul(ids.len()) as u64 <= grants.len()? {
        for id in ids {
            for (kind, digest) in gone {
                if let Some(removed) = grants.remove(key(id, *kind, digest))? {
                    free(id, removed.value().0);
                }
            }
        }
    } else {
        grants.retain(|key, (bytes, _)| {
            let (id, object) = split(&key);
            let is_gone = object.is_some_and(|object| gone.contains(&object));
            if is_gone {
                free(id, bytes);
            }
            !is_gone
        })?;
    }
    let mut usage = write.open_table(USAGE)?;
    for (id, (bytes, objects)) in freed {
        let used = usage.get(id)?.map(|usage| usage.value()).unwrap_or_default();
        usage.insert(id, (used.0.saturating_sub(bytes), used.1.saturating_sub(objects)))?;
    }
    Ok(())
}

fn key(id: u32, kind: Kind, digest: &B3Digest) -> [u8; KEY_BYTES] {
    let mut key = [0; KEY_BYTES];
    key[..4].copy_from_slice(&id.to_be_bytes());
    key[4] = kind as u8;
    key[5..].copy_from_slice(digest.as_slice());
    key
}

/// The tenant's id and the object of a key.
fn split(key: &[u8; KEY_BYTES]) -> (u32, Option<(Kind, B3Digest)>) {
    let [a, b, c, d, kind, digest @ ..] = key;
    let kind = [Kind::Blob, Kind::Directory].into_iter().find(|known| *known as u8 == *kind);
    (u32::from_be_bytes([*a, *b, *c, *d]), kind.map(|kind| (kind, B3Digest::from(*digest))))
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_BYTES);
    builder
}
