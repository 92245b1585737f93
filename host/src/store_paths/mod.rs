//! The store paths of Nix that each client has: what Nix knows of them, and their nodes.
//!
//! ```text
//!   paths.redb   paths: (client, base name) → node, PathInfo
//!                logs: (client, base name of a derivation) → id of its latest build
//!                realisations: (client, id of an output) → path
//!       │ what a path is
//!       ▼
//!   the store    its bytes, shared by all clients
//! ```
//!
//! Each client has a name space of its own. A store path names its inputs rather than its contents, so whoever registers one
//! decides what it is. In a common name space one client could give another one a path of its own making.
//!
//! A path is valid while the store has it and everything that it refers to. After a garbage collection of the daemon, the paths
//! are removed whose contents are gone: the client uploads or builds them again.

mod collection;
mod logs;
mod realisations;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use cofferdam_castore::{
    Node, Store,
    proto::{Entry, EntryExt as _},
    reopening::Reopening,
};
use cofferdam_nix::{PathInfo, StorePath};
use cofferdam_rpc::Client;
use futures::executor::block_on;
use prost::Message as _;
use redb::{Builder, Database, ReadableDatabase as _, TableDefinition};
use serde::{Deserialize, Serialize};

/// The format of the table's values.
const FORMAT: u64 = 1;

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const PATHS: TableDefinition<'_, (&str, &str), &[u8]> = TableDefinition::new("paths");

const CACHE_BYTES: usize = 16 * 1024 * 1024;

/// Why the paths can't be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StorePathsError {
    /// The database can't be used.
    #[error("can't {action} the store paths in {}", path.display())]
    Database {
        /// What was tried, as a verb.
        action: &'static str,
        /// Its file.
        path: PathBuf,
        /// redb's answer.
        #[source]
        source: Box<redb::Error>,
    },
    /// A newer version of this program made the database.
    #[error("the store paths in {} have format {found}, and this program knows {FORMAT}", path.display())]
    Newer {
        /// Its file.
        path: PathBuf,
        /// Its format.
        found: u64,
    },
    /// A path's entry can't be decoded.
    #[error("the entry of {path} is damaged")]
    Damaged {
        /// The path.
        path: StorePath,
    },
    /// A path's node can't be looked for.
    #[error("can't look for {path} in the store")]
    Store {
        /// The path.
        path: StorePath,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A client has no room for more realisations.
    #[error("the realisations of {client} must take at most {limit} bytes")]
    Full {
        /// The client.
        client: String,
        /// The bytes.
        limit: u64,
    },
    /// The directory can't be made.
    #[error("can't make {}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

type Result<T, E = StorePathsError> = std::result::Result<T, E>;

/// A path that a client has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Known {
    /// What it is.
    pub node: Node,
    /// What Nix knows of it.
    pub info: PathInfo,
}

#[derive(Serialize, Deserialize)]
struct Value {
    /// An unnamed `Entry`.
    node: Vec<u8>,
    info: PathInfo,
}

/// All clients' paths. Its methods block.
#[derive(Debug)]
pub(crate) struct StorePaths {
    database: Reopening,
}

