//! The tables, and the transactions on them.
//!
//! ```text
//!   meta      name → number            format, and the clock by which records age
//!   records   id → JSON                see `Record`
//!   finished  id → end, bytes, key     what retention needs of finished builds
//!   plain     id                       builds whose log is not compressed yet
//!   latest    key → id                 the latest success with this key
//!   proofs    id → DSSE envelope       see `crate::provenance`
//!   owners    id → client              of finished builds
//!   requests  id → snix BuildRequest   those that are small enough
//! ```

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::SystemTime,
};

use cofferdam_castore::{B3Digest, reopening::Reopening};
use redb::{Builder, ReadTransaction, ReadableDatabase as _, ReadableTable as _, TableDefinition, WriteTransaction};

use super::{
    BuildId, Outcome, Record, Recorded, RecordsError,
    error::Result,
    retention::{AgeClock, Kept, Retention, expired},
};

/// The format of the tables.
const FORMAT: u64 = 1;

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const RECORDS: TableDefinition<'_, u128, &[u8]> = TableDefinition::new("records");
const FINISHED: TableDefinition<'_, u128, (u64, u64, [u8; B3Digest::LENGTH])> = TableDefinition::new("finished");
const PLAIN: TableDefinition<'_, u128, ()> = TableDefinition::new("plain");
const LATEST: TableDefinition<'_, [u8; B3Digest::LENGTH], u128> = TableDefinition::new("latest");

const PROOFS: TableDefinition<'_, u128, &[u8]> = TableDefinition::new("proofs");

const OWNERS: TableDefinition<'_, u128, &str> = TableDefinition::new("owners");

const REQUESTS: TableDefinition<'_, u128, &[u8]> = TableDefinition::new("requests");

const CACHE_BYTES: usize = 16 * 1024 * 1024;

/// The database.
pub(super) struct Database {
    database: Reopening,
}

/// Records that were read in one transaction.
pub(super) struct Batch {
    /// `None` for a damaged record.
    pub(super) records: Vec<(BuildId, Option<Record>)>,
    /// The size of all of them as stored.
    pub(super) bytes: usize,
}

impl Batch {
    const MOST: usize = 256;

    /// Reading stops after the record that reaches this.
    pub(super) const MOST_BYTES: usize = 16 * 1024 * 1024;

    pub(super) fn is_last(&self) -> bool {
        self.records.len() < Self::MOST && self.bytes < Self::MOST_BYTES
    }
}

type Work<T> = Result<T, redb::Error>;

