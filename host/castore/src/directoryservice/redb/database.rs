//! The database file, which is opened for each operation.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant, SystemTime},
};

use parking_lot::RwLock;
use redb::{
    Builder, Database, DatabaseError, ReadOnlyDatabase, ReadTransaction, ReadableDatabase as _, TableDefinition,
    TableError, TransactionError,
};

use super::super::decode_batch;
use crate::{B3Digest, Directory, DirectoryMemory, durable::remove_if_there};

pub(super) const TABLE: TableDefinition<'_, [u8; B3Digest::LENGTH], Vec<u8>> = TableDefinition::new("directory");

/// The same table for the redb version that snix uses.
pub(super) const SNIX_TABLE: redb_of_snix::TableDefinition<'_, [u8; B3Digest::LENGTH], Vec<u8>> =
    redb_of_snix::TableDefinition::new("directory");

/// When each tree was last put, by its root, in nanoseconds since 1970; see [`crate::gc`]. snix does not use this table,
/// but its redb version must know the types.
pub(super) const RECENT: TableDefinition<'_, &[u8], u64> = TableDefinition::new("cofferdam_recent_roots");

/// Precision of a tree's time, which saves writes to the disk.
const USE_RESOLUTION: Duration = Duration::from_secs(60);

/// How long to wait for another process that has the file open.
const PATIENCE: Duration = Duration::from_secs(10);

const RETRY: Duration = Duration::from_millis(5);

/// The file is open only for moments, so a small page cache is enough.
const CACHE_BYTES: usize = 16 * 1024 * 1024;

#[derive(Debug)]
pub(super) struct SharedDatabase {
    path: PathBuf,
    /// Threads of this process queue here, which is fairer than polling the file's lock.
    pub(super) turn: RwLock<()>,
    pub(super) patience: Duration,
}

impl SharedDatabase {
    /// Opens the database in this file, which may be missing, to see whether it is one.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let database = Self { path: path.to_owned(), turn: RwLock::new(()), patience: PATIENCE };
        database.get_many(&[])?;
        Ok(database)
    }

    /// Gets directories, in order. When they are large, only the first ones, but at least one.
    pub(super) fn get_many(&self, digests: &[B3Digest]) -> io::Result<Vec<Option<Directory>>> {
        self.get_many_within(digests, &DirectoryMemory::unlimited())
    }

    /// The same, within this memory.
    pub(super) fn get_many_within(
        &self,
        digests: &[B3Digest],
        memory: &DirectoryMemory,
    ) -> io::Result<Vec<Option<Directory>>> {
        let _turn = self.turn.read();
        let Some(database) = self.open_to_read()? else { return Ok(vec![None; digests.len()]) };
        let read = database.begin_read().map_err(|error| self.failed(error))?;
        let table = match read.open_table(TABLE) {
            Ok(table) => table,
            Err(TableError::TableDoesNotExist(_)) => return Ok(vec![None; digests.len()]),
            Err(error) => return Err(self.failed(error)),
        };
        decode_batch(digests, |digest| {
            let encoded = table.get(digest.as_bytes()).map_err(|error| self.failed(error))?;
            let encoded = encoded.map(|encoded| encoded.value());
            encoded.as_deref().map_or(Ok(()), |encoded| memory.take(encoded))?;
            Ok(encoded)
        })
    }

    /// Adds these directories, and the time of their root, in one durable transaction.
    pub(super) fn put_many(&self, root: &B3Digest, directories: &[(B3Digest, Vec<u8>)]) -> io::Result<()> {
        let _turn = self.turn.write();
        let database = self.retry(|| self.open_to_write())?;
        let write = database.begin_write().map_err(|error| self.failed(error))?;
        {
            let mut table = write.open_table(TABLE).map_err(|error| self.failed(error))?;
            for (digest, encoded) in directories {
                table.insert(digest.as_bytes(), encoded).map_err(|error| self.failed(error))?;
            }
            let mut recent = write.open_table(RECENT).map_err(|error| self.failed(error))?;
            recent.insert(root.as_slice(), unix_nanos(SystemTime::now())).map_err(|error| self.failed(error))?;
        }
        write.commit().map_err(|error| self.failed(error))
    }

    /// Renews the time of a tree by its root, unless it is younger than [`USE_RESOLUTION`].
    pub(super) fn renew(&self, root: &B3Digest) -> io::Result<()> {
        let oldest = unix_nanos(SystemTime::now() - USE_RESOLUTION);
        if self.put_at(root)?.is_none_or(|put| (oldest..=unix_nanos(SystemTime::now())).contains(&put)) {
            return Ok(());
        }
        self.put_many(root, &[])
    }

    /// When a tree was last put, in nanoseconds since 1970: 0 if it is part of another one, `None` if it is not there.
    fn put_at(&self, root: &B3Digest) -> io::Result<Option<u64>> {
        let _turn = self.turn.read();
        let Some(database) = self.open_to_read()? else { return Ok(None) };
        let read = database.begin_read().map_err(|error| self.failed(error))?;
        let is_there = match read.open_table(TABLE) {
            Ok(table) => table.get(root.as_bytes()).map_err(|error| self.failed(error))?.is_some(),
            Err(TableError::TableDoesNotExist(_)) => false,
            Err(error) => return Err(self.failed(error)),
        };
        if !is_there {
            return Ok(None);
        }
        match read.open_table(RECENT) {
            Ok(recent) => {
                let put = recent.get(root.as_slice()).map_err(|error| self.failed(error))?;
                Ok(Some(put.map_or(0, |put| put.value())))
            }
            Err(TableError::TableDoesNotExist(_)) => Ok(Some(0)),
            Err(error) => Err(self.failed(error)),
        }
    }

    /// Opens the database, and creates it if there is no file.
    pub(super) fn open_to_write(&self) -> Result<Database, DatabaseError> {
        match OpenOptions::new().read(true).write(true).open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.create(),
            file => {
                let file = file?;
                if file.metadata()?.len() == 0 {
                    create_table(&file)?;
                }
                builder().create_file(file)
            }
        }
    }

    /// Creates the database under a temporary name, and links it when it is complete and durable. A lock on the directory
    /// lets only one process do so at a time, so a file with the temporary name is the leftover of a dead process.
    pub(super) fn create(&self) -> Result<Database, DatabaseError> {
        let parent = self.path.parent().filter(|parent| *parent != Path::new(""));
        let dir = File::open(parent.unwrap_or(Path::new(".")))?;
        match dir.try_lock() {
            Err(TryLockError::WouldBlock) => return Err(DatabaseError::DatabaseAlreadyOpen),
            Err(TryLockError::Error(error)) => return Err(error.into()),
            Ok(()) => {}
        }
        let unfinished = self.path.with_added_extension("new");
        remove_if_there(&unfinished)?;
        let made = || {
            let file = OpenOptions::new().read(true).write(true).create_new(true).open(&unfinished)?;
            create_table(&file)?;
            let database = builder().create_file(file.try_clone()?)?;
            file.sync_all()?;
            Ok::<_, DatabaseError>(database)
        };
        let made = made().map(|database| (database, fs::hard_link(&unfinished, &self.path)));
        remove_if_there(&unfinished)?;
        let (database, linked) = made?;
        match linked {
            // Another process was faster, and its file is the database.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(DatabaseError::DatabaseAlreadyOpen),
            linked => {
                linked?;
                dir.sync_all()?;
                Ok(database)
            }
        }
    }

    /// `None` when there is no file yet.
    pub(super) fn open_to_read(&self) -> io::Result<Option<Opened>> {
        // Another program is about to create a database in an empty file.
        match fs::metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Ok(metadata) if metadata.is_file() && metadata.len() == 0 => return Ok(None),
            _ => {}
        }
        let opened = self.retry(|| match builder().open_read_only(&self.path) {
            // Its last writer was killed, or the disk is full. Opening it for writing repairs it. On a full disk the repair
            // is lost again when it is closed.
            Err(DatabaseError::RepairAborted) => builder().open(&self.path).map(Opened::Repaired),
            opened => opened.map(Opened::ReadOnly),
        });
        opened.map(Some)
    }

    pub(super) fn retry<T>(&self, mut open: impl FnMut() -> Result<T, DatabaseError>) -> io::Result<T> {
        let deadline = Instant::now() + self.patience;
        loop {
            match open() {
                Err(DatabaseError::DatabaseAlreadyOpen) if Instant::now() < deadline => thread::sleep(RETRY),
                Err(DatabaseError::DatabaseAlreadyOpen) => return Err(self.held()),
                opened => return opened.map_err(|error| self.failed(error)),
            }
        }
    }

    pub(super) fn failed(&self, error: impl Into<redb::Error>) -> io::Error {
        let error = error.into();
        io::Error::other(format!("the directories in {}: {error}", self.path.display()))
    }

    fn held(&self) -> io::Error {
        let holder = match lock_holder(&self.path) {
            Some(pid) => format!("process {pid} has held it"),
            None => "another process has held it".to_owned(),
        };
        let (path, seconds) = (self.path.display(), self.patience.as_secs());
        let message = format!("the directories in {path}: {holder} for {seconds} s; try again when it has ended");
        io::Error::new(io::ErrorKind::WouldBlock, message)
    }
}

