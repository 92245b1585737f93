use std::sync::Arc;

use super::{DirectoryService, MemoryDirectoryService, ObjectStoreDirectoryService, RedbDirectoryService};
use crate::{
    AddrError, addr,
    grpc::{GrpcDirectoryService, Peer, PeerOptions},
    near, objectstore,
};

/// The directory service of an address: `memory://`, `redb:///file`, which is made when something is first put, the URL of
/// an object store after `objectstore+`, a near store, or one over gRPC, see
/// [`blobservice::from_addr`](crate::blobservice::from_addr).
///
/// # Errors
///
/// Names the part of the address that is wrong, or why the store can't be opened.
pub fn from_addr(addr: &str) -> Result<Arc<dyn DirectoryService>, AddrError> {
    if addr.starts_with(objectstore::PREFIX) {
        return Ok(Arc::new(ObjectStoreDirectoryService::new(objectstore::open(addr)?.into())));
    }
    if addr.starts_with(near::SCHEME) {
        return near::directory_service(addr);
    }
    if addr.starts_with(addr::GRPC) && addr.contains("://") {
        return Ok(Arc::new(GrpcDirectoryService::new(Peer::from_addr(addr, &PeerOptions::default())?)));
    }
    match addr::parse(addr, "redb", addr::DIRECTORY_SCHEMES)? {
        None => Ok(Arc::new(MemoryDirectoryService::default())),
        Some(path) => match RedbDirectoryService::open(&path) {
            Ok(service) => Ok(Arc::new(service)),
            Err(source) => Err(AddrError::Open { addr: addr.to_owned(), source }),
        },
    }
}
