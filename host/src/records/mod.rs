//! The record and the log of every build, in one directory.
//!
//! ```text
//!   begin ──▶ Recording ── start ─ phase ─ log … ─▶ finish
//!                 │                         │          │
//!               memory          logs/ID.log, records.redb
//!                                           ▼
//!             packer: compresses to logs/ID.log.zst, deletes the plain file; deletes old records
//! ```
//!
//! The daemon [opens](Records::open) them once and shares them. For each request it [begins](Records::begin) a
//! [`Recording`], which has the build's id. It calls [`start`](Recording::start) when the build starts, passes phases and log
//! bytes on, and [finishes](Recording::finish) it with an [`End`]. Builds that only wait cost no I/O.
//!
//! Functions that aren't `async` block for short I/O. [`Recording::finish`] and [`Records::open`] wait for the disk.
//!
//! If a stored record has no outcome and its build is not in memory, a process was killed. The build counts as lost.

mod database;
mod error;
mod id;
mod lock;
mod log;
mod record;
mod recording;
mod retention;
mod seekable;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs::DirBuilder,
    os::unix::fs::DirBuilderExt as _,
    path::Path,
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use cofferdam_castore::B3Digest;
use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use self::{
    database::{Batch, Database},
    error::{Result, failed},
    id::Ids,
    lock::Lock,
    log::{Form, Logs, Progress},
    recording::Live,
};

use crate::{build::failure::Failure, niceness::GivesWay};

pub(crate) use crate::build::Phase;
pub(crate) use error::RecordsError;
pub(crate) use id::BuildId;
pub(crate) use log::LogReader;
pub(crate) use record::{Log, Machine, Outcome, Output, Record, Sampled, Status, describe};
pub(crate) use recording::{End, Recording, Request};
pub(crate) use retention::Retention;

/// Most bytes of an encoded request that is kept.
const MAX_REQUEST_BYTES: usize = 64 * 1024;

/// Most records in a [`Page`].
pub(crate) const MAX_PAGE: usize = 1000;

/// Most records that are read for a [`Page`].
const MAX_EXAMINED: usize = 10_000;

/// How often all records are looked at, and old ones are deleted, while no client has more than it may.
const RETENTION_INTERVAL: Duration = Duration::from_secs(60 * 60);

/// How soon work on the disk is tried again that has failed.
const RETRY_INTERVAL: Duration = Duration::from_secs(60);

/// Most builds whose end is kept in memory because it can't be stored. Further ones count as lost.
const MAX_UNSAVED: usize = 256;

/// The records and logs of one directory. One process at a time has it open.
pub(crate) struct Records {
    shared: Arc<Shared>,
    packer: Option<JoinHandle<()>>,
}

struct Shared {
    database: Database,
    logs: Logs,
    retention: Retention,
    ids: Ids,
    live: Mutex<BTreeMap<BuildId, Arc<Live>>>,
    /// What each client has that is stored. Locked while that changes.
    recorded: Mutex<BTreeMap<String, Recorded>>,
    /// Builds that have ended, and whose end couldn't be stored. They are in `live`, too.
    unsaved: Mutex<VecDeque<Unsaved>>,
    /// Work for the packer.
    todo: Mutex<Todo>,
    woken: Condvar,
    /// Held while logs are compressed and deleted.
    tidying: Mutex<()>,
    _lock: Lock,
}

struct Unsaved {
    live: Arc<Live>,
    proof: Option<Vec<u8>>,
}

#[derive(Default)]
struct Todo {
    tidy: bool,
    stop: bool,
}

/// What a client has of the records.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Recorded {
    /// Of its finished builds: records, proofs and logs, which are compressed soon after their end.
    pub bytes: u64,
    /// Finished builds.
    pub records: u64,
}

impl Recorded {
    fn add(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.records += 1;
    }

    fn remove(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_sub(bytes);
        self.records = self.records.saturating_sub(1);
    }
}

