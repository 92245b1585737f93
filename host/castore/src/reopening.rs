//! A redb database that survives I/O errors.

use std::path::{Path, PathBuf};

use parking_lot::RwLock;
use redb::{Builder, Database, Error, WriteTransaction};

use crate::durable::create_whole;

/// A redb file that is opened when it is first used, and again after an I/O error, since redb refuses to go on.
#[derive(Debug)]
pub struct Reopening {
    path: PathBuf,
    builder: fn() -> Builder,
    open: RwLock<Option<Database>>,
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
        Ok(Self { path, builder, open: RwLock::new(None) })
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
        if open.is_none() {
            drop(open);
            let mut closed = self.open.write();
            if closed.is_none() {
                *closed = Some((self.builder)().open(&self.path)?);
            }
            drop(closed);
            open = self.open.read();
        }
        let result = open.as_ref().map_or(Err(Error::PreviousIo), work);
        drop(open);
        if matches!(result, Err(Error::Io(_) | Error::PreviousIo)) {
            *self.open.write() = None;
        }
        result
    }
}