impl Database {
    /// Opens the database, or creates it. The caller holds the directory's lock.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("records.redb");
        let database = Reopening::new(path.clone(), builder, fill).map_err(|error| failed("make", &path, error))?;
        let database = Self { database };
        let found = database.read(|read| Ok(read.open_table(META)?.get("format")?.map(|found| found.value())))?;
        match found {
            Some(FORMAT) => {
                // Earlier versions lacked them.
                let added = database.write(|write| {
                    write.open_table(PROOFS)?;
                    write.open_table(OWNERS)?;
                    write.open_table(REQUESTS)?;
                    Ok(())
                });
                added.map(|()| database)
            }
            Some(found) if found > FORMAT => Err(RecordsError::Newer { path: database.path(), found, known: FORMAT }),
            _ => Err(database.failed("read", redb::Error::Corrupted("its format is missing".to_owned()))),
        }
    }

    /// Stores the record of a build that has begun, and its request unless that is empty.
    pub(super) fn begin(&self, record: &Record, request: &[u8]) -> Result<()> {
        let (id, encoded) = (record.id.as_u128(), self.encode(record)?);
        self.write(|write| {
            write.open_table(RECORDS)?.insert(id, encoded.as_slice())?;
            write.open_table(PLAIN)?.insert(id, ())?;
            if !request.is_empty() {
                write.open_table(REQUESTS)?.insert(id, request)?;
            }
            Ok(())
        })
    }

    /// Stores the record of a build that has ended, and the proof of how its outputs were made. Returns the bytes that they count.
    pub(super) fn finish(&self, record: &Record, key: &B3Digest, proof: Option<&[u8]>, now: SystemTime) -> Result<u64> {
        let (id, encoded, key) = (record.id.as_u128(), self.encode(record)?, key.as_bytes());
        let bytes = (encoded.len() + proof.unwrap_or_default().len()) as u64 + record.log.bytes;
        self.write(|write| {
            let age_us = advance(write, now)?.age_us;
            let bytes = bytes + write.open_table(REQUESTS)?.get(id)?.map_or(0, |request| request.value().len() as u64);
            write.open_table(RECORDS)?.insert(id, encoded.as_slice())?;
            write.open_table(PLAIN)?.insert(id, ())?;
            write.open_table(FINISHED)?.insert(id, (age_us, bytes, *key))?;
            write.open_table(OWNERS)?.insert(id, record.client.as_str())?;
            if matches!(record.outcome, Some(Outcome::Built(_))) {
                write.open_table(LATEST)?.insert(key, id)?;
            }
            if let Some(proof) = proof {
                write.open_table(PROOFS)?.insert(id, proof)?;
            }
            Ok(bytes)
        })
    }

    /// Stores a log's sizes before and after compression. Returns the bytes that the build counted before, and counts now; `None` if
    /// its record has been deleted.
    pub(super) fn packed(&self, mut record: Record, log_bytes: u64, packed_bytes: u64) -> Result<Option<(u64, u64)>> {
        record.log.truncated |= log_bytes < record.log.bytes;
        record.log.bytes = log_bytes;
        let (id, encoded) = (record.id.as_u128(), self.encode(&record)?);
        self.write(|write| {
            write.open_table(PLAIN)?.remove(id)?;
            let proof_bytes = write.open_table(PROOFS)?.get(id)?.map_or(0, |proof| proof.value().len());
            let request_bytes = write.open_table(REQUESTS)?.get(id)?.map_or(0, |request| request.value().len());
            let bytes = (encoded.len() + proof_bytes + request_bytes) as u64 + packed_bytes;
            let mut finished = write.open_table(FINISHED)?;
            let Some((age_us, before, key)) = finished.get(id)?.map(|finished| finished.value()) else {
                return Ok(None);
            };
            finished.insert(id, (age_us, bytes, key))?;
            write.open_table(RECORDS)?.insert(id, encoded.as_slice())?;
            Ok(Some((before, bytes)))
        })
    }

    /// Deletes old records. Returns their ids, and what each client has left.
    pub(super) fn expire(
        &self,
        retention: &Retention,
        now: SystemTime,
    ) -> Result<(Vec<BuildId>, BTreeMap<String, Recorded>)> {
        self.write(|write| {
            let clock = advance(write, now)?;
            let (mut finished, mut latest) = (write.open_table(FINISHED)?, write.open_table(LATEST)?);
            let mut owners = write.open_table(OWNERS)?;
            let (mut kept, mut recorded) = (Vec::new(), BTreeMap::<String, Recorded>::new());
            for entry in finished.iter()? {
                let (key, value) = entry?;
                let (ended_us, bytes, _) = value.value();
                // Earlier versions stored no owners.
                let client = owners.get(key.value())?.map_or_else(String::new, |owner| owner.value().to_owned());
                recorded.entry(client.clone()).or_default().add(bytes);
                kept.push(Kept { key: key.value(), client, ended_us, bytes });
            }
            let gone = expired(kept, clock, retention);
            for id in &gone {
                let (bytes, key) = finished
                    .remove(id)?
                    .map(|finished| finished.value())
                    .map_or((0, None), |(_, bytes, key)| (bytes, Some(key)));
                write.open_table(RECORDS)?.remove(id)?;
                write.open_table(PLAIN)?.remove(id)?;
                write.open_table(PROOFS)?.remove(id)?;
                write.open_table(REQUESTS)?.remove(id)?;
                let client = owners.remove(id)?.map_or_else(String::new, |owner| owner.value().to_owned());
                if let Some(of_client) = recorded.get_mut(&client) {
                    of_client.remove(bytes);
                }
                if let Some(key) = key
                    && latest.get(key)?.is_some_and(|latest| latest.value() == *id)
                {
                    latest.remove(key)?;
                }
            }
            recorded.retain(|_, of_client| of_client.records > 0);
            Ok((ids(gone), recorded))
        })
    }

    pub(super) fn has(&self, id: BuildId) -> Result<bool> {
        self.read(|read| Ok(read.open_table(RECORDS)?.get(id.as_u128())?.is_some()))
    }

    pub(super) fn get(&self, id: BuildId) -> Result<Option<Record>> {
        let get = |read: &ReadTransaction| {
            Ok(read.open_table(RECORDS)?.get(id.as_u128())?.map(|encoded| encoded.value().to_vec()))
        };
        self.read(get)?.map(|encoded| self.decode(id, &encoded)).transpose()
    }

    /// The proof of how a build's outputs were made.
    pub(super) fn proof(&self, id: BuildId) -> Result<Option<Vec<u8>>> {
        self.read(|read| Ok(read.open_table(PROOFS)?.get(id.as_u128())?.map(|proof| proof.value().to_vec())))
    }

    /// A build's encoded request.
    pub(super) fn request(&self, id: BuildId) -> Result<Option<Vec<u8>>> {
        self.read(|read| Ok(read.open_table(REQUESTS)?.get(id.as_u128())?.map(|request| request.value().to_vec())))
    }

    /// The latest successful build of a key.
    pub(super) fn latest(&self, key: &B3Digest) -> Result<Option<Record>> {
        let get = |read: &ReadTransaction| {
            Ok(read.open_table(LATEST)?.get(key.as_bytes())?.and_then(|id| BuildId::from_u128(id.value())))
        };
        match self.read(get)? {
            Some(id) => self.get(id),
            None => Ok(None),
        }
    }

    /// Like [`get`](Self::get), but a damaged record is `None`, so that work on many records goes on.
    pub(super) fn get_sound(&self, id: BuildId) -> Result<Option<Record>> {
        sound(self.get(id))
    }

    /// The newest records older than `before`, newest first.
    pub(super) fn before(&self, before: Option<BuildId>) -> Result<Batch> {
        let encoded = self.read(|read| {
            let table = read.open_table(RECORDS)?;
            let range = table.range(..before.map_or(u128::MAX, BuildId::as_u128))?;
            let (mut encoded, mut bytes) = (Vec::new(), 0);
            for entry in range.rev().take(Batch::MOST) {
                let (id, value) = entry?;
                bytes += value.value().len();
                encoded.push((id.value(), value.value().to_vec()));
                if bytes >= Batch::MOST_BYTES {
                    break;
                }
            }
            Ok((encoded, bytes))
        })?;
        let (encoded, bytes) = encoded;
        let known = encoded.into_iter().filter_map(|(id, encoded)| Some((BuildId::from_u128(id)?, encoded)));
        let decoded = known.map(|(id, encoded)| Ok((id, sound(self.decode(id, &encoded).map(Some))?)));
        Ok(Batch { records: decoded.collect::<Result<_>>()?, bytes })
    }

    pub(super) fn newest(&self) -> Result<Option<BuildId>> {
        self.read(|read| {
            let newest = read.open_table(RECORDS)?.last()?.map(|(id, _)| id.value());
            Ok(newest.and_then(BuildId::from_u128))
        })
    }

    /// Builds whose log is not compressed yet.
    pub(super) fn plain(&self) -> Result<Vec<BuildId>> {
        self.read(|read| {
            let table = read.open_table(PLAIN)?;
            let entries = table.iter()?.map(|entry| Ok(entry?.0.value()));
            entries.collect::<Work<Vec<_>>>().map(ids)
        })
    }

    fn read<T>(&self, work: impl Fn(&ReadTransaction) -> Work<T>) -> Result<T> {
        self.with("read", |database| work(&database.begin_read()?))
    }

    fn write<T>(&self, work: impl Fn(&WriteTransaction) -> Work<T>) -> Result<T> {
        self.with("write", |database| {
            let write = database.begin_write()?;
            let done = work(&write)?;
            write.commit()?;
            Ok(done)
        })
    }

    fn with<T>(&self, action: &'static str, work: impl Fn(&redb::Database) -> Work<T>) -> Result<T> {
        self.database.with(work).map_err(|error| self.failed(action, error))
    }

    fn encode(&self, record: &Record) -> Result<Vec<u8>> {
        record.encode().map_err(|source| self.damaged(record.id, source))
    }

    fn decode(&self, id: BuildId, encoded: &[u8]) -> Result<Record> {
        Record::decode(id, encoded).map_err(|source| self.damaged(id, source))
    }

    fn damaged(&self, id: BuildId, source: serde_json::Error) -> RecordsError {
        RecordsError::Damaged { id, path: self.path(), source }
    }

    fn path(&self) -> PathBuf {
        self.database.path().to_owned()
    }

    fn failed(&self, action: &'static str, source: redb::Error) -> RecordsError {
        failed(action, self.database.path(), source)
    }
}

