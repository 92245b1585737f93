//! This user's state directory, and the store that is in it unless another one is named.

use std::{env, io, path::PathBuf};

use cofferdam_castore::{AddrError, LocalStore, Store};

/// Why there is no state directory, or no store.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// No environment variable names a directory.
    #[error("there is no place for the store")]
    NoPlace,
    /// The directory is relative, and the current directory can't be read.
    #[error("can't make the state directory's path absolute")]
    Relative(#[source] io::Error),
    /// Addresses of stores are text.
    #[error("the state directory's path {0:?} is not UTF-8")]
    NotUtf8(PathBuf),
    /// An address breaks a rule.
    #[error("the store's address is wrong")]
    Addr(#[source] AddrError),
    /// The store is there, and can't be opened.
    #[error("can't open the store")]
    Open(#[source] AddrError),
    /// The store's files can't be opened.
    #[error("can't open the store")]
    OpenLocal(#[source] io::Error),
}

impl StateError {
    /// Whether this host is at fault, and not the address or the environment.
    pub fn blames_host(&self) -> bool {
        matches!(self, Self::Open(_) | Self::OpenLocal(_))
    }

    /// What to do about it.
    pub fn advice(&self) -> Option<&'static str> {
        match self {
            Self::NoPlace => Some("set COFFERDAM_STATE_DIR, XDG_STATE_HOME or HOME"),
            Self::NotUtf8(_) => Some("name another one in COFFERDAM_STATE_DIR"),
            Self::Relative(_) | Self::Addr(_) | Self::Open(_) | Self::OpenLocal(_) => None,
        }
    }
}

/// `$COFFERDAM_STATE_DIR`, `$XDG_STATE_HOME/cofferdam` or `~/.local/state/cofferdam`: whichever is set first.
///
/// # Errors
///
/// None is set, or the path can't be made absolute.
pub(crate) fn state_dir() -> Result<PathBuf, StateError> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let state = set("COFFERDAM_STATE_DIR")
        .or_else(|| set("XDG_STATE_HOME").map(|home| home.join("cofferdam")))
        .or_else(|| env::home_dir().map(|home| home.join(".local/state/cofferdam")));
    std::path::absolute(state.ok_or(StateError::NoPlace)?).map_err(StateError::Relative)
}

/// The addresses of a store, as far as they are given. The rest is in the state directory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct StoreAddrs {
    /// Where blobs are.
    pub blobs: Option<String>,
    /// Where directories are.
    pub directories: Option<String>,
}

impl StoreAddrs {
    /// Both addresses.
    ///
    /// # Errors
    ///
    /// One is not given, and there is no state directory.
    pub(crate) fn resolve(&self) -> Result<(String, String), StateError> {
        let default = |scheme: &str, name: &str| {
            let path = state_dir()?.join("store").join(name);
            match path.to_str() {
                Some(text) => Ok(format!("{scheme}://{text}")),
                None => Err(StateError::NotUtf8(path)),
            }
        };
        let given = |addr: &Option<String>| addr.clone().filter(|addr| !addr.is_empty()).map(Ok);
        Ok((
            given(&self.blobs).unwrap_or_else(|| default("file", "blobs"))?,
            given(&self.directories).unwrap_or_else(|| default("redb", "directories.redb"))?,
        ))
    }

    /// These addresses, and those of `others` where one is not given.
    #[must_use]
    pub(crate) fn or(&self, others: &Self) -> Self {
        let first = |given: &Option<String>, other: &Option<String>| {
            given.clone().filter(|addr| !addr.is_empty()).or_else(|| other.clone())
        };
        Self { blobs: first(&self.blobs, &others.blobs), directories: first(&self.directories, &others.directories) }
    }

    /// The addresses of the store that a daemon serves.
    pub(crate) fn of_daemon(addr: &str) -> Self {
        Self { blobs: Some(addr.to_owned()), directories: Some(addr.to_owned()) }
    }

    /// Opens the store.
    ///
    /// # Errors
    ///
    /// See [`StateError`].
    pub(crate) fn open(&self) -> Result<Store, StateError> {
        let (blobs, directories) = self.resolve()?;
        Store::from_addrs(&blobs, &directories).map_err(addr_error)
    }

    /// Opens the store if its files are on this machine.
    ///
    /// # Errors
    ///
    /// See [`StateError`].
    pub(crate) fn open_local(&self) -> Result<Option<LocalStore>, StateError> {
        let (blobs, directories) = self.resolve()?;
        LocalStore::from_addr(&blobs, &directories).map_err(StateError::OpenLocal)
    }
}

fn addr_error(error: AddrError) -> StateError {
    match error {
        AddrError::Open { .. } => StateError::Open(error),
        _ => StateError::Addr(error),
    }
}
