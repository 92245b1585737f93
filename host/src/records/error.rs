use std::{
    io,
    path::{Path, PathBuf},
};

use super::BuildId;
use crate::build::failure::Failure;

/// Why records can't be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum RecordsError {
    /// A file or directory of the records.
    #[error("can't {action} {}", path.display())]
    File {
        /// Verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Another process has the directory.
    #[error("{} is in use by {}; stop that first, or name another state directory", path.display(), holder(*.pid))]
    InUse {
        /// The directory.
        path: PathBuf,
        /// The process, as far as it is known.
        pid: Option<i32>,
    },
    /// The database.
    #[error("can't {action} the records in {}", path.display())]
    Database {
        /// Verb.
        action: &'static str,
        /// Its file.
        path: PathBuf,
        /// What redb said.
        #[source]
        source: Box<redb::Error>,
    },
    /// A newer program made them.
    #[error(
        "the records in {} have format {found}, this program knows those up to {known}; run the newer program, or name \
         another state directory", path.display()
    )]
    Newer {
        /// The database's file.
        path: PathBuf,
        /// Its format.
        found: u64,
        /// The greatest known one.
        known: u64,
    },
    /// What is stored is no record.
    #[error("the record of build {id} in {} is damaged", path.display())]
    Damaged {
        /// The build.
        id: BuildId,
        /// The database's file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A place in a log that it doesn't have.
    #[error("offset {offset} is beyond the end of the log of build {id}, which has {length} bytes")]
    BeyondEnd {
        /// The build.
        id: BuildId,
        /// What was asked for.
        offset: u64,
        /// The log's length.
        length: u64,
    },
    /// A log file has less in it than was written.
    #[error("the log of build {id} ends after {found} of {length} bytes")]
    LogCut {
        /// The build.
        id: BuildId,
        /// What is there.
        found: u64,
        /// What there should be.
        length: u64,
    },
}

impl From<&RecordsError> for Failure {
    fn from(error: &RecordsError) -> Self {
        let failure = match error {
            RecordsError::BeyondEnd { .. } => Self::wrong("beyond_end", error.to_string()),
            _ => Self::executor("records", error.to_string()),
        };
        failure.caused_by(error)
    }
}

pub(super) type Result<T, E = RecordsError> = std::result::Result<T, E>;

/// For `map_err`.
pub(super) fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RecordsError {
    move |source| RecordsError::File { action, path: path.to_owned(), source }
}

fn holder(pid: Option<i32>) -> String {
    pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
}