impl StorePaths {
    /// Opens the database in this directory, or creates both.
    ///
    /// # Errors
    ///
    /// They can't be used.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|source| StorePathsError::Directory { path: dir.to_owned(), source })?;
        let file = dir.join("paths.redb");
        let opened = Reopening::new(file.clone(), builder, |write| {
            write.open_table(PATHS)?;
            write.open_table(logs::LOGS)?;
            write.open_table(realisations::REALISATIONS)?;
            write.open_table(realisations::BYTES)?;
            write.open_table(META)?.insert("format", FORMAT)?;
            Ok(())
        });
        let database = opened.map_err(|error| failed("make", &file, error))?;
        let format = |database: &Database| {
            Ok(database.begin_read()?.open_table(META)?.get("format")?.map(|format| format.value()))
        };
        match database.with(format).map_err(|error| failed("open", &file, error))? {
            Some(FORMAT) => Ok(Self { database }),
            Some(found) => Err(StorePathsError::Newer { path: file, found }),
            None => Err(failed("open", &file, redb::Error::Corrupted("its format is missing".to_owned()))),
        }
    }

    /// Registers paths of a client, all or none. What was known of them before is forgotten.
    ///
    /// # Errors
    ///
    /// They can't be written.
    pub(crate) fn register(&self, client: &Client, paths: &[(StorePath, Known)]) -> Result<()> {
        let client = client.to_string();
        self.with("write", |database| {
            let write = database.begin_write()?;
            {
                let mut table = write.open_table(PATHS)?;
                for (path, Known { node, info }) in paths {
                    let value = Value { node: Entry::unnamed(node.clone()).encode_to_vec(), info: info.clone() };
                    let value = postcard::to_stdvec(&value).expect("memory has room");
                    table.insert((client.as_str(), path.base_name()), value.as_slice())?;
                }
            }
            Ok(write.commit()?)
        })
    }

    /// Forgets paths of a client, whose contents stay until they are collected.
    ///
    /// # Errors
    ///
    /// They can't be written.
    pub(crate) fn forget(&self, client: &Client, paths: &BTreeSet<StorePath>) -> Result<()> {
        let client = client.to_string();
        self.with("write", |database| {
            let write = database.begin_write()?;
            for path in paths {
                write.open_table(PATHS)?.remove((client.as_str(), path.base_name()))?;
            }
            Ok(write.commit()?)
        })
    }

    /// Those of these paths that a client has registered, and everything that they refer to. Their contents may be gone.
    ///
    /// # Errors
    ///
    /// They can't be read.
    pub(crate) fn registered(
        &self,
        client: &Client,
        paths: &BTreeSet<StorePath>,
    ) -> Result<BTreeMap<StorePath, Known>> {
        let mut found: BTreeMap<StorePath, Known> = BTreeMap::new();
        let mut seen = paths.clone();
        let mut left: Vec<_> = paths.iter().cloned().collect();
        while let Some(path) = left.pop() {
            let Some(known) = self.stored(client, &path)? else { continue };
            left.extend(known.info.references.iter().filter(|reference| seen.insert((*reference).clone())).cloned());
            found.insert(path, known);
        }
        Ok(found)
    }

    /// Those of these paths that are valid for a client, and everything that they refer to.
    ///
    /// # Errors
    ///
    /// They can't be read.
    pub(crate) fn closure(
        &self,
        client: &Client,
        store: &Store,
        paths: &BTreeSet<StorePath>,
    ) -> Result<BTreeMap<StorePath, Known>> {
        valid(store, self.registered(client, paths)?)
    }

    /// A path, if it is valid for a client.
    ///
    /// # Errors
    ///
    /// It can't be read.
    pub(crate) fn get(&self, client: &Client, store: &Store, path: &StorePath) -> Result<Option<Known>> {
        Ok(self.closure(client, store, &BTreeSet::from([path.clone()]))?.remove(path))
    }

    /// The path of a client with this hash part, if it is valid.
    ///
    /// # Errors
    ///
    /// It can't be read.
    pub(crate) fn with_hash_part(
        &self,
        client: &Client,
        store: &Store,
        hash_part: &str,
    ) -> Result<Option<(StorePath, Known)>> {
        let client_text = client.to_string();
        let first = self.with("read", |database| {
            let table = database.begin_read()?.open_table(PATHS)?;
            let mut range = table.range((client_text.as_str(), hash_part)..)?;
            let Some(entry) = range.next() else { return Ok(None) };
            let (key, _) = entry?;
            let (owner, name) = key.value();
            Ok((owner == client_text && name.starts_with(hash_part)).then(|| name.to_owned()))
        })?;
        let Some(path) = first.and_then(|name| StorePath::from_base_name(&name).ok()) else { return Ok(None) };
        Ok(self.get(client, store, &path)?.map(|known| (path, known)))
    }

    fn stored(&self, client: &Client, path: &StorePath) -> Result<Option<Known>> {
        let client = client.to_string();
        let value = self.with("read", |database| {
            let table = database.begin_read()?.open_table(PATHS)?;
            Ok(table.get((client.as_str(), path.base_name()))?.map(|value| value.value().to_vec()))
        })?;
        let Some(value) = value else { return Ok(None) };
        decode(&value).map(Some).ok_or_else(|| StorePathsError::Damaged { path: path.clone() })
    }

    fn with<T>(&self, action: &'static str, work: impl Fn(&Database) -> Result<T, redb::Error>) -> Result<T> {
        self.database.with(work).map_err(|error| failed(action, self.database.path(), error))
    }
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_BYTES);
    builder
}

fn decode(value: &[u8]) -> Option<Known> {
    let Value { node, info } = postcard::from_bytes(value).ok()?;
    let node = Entry::decode(&*node).ok()?.try_into_unnamed().ok()?;
    Some(Known { node, info })
}

/// Those of these paths that the store has, with everything that they refer to.
///
/// # Errors
///
/// The store failed.
pub(crate) fn valid(store: &Store, mut found: BTreeMap<StorePath, Known>) -> Result<BTreeMap<StorePath, Known>> {
    let mut gone = Vec::new();
    for (path, known) in &found {
        let is_whole = known.info.references.iter().all(|reference| found.contains_key(reference));
        if !is_whole
            || !is_there(store, &known.node).map_err(|source| StorePathsError::Store { path: path.clone(), source })?
        {
            gone.push(path.clone());
        }
    }
    while !gone.is_empty() {
        for path in gone.drain(..) {
            found.remove(&path);
        }
        // What refers to something that is missing is not valid.
        let is_whole = |known: &Known| known.info.references.iter().all(|reference| found.contains_key(reference));
        gone.extend(found.iter().filter(|(_, known)| !is_whole(known)).map(|(path, _)| path.clone()));
    }
    Ok(found)
}

fn failed(action: &'static str, file: &Path, source: redb::Error) -> StorePathsError {
    StorePathsError::Database { action, path: file.to_owned(), source: Box::new(source) }
}

/// Whether the store has a node. A garbage collection removes a tree's root first, and keeps what is below every root.
pub(crate) fn is_there(store: &Store, node: &Node) -> io::Result<bool> {
    match node {
        Node::File { digest, .. } => block_on(store.blobs.has(digest)),
        Node::Directory { digest, .. } => Ok(block_on(store.directories.get(digest))?.is_some()),
        Node::Symlink { .. } => Ok(true),
    }
}