fn sound(record: Result<Option<Record>>) -> Result<Option<Record>> {
    match record {
        Err(error @ RecordsError::Damaged { .. }) => {
            tracing::warn!(error = &error as &dyn std::error::Error, "leaving out a record");
            Ok(None)
        }
        record => record,
    }
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_BYTES);
    builder
}

/// The tables of a new database.
fn fill(write: &WriteTransaction) -> Work<()> {
    write.open_table(META)?.insert("format", FORMAT)?;
    write.open_table(RECORDS)?;
    write.open_table(FINISHED)?;
    write.open_table(PLAIN)?;
    write.open_table(LATEST)?;
    Ok(())
}

fn failed(action: &'static str, path: &Path, source: redb::Error) -> RecordsError {
    RecordsError::Database { action, path: path.to_owned(), source: Box::new(source) }
}

/// Brings the age clock up to date.
fn advance(write: &WriteTransaction, now: SystemTime) -> Work<AgeClock> {
    let mut meta = write.open_table(META)?;
    let stored = |name| -> Work<Option<u64>> { Ok(meta.get(name)?.map(|number| number.value())) };
    let clock = match (stored("age_us")?, stored("wall_us")?) {
        (Some(age_us), Some(wall_us)) => AgeClock { age_us, wall_us }.at(now),
        _ => AgeClock::default().at(now),
    };
    meta.insert("age_us", clock.age_us)?;
    meta.insert("wall_us", clock.wall_us)?;
    Ok(clock)
}

fn ids(numbers: Vec<u128>) -> Vec<BuildId> {
    numbers.into_iter().filter_map(BuildId::from_u128).collect()
}