/// A page of the wanted records.
#[derive(Debug, Clone)]
pub(crate) struct Page {
    /// Newest first. A page may have fewer than requested, or none, although more follow.
    pub records: Vec<Record>,
    /// Where the next page begins, if there may be one.
    pub next: Option<BuildId>,
}

impl Records {
    /// Opens the records in a directory, which is created if need be. Cleans up after a killed process: records its builds as
    /// lost, and deletes log files without a record.
    ///
    /// # Errors
    ///
    /// Another process has them open, a newer version made them, or they can't be read and written.
    pub(crate) fn open(dir: &Path, retention: Retention) -> Result<Self> {
        let logs = dir.join("logs");
        DirBuilder::new().recursive(true).mode(0o700).create(&logs).map_err(failed("make the directory", &logs))?;
        let lock = Lock::take(dir)?;
        let database = Database::open(dir)?;
        let shared = Arc::new(Shared {
            ids: Ids::after(database.newest()?),
            database,
            logs: Logs::new(logs),
            retention,
            live: Mutex::default(),
            recorded: Mutex::default(),
            unsaved: Mutex::default(),
            todo: Mutex::new(Todo { tidy: true, stop: false }),
            woken: Condvar::new(),
            tidying: Mutex::default(),
            _lock: lock,
        });
        shared.remove_orphans()?;
        shared.settle()?;
        if let Err(error) = shared.expire(SystemTime::now()) {
            // A daemon must start on a full disk. The packer tries again.
            tracing::warn!(error = &error as &dyn std::error::Error, "can't delete old records");
        }
        let (packer, priority) = (Arc::clone(&shared), GivesWay::to_this_thread());
        let packer = thread::Builder::new().name("records".to_owned()).spawn(move || {
            if let Ok(priority) = priority {
                priority.begin();
            }
            packer.run();
        });
        let packer = packer.map_err(failed("start the thread that tidies", dir))?;
        Ok(Self { shared, packer: Some(packer) })
    }

    /// Begins the record of a build, in memory.
    pub(crate) fn begin(&self, request: Request) -> Recording {
        Recording::new(Arc::clone(&self.shared), request)
    }

    /// One record.
    ///
    /// # Errors
    ///
    /// The database can't be read.
    pub(crate) fn get(&self, id: BuildId) -> Result<Option<Record>> {
        // The map's lock is released before the record's is taken.
        let live = self.shared.live.lock().get(&id).cloned();
        if let Some(live) = live {
            return Ok(Some(live.record()));
        }
        Ok(self.shared.database.get(id)?.map(|record| self.shared.settled(record)))
    }

    /// A page of the wanted records, newest first. It has at most `most` records, from 1 to [`MAX_PAGE`]. `before` is the
    /// [`Page::next`] of the page before. A record that exists throughout is on exactly one page.
    ///
    /// # Errors
    ///
    /// The database can't be read.
    pub(crate) fn list(&self, wanted: &dyn Fn(&Record) -> bool, before: Option<BuildId>, most: usize) -> Result<Page> {
        let most = most.clamp(1, MAX_PAGE);
        let mut page = Page { records: Vec::new(), next: before };
        let (mut examined, mut bytes) = (0, 0);
        loop {
            let live: Vec<_> = {
                let live = self.shared.live.lock();
                let range = live.iter().filter(|(id, _)| page.next.is_none_or(|next| **id < next));
                range.map(|(id, live)| (*id, Arc::clone(live))).collect()
            };
            let stored = self.shared.database.before(page.next)?;
            let is_last = stored.is_last();
            let floor = stored.records.last().filter(|_| !is_last).map(|(id, _)| *id);
            // Older ones belong to later rounds.
            let live: Vec<_> = live
                .into_iter()
                .filter(|(id, _)| floor.is_none_or(|floor| *id > floor))
                .map(|(_, live)| live)
                .collect();
            examined += stored.records.len() + live.len();
            bytes += stored.bytes;
            let mut found = BTreeMap::new();
            for (id, record) in stored.records {
                // An unfinished one may still run, or have ended since.
                let is_unfinished = record.as_ref().is_some_and(|record| record.outcome.is_none());
                let record = if is_unfinished { self.get(id)? } else { record };
                found.extend(record.map(|record| (id, record)));
            }
            found.extend(live.iter().map(|live| live.record()).map(|record| (record.id, record)));
            for (id, record) in found.into_iter().rev() {
                page.next = Some(id);
                if wanted(&record) {
                    page.records.push(record);
                    if page.records.len() == most {
                        return Ok(page);
                    }
                }
            }
            page.next = floor;
            if is_last || examined >= MAX_EXAMINED || bytes >= Batch::MOST_BYTES {
                return Ok(page);
            }
        }
    }

