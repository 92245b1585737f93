//! A redb database that survives I/O errors.

use std::path::{Path, PathBuf};

use parking_lot::{RwLock, RwLockWriteGuard};
use redb::{Builder, Database, Error, WriteTransaction};

use crate::durable::create_whole;

/// A redb file that is opened when it is first used, and again after an I/O error, since redb refuses to go on.
#[derive(Debug)]
pub struct Reopening {
    path: PathBuf,
    builder: fn() -> Builder,
    open: RwLock<Open>,
}

#[derive(Debug, Default)]
struct Open {
    database: Option<Database>,
    /// How often it has been opened.
    times: u64,
}

impl Reopening {
    /// The file at this path. A missing one is created with what `fill` writes.
    ///
    /// # Errors
    ///
    /// It is missing, and can't be created.
    pub fn new(
        path: PathBuf,
        builder: fn() -> Builder,
        fill: impl FnOnce(&WriteTransaction) -> Result<(), Error>,
    ) -> Result<Self, Error> {
        if !path.try_exists()? {
            create_whole(&path, |file| {
                let database = builder().create_file(file.try_clone()?)?;
                let write = database.begin_write()?;
                fill(&write)?;
                Ok::<_, Error>(write.commit()?)
            })?;
        }
        Ok(Self { path, builder, open: RwLock::default() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Works on the database, twice if a transaction before has failed.
    ///
    /// # Errors
    ///
    /// Those of the work, or the file can't be opened.
    pub fn with<T>(&self, work: impl Fn(&Database) -> Result<T, Error>) -> Result<T, Error> {
        let mut result = self.once(&work);
        if matches!(result, Err(Error::PreviousIo)) {
            // An earlier transaction failed, and this one changed nothing.
            result = self.once(&work);
        }
        result
    }

    fn once<T>(&self, work: impl Fn(&Database) -> Result<T, Error>) -> Result<T, Error> {
        let mut open = self.open.read();
        if open.database.is_none() {
            drop(open);
            let mut closed = self.open.write();
            if closed.database.is_none() {
                closed.database = Some((self.builder)().open(&self.path)?);
                closed.times += 1;
            }
            open = RwLockWriteGuard::downgrade(closed);
        }
        let result = open.database.as_ref().map_or(Err(Error::PreviousIo), work);
        let times = open.times;
        drop(open);
        if matches!(result, Err(Error::Io(_) | Error::PreviousIo)) {
            self.close(times);
        }
        result
    }

    /// Closes the database of this count, unless another thread has closed it and opened the next.
    fn close(&self, times: u64) {
        let mut open = self.open.write();
        if open.times == times {
            open.database = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use redb::ReadableDatabase as _;

    use super::*;

    #[test]
    fn a_late_failure_leaves_the_next_database_open() {
        let directory = tempfile::tempdir().unwrap();
        let reopening = Reopening::new(directory.path().join("database"), Builder::new, |_| Ok(())).unwrap();
        let read = |database: &Database| database.begin_read().map(drop).map_err(Error::from);
        let is_open = || reopening.open.read().database.is_some();
        reopening.with(read).unwrap();
        reopening.close(1);
        assert!(!is_open());
        reopening.with(read).unwrap();
        reopening.close(1);
        assert!(is_open());
    }
}
