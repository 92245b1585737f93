use std::{io, path::PathBuf, sync::Arc};

use crate::{
    BlobService, DirectoryService, LocalBlobService, MemoryBlobService, MemoryDirectoryService, RedbDirectoryService,
    Store,
};

/// Why an address names no store.
#[derive(Debug, thiserror::Error)]
pub enum AddrError {
    /// There is no `://`.
    #[error("{addr:?} has no scheme: write one of {known}")]
    NoScheme {
        /// The address.
        addr: String,
        /// What is understood.
        known: &'static str,
    },
    /// Another scheme.
    #[error("the scheme {scheme:?} of {addr:?} is not one of {known}")]
    Scheme {
        /// The address.
        addr: String,
        /// Its scheme.
        scheme: String,
        /// What is understood.
        known: &'static str,
    },
    /// `memory://` with something after it.
    #[error("{rest:?} in {addr:?}: nothing may follow \"memory://\"")]
    NotEmpty {
        /// The address.
        addr: String,
        /// What follows the scheme.
        rest: String,
    },
    /// A host, or a relative path.
    #[error("the path {path:?} of {addr:?} does not start with a slash: write \"{scheme}:///absolute/path\"")]
    Relative {
        /// The address.
        addr: String,
        /// Its scheme.
        scheme: &'static str,
        /// What follows the scheme.
        path: String,
    },
    /// The store can't be opened.
    #[error("the store at {addr:?} can't be opened")]
    Open {
        /// The address.
        addr: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

const BLOB_SCHEMES: &str = "\"memory://\" and \"file:///directory\"";
const DIRECTORY_SCHEMES: &str = "\"memory://\" and \"redb:///file\"";

/// The store of these two addresses.
///
/// # Errors
///
/// As [`blob_service_from_addr`] and [`directory_service_from_addr`].
pub fn from_addr(blobs: &str, directories: &str) -> Result<Store, AddrError> {
    Ok(Store { blobs: blob_service_from_addr(blobs)?, directories: directory_service_from_addr(directories)? })
}

/// The blob service of an address: `memory://`, or `file:///directory`, which is made when it is not there.
///
/// # Errors
///
/// Names the part of the address that is wrong, or why the store can't be opened.
pub fn blob_service_from_addr(addr: &str) -> Result<Arc<dyn BlobService>, AddrError> {
    match parse(addr, "file", BLOB_SCHEMES)? {
        None => Ok(Arc::new(MemoryBlobService::default())),
        Some(path) => match LocalBlobService::open(&path) {
            Ok(service) => Ok(Arc::new(service)),
            Err(source) => Err(AddrError::Open { addr: addr.to_owned(), source }),
        },
    }
}

/// The directory service of an address: `memory://`, or `redb:///file`, which is made when something is first put.
///
/// # Errors
///
/// Names the part of the address that is wrong, or why the store can't be opened.
pub fn directory_service_from_addr(addr: &str) -> Result<Arc<dyn DirectoryService>, AddrError> {
    match parse(addr, "redb", DIRECTORY_SCHEMES)? {
        None => Ok(Arc::new(MemoryDirectoryService::default())),
        Some(path) => match RedbDirectoryService::open(&path) {
            Ok(service) => Ok(Arc::new(service)),
            Err(source) => Err(AddrError::Open { addr: addr.to_owned(), source }),
        },
    }
}

/// `None` for `memory://`, else the path of the one scheme that has one.
fn parse(addr: &str, path_scheme: &'static str, known: &'static str) -> Result<Option<PathBuf>, AddrError> {
    let shown = || addr.to_owned();
    let (scheme, rest) = addr.split_once("://").ok_or_else(|| AddrError::NoScheme { addr: shown(), known })?;
    if scheme == "memory" {
        return if rest.is_empty() {
            Ok(None)
        } else {
            Err(AddrError::NotEmpty { addr: shown(), rest: rest.to_owned() })
        };
    }
    if scheme != path_scheme {
        return Err(AddrError::Scheme { addr: shown(), scheme: scheme.to_owned(), known });
    }
    if !rest.starts_with('/') {
        return Err(AddrError::Relative { addr: shown(), scheme: path_scheme, path: rest.to_owned() });
    }
    Ok(Some(rest.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(addr: &str) -> String {
        blob_service_from_addr(addr).err().unwrap().to_string()
    }

    #[test]
    fn an_error_says_which_part_is_wrong() {
        assert!(refused("/var/store").contains("no scheme"));
        assert!(refused("redb:///store").contains("the scheme \"redb\""));
        assert!(refused("memory://x").contains("\"x\" in"));
        assert!(refused("file://store").contains("does not start with a slash"));
        assert!(refused("file:///dev/null").contains("can't be opened"));
        let error = directory_service_from_addr("file:///store").err().unwrap();
        assert!(error.to_string().contains("redb:///file"));
    }

    #[test]
    fn the_addresses_of_stores_open_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        assert!(from_addr("memory://", "memory://").is_ok());
        assert!(from_addr(&format!("file://{path}/a/blobs"), &format!("redb://{path}/b/directories.redb")).is_ok());
    }
}