    /// The latest successful build with this [key](Request::key). The store may have lost its outputs.
    ///
    /// # Errors
    ///
    /// The database can't be read.
    pub(crate) fn result_for(&self, key: &B3Digest) -> Result<Option<Record>> {
        self.shared.database.latest(key)
    }

    /// The signed statement of how a build's outputs were made, if there is one.
    ///
    /// # Errors
    ///
    /// The database can't be read.
    pub(crate) fn proof(&self, id: BuildId) -> Result<Option<Vec<u8>>> {
        self.shared.database.proof(id)
    }

    /// A build's encoded request, if it was small enough to be kept.
    ///
    /// # Errors
    ///
    /// The database can't be read.
    pub(crate) fn request(&self, id: BuildId) -> Result<Option<Vec<u8>>> {
        self.shared.database.request(id)
    }

    /// What each client has, by its name.
    pub(crate) fn recorded(&self) -> BTreeMap<String, Recorded> {
        self.shared.recorded.lock().clone()
    }

    /// A reader of a build's log from an offset; `None` if there is no such build.
    ///
    /// # Errors
    ///
    /// The log is shorter, or the database can't be read.
    pub(crate) fn read_log(&self, id: BuildId, offset: u64) -> Result<Option<LogReader>> {
        let live = self.shared.live.lock().get(&id).map(|live| live.progress());
        let progress = match live {
            Some(progress) => progress,
            None => match self.get(id)? {
                Some(record) => watch::channel(Progress { bytes: record.log.bytes, ended: true }).1,
                None => return Ok(None),
            },
        };
        LogReader::new(id, self.shared.logs.clone(), offset, progress).map(Some)
    }
}

impl Drop for Records {
    /// Waits for the packer, which finishes its current log.
    fn drop(&mut self) {
        self.shared.todo.lock().stop = true;
        self.shared.woken.notify_all();
        if let Some(packer) = self.packer.take()
            && packer.join().is_err()
        {
            tracing::error!("the thread that tidies records panicked");
        }
    }
}

impl Shared {
    fn wake(&self) {
        self.todo.lock().tidy = true;
        self.woken.notify_all();
    }

    /// The packer's thread.
    fn run(&self) {
        let (mut pause, mut expired) = (RETENTION_INTERVAL, None::<Instant>);
        loop {
            let mut todo = self.todo.lock();
            self.woken.wait_while_for(&mut todo, |todo| !todo.tidy && !todo.stop, pause);
            let Todo { stop, .. } = std::mem::take(&mut *todo);
            drop(todo);
            let is_due = expired.is_none_or(|expired| expired.elapsed() >= RETENTION_INTERVAL)
                || self.retention.is_exceeded(&self.recorded.lock());
            let done = match stop {
                true => self.save(),
                false => self.tidy(is_due.then(SystemTime::now)),
            };
            if is_due && done.is_ok() {
                expired = Some(Instant::now());
            }
            if let Err(error) = &done {
                let error: &dyn std::error::Error = error;
                tracing::warn!(error, "can't tidy the records; the next build's end tries again, or the next minute");
            }
            if stop {
                return;
            }
            pause = if done.is_ok() { RETENTION_INTERVAL } else { RETRY_INTERVAL };
        }
    }