/// A database that is open for reading.
pub(super) enum Opened {
    ReadOnly(ReadOnlyDatabase),
    Repaired(Database),
}

impl Opened {
    pub(super) fn begin_read(&self) -> Result<ReadTransaction, TransactionError> {
        match self {
            Self::ReadOnly(database) => database.begin_read(),
            Self::Repaired(database) => database.begin_read(),
        }
    }
}

/// Nanoseconds since 1970.
pub(super) fn unix_nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Creates a database in an empty file, with the table as snix creates it: a later redb can write to it, but would give its
/// types other names.
fn create_table(file: &File) -> Result<(), DatabaseError> {
    let create = || {
        let database = redb_of_snix::Builder::new().create_file(file.try_clone()?)?;
        let write = database.begin_write()?;
        write.open_table(SNIX_TABLE)?;
        Ok(write.commit()?)
    };
    create().map_err(|error| match error {
        redb_of_snix::Error::DatabaseAlreadyOpen => DatabaseError::DatabaseAlreadyOpen,
        redb_of_snix::Error::Io(error) => error.into(),
        error => io::Error::other(error).into(),
    })
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_BYTES);
    builder
}

/// The process that has locked the file, if the kernel says so.
fn lock_holder(path: &Path) -> Option<u32> {
    let metadata = fs::metadata(path).ok()?;
    let (major, minor) = (nix::libc::major(metadata.dev()), nix::libc::minor(metadata.dev()));
    let file = format!("{major:02x}:{minor:02x}:{}", metadata.ino());
    let locks = fs::read_to_string("/proc/locks").ok()?;
    // "1: FLOCK  ADVISORY  WRITE 4711 fe:00:1234 0 EOF"
    locks.lines().find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let at = fields.iter().position(|field| *field == file)?;
        fields.get(at.checked_sub(1)?)?.parse().ok()
    })
}
