//! The store as each of its tenants sees it.
//!
//! ```text
//!   Put, outputs of a build ─▶ view ─▶ the store, and then Grants: the tenant has this
//!   Stat, Get, inputs       ─▶ view ─▶ granted to the tenant, or shared? ── no ──▶ absent
//!                                                  └─ yes ─▶ the store
//! ```
//!
//! Digests can be guessed, so a store that answers everybody tells who has what. In a view, what the tenant has no grant for is
//! absent, and the store isn't asked, so that the answer takes the same time whether another tenant has it or not.
//!
//! - A blob is granted when all of it came and its digest was computed from it, even if the store had it already.
//! - A directory is granted when it was put with all directories below it. The blobs that it names are granted only by their
//!   own puts.
//! - What a build made is granted to its tenants.
//! - What a collection has removed is granted to nobody, even if somebody puts it again.
//!
//! A store on another host may drop what it likes; grants don't notice that. Its time to answer is its own: only a store in local
//! files takes the same time to write a blob that it has and one that it lacks.

mod blobs;
mod directories;
mod grants;
#[cfg(test)]
mod tests;

use std::{collections::HashSet, fmt, io, sync::Arc};

use futures::TryStreamExt as _;
use parking_lot::RwLock;

pub use self::grants::{Grants, Usage};
use self::{blobs::ViewBlobService, directories::ViewDirectoryService, grants::Object};
use crate::{B3Digest, Node, Store, blobservice::Kind, directoryservice::DirectoryMemory};

/// So many objects are granted in one transaction, with those of one more directory. A larger tree takes several.
const MAX_OBJECTS: usize = 1 << 16;

/// Blobs and directories that all tenants see.
pub type Shared = HashSet<(Kind, B3Digest)>;

/// A store, and what its tenants see of it.
#[derive(Clone)]
pub struct Views {
    store: Store,
    divided: Option<Arc<Divided>>,
}

#[derive(Debug)]
struct Divided {
    grants: Arc<Grants>,
    shared: RwLock<Arc<Shared>>,
}

impl fmt::Debug for Views {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Views").field("divided", &self.divided).finish_non_exhaustive()
    }
}

impl Views {
    /// Everybody sees the whole store.
    pub fn whole(store: Store) -> Self {
        Self { store, divided: None }
    }

    /// Each tenant sees what it has been granted, and what is shared.
    pub fn divided(store: Store, grants: Arc<Grants>) -> Self {
        Self { store, divided: Some(Arc::new(Divided { grants, shared: RwLock::default() })) }
    }

    /// Whether tenants see different things.
    pub fn are_divided(&self) -> bool {
        self.divided.is_some()
    }

    /// What a tenant has been granted; `None` if everybody sees the whole store.
    ///
    /// # Errors
    ///
    /// The grants can't be read.
    pub fn usage(&self, tenant: &str) -> io::Result<Option<Usage>> {
        self.divided.as_ref().map(|divided| divided.grants.usage(tenant)).transpose()
    }

    /// What each tenant has been granted, by name. Empty if everybody sees the whole store.
    ///
    /// # Errors
    ///
    /// The grants can't be read.
    pub fn usages(&self) -> io::Result<Vec<(String, Usage)>> {
        self.divided.as_ref().map_or_else(|| Ok(Vec::new()), |divided| divided.grants.usages())
    }

    /// Makes all grants durable. Otherwise that takes a second.
    ///
    /// # Errors
    ///
    /// They can't be written.
    pub fn flush(&self) -> io::Result<()> {
        self.divided.as_ref().map_or(Ok(()), |divided| divided.grants.flush())
    }

    /// Shows these to all tenants, instead of those that were shared before.
    pub fn share(&self, shared: Shared) {
        if let Some(divided) = &self.divided {
            *divided.shared.write() = Arc::new(shared);
        }
    }

    /// The store as a tenant sees it. What is written through it is granted to the tenant.
    pub fn of(&self, tenant: &str) -> Store {
        let Some(divided) = &self.divided else { return self.store.clone() };
        let (blobs, directories) = self.services(divided, tenant);
        Store { blobs: Arc::new(blobs), directories: Arc::new(directories) }
    }

    fn services(&self, divided: &Arc<Divided>, tenant: &str) -> (ViewBlobService, ViewDirectoryService) {
        let view = Arc::new(View { divided: Arc::clone(divided), tenant: tenant.to_owned() });
        let Store { blobs, directories } = self.store.clone();
        (ViewBlobService::new(blobs, view.clone()), ViewDirectoryService { directories, view })
    }

    /// Grants these nodes and everything below them to a tenant, durably. Each directory is dropped before the next ones are
    /// read, so that `memory` is needed for a part of the tree at a time.
    ///
    /// # Errors
    ///
    /// A directory is missing or doesn't fit into `memory`, or the store or the grants failed. Some of it may have been granted.
    pub async fn grant(&self, tenant: &str, nodes: &[Node], memory: &DirectoryMemory) -> io::Result<()> {
        let Some(divided) = &self.divided else { return Ok(()) };
        let mut objects: HashSet<_> = nodes.iter().filter_map(blob).collect();
        for node in nodes {
            let Node::Directory { digest: root, .. } = node else { continue };
            let mut directories = self.store.directories.get_recursive_within(root, memory);
            let mut is_there = false;
            while let Some(directory) = directories.try_next().await? {
                is_there = true;
                let encoded = directory.encode();
                objects.insert(Object::directory(&encoded));
                objects.extend(directory.nodes().filter_map(|(_, node)| blob(node)));
                memory.give_back(encoded.len(), directory.len());
                if objects.len() >= MAX_OBJECTS {
                    divided.grants.add(tenant, objects.drain().collect(), false)?;
                }
            }
            if !is_there {
                let message = format!("the directory {root} is not in the store");
                return Err(io::Error::new(io::ErrorKind::NotFound, message));
            }
        }
        divided.grants.add(tenant, objects.into_iter().collect(), true)
    }
}

fn blob(node: &Node) -> Option<Object> {
    match node {
        Node::File { digest, size, .. } if *digest != B3Digest::EMPTY => {
            Some(Object { kind: Kind::Blob, digest: *digest, bytes: *size })
        }
        _ => None,
    }
}

impl Object {
    fn directory(encoded: &[u8]) -> Self {
        Self { kind: Kind::Directory, digest: B3Digest::of(encoded), bytes: encoded.len() as u64 }
    }
}

/// What one tenant sees.
#[derive(Debug)]
struct View {
    divided: Arc<Divided>,
    tenant: String,
}

impl View {
    fn shows(&self, kind: Kind, digest: &B3Digest) -> io::Result<bool> {
        let is_shared = self.divided.shared.read().contains(&(kind, *digest));
        Ok(is_shared || self.divided.grants.has(&self.tenant, kind, digest)?)
    }

    fn grant(&self, objects: Vec<Object>, durably: bool) -> io::Result<()> {
        self.divided.grants.add(&self.tenant, objects, durably)
    }
}

/// A store as a tenant sees it, with grants in this file.
#[cfg(test)]
pub(crate) fn viewed(
    store: Store,
    grants: &std::path::Path,
) -> (Box<dyn crate::BlobService>, Box<dyn crate::DirectoryService>) {
    let views = Views::divided(store, Grants::open(grants, None).unwrap());
    let (blobs, directories) = views.services(views.divided.as_ref().unwrap(), "tenant");
    (Box::new(blobs), Box::new(directories))
}
