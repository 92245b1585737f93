use std::{
    io,
    path::{Path, PathBuf},
};

use super::BuildId;
use crate::build::failure::Failure;

/// Why records can't be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum RecordsError {
    /// A file or directory can't be used.
    #[error("can't {action} {}", path.display())]
    File {
        /// The attempted action, as a verb.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Another process has the directory open.
    #[error("{} is in use by {}; stop it first, or use another state directory", path.display(), holder(*.pid))]
    InUse {
        /// The directory.
        path: PathBuf,
        /// The process's id, if it is known.
        pid: Option<i32>,
    },
    /// The database can't be used.
    #[error("can't {action} the records in {}", path.display())]
    Database {
        /// What was tried, as a verb.
        action: &'static str,
        /// Its file.
        path: PathBuf,
        /// redb's answer.
        #[source]
        source: Box<redb::Error>,
    },
    /// A newer version of this program made the records.
    #[error(
        "the records in {} have format {found}, this program knows those up to {known}; run the newer program, or name \
         another state directory", path.display()
    )]
    Newer {
        /// The database's file.
        path: PathBuf,
        /// Its format.
        found: u64,
        /// The newest format that this version knows.
        known: u64,
    },
    /// A stored record can't be decoded.
    #[error("the record of build {id} in {} is damaged", path.display())]
    Damaged {
        /// The build.
        id: BuildId,
        /// The database's file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// An offset beyond the end of a log.
    #[error("offset {offset} is beyond the end of the log of build {id}, which has {length} bytes")]
    BeyondEnd {
        /// The build.
        id: BuildId,
        /// The offset.
        offset: u64,
        /// The log's length.
        length: u64,
    },
    /// A log file is too short.
    #[error("the log of build {id} ends after {found} of {length} bytes")]
    LogCut {
        /// The build.
        id: BuildId,
        /// The length of the file.
        found: u64,
        /// The length that was written.
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

/// Makes a [`RecordsError::File`] of an I/O error.
pub(super) fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RecordsError {
    move |source| RecordsError::File { action, path: path.to_owned(), source }
}

fn holder(pid: Option<i32>) -> String {
    pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
}