    /// Compresses the logs of finished builds, and deletes records that are old by now.
    fn tidy(&self, now: Option<SystemTime>) -> Result<()> {
        let _tidying = self.tidying.lock();
        let packed = self.save().and_then(|()| self.settle()).and_then(|()| self.pack());
        now.map_or(Ok(()), |now| self.expire(now))?;
        packed
    }

    /// Deletes old records.
    fn expire(&self, now: SystemTime) -> Result<()> {
        let mut recorded = self.recorded.lock();
        let (gone, left) = self.database.expire(&self.retention, now)?;
        *recorded = left;
        drop(recorded);
        for id in gone {
            self.logs.remove(id, Form::Plain)?;
            self.logs.remove(id, Form::Packed)?;
        }
        Ok(())
    }

    /// Stores the record of a build that has ended, and the proof of how its outputs were made.
    fn finish(&self, record: &Record, key: &B3Digest, proof: Option<&[u8]>) -> Result<()> {
        let mut recorded = self.recorded.lock();
        let bytes = self.database.finish(record, key, proof, SystemTime::now())?;
        recorded.entry(record.client.clone()).or_default().add(bytes);
        Ok(())
    }

    /// Stores the ends that couldn't be stored when their builds ended.
    fn save(&self) -> Result<()> {
        let mut unsaved = self.unsaved.lock();
        while let Some(end) = unsaved.front() {
            let record = end.live.record();
            self.finish(&record, &end.live.key, end.proof.as_deref())?;
            self.live.lock().remove(&record.id);
            unsaved.pop_front();
        }
        Ok(())
    }

    /// Records unfinished builds that are not in memory as lost.
    fn settle(&self) -> Result<()> {
        for id in self.database.plain()? {
            if self.live.lock().contains_key(&id) {
                continue;
            }
            match self.database.get_sound(id)? {
                Some(record) if record.outcome.is_none() => {
                    let key = record.request_digest;
                    self.finish(&self.settled(record), &key, None)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// A stored record of a build that isn't active. Without an outcome, its process was killed.
    fn settled(&self, mut record: Record) -> Record {
        if record.outcome.is_none() {
            record.log.bytes = self.logs.size(record.id, Form::Plain).unwrap_or_default();
            let message = "the process that ran the build was killed, or could not record how it ended";
            record.outcome = Some(Outcome::Failed(Failure::executor(record::LOST, message)));
        }
        record
    }

    fn pack(&self) -> Result<()> {
        for id in self.database.plain()? {
            if self.live.lock().contains_key(&id) {
                continue;
            }
            if self.todo.lock().stop {
                break;
            }
            let Some(record) = self.database.get_sound(id)? else { continue };
            let (log_bytes, packed_bytes) = match self.logs.pack(id)? {
                Some(packed) => packed,
                None => (record.log.bytes, self.logs.size(id, Form::Packed)?),
            };
            let mut recorded = self.recorded.lock();
            let client = record.client.clone();
            if let Some((before, now)) = self.database.packed(record, log_bytes, packed_bytes)?
                && let Some(of_client) = recorded.get_mut(&client)
            {
                of_client.bytes = of_client.bytes.saturating_sub(before).saturating_add(now);
            }
            drop(recorded);
            self.logs.remove(id, Form::Plain)?;
        }
        Ok(())
    }

    /// Deletes log files that a killed process left.
    fn remove_orphans(&self) -> Result<()> {
        let plain: BTreeSet<_> = self.database.plain()?.into_iter().collect();
        for (id, form) in self.logs.list()? {
            let is_known = match form {
                Form::Plain => plain.contains(&id),
                Form::Packed => self.database.has(id)?,
                Form::Unfinished => false,
            };
            if !is_known {
                self.logs.remove(id, form)?;
            }
        }
        Ok(())
    }
}
