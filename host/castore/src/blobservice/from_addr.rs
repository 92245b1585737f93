use std::sync::Arc;

use super::{BlobService, LocalBlobService, MemoryBlobService, ObjectStoreBlobService};
use crate::{
    AddrError, addr,
    grpc::{GrpcBlobService, Peer, PeerOptions},
    near, objectstore,
};

/// The blob service of an address: `memory://`, `file:///directory`, which is made when it is not there, or the URL of an
/// object store after `objectstore+`, as in `objectstore+s3://bucket/path?region=…`.
///
/// `near:///directory?size=20G&write=through&far=ADDRESS` is a store in that directory in front of the one of that
/// address, see [`NearBlobService`](super::NearBlobService). Its directories have the same address. For one over gRPC see
/// [`Peer::from_addr`].
///
/// # Errors
///
/// Names the part of the address that is wrong, or why the store can't be opened.
pub fn from_addr(addr: &str) -> Result<Arc<dyn BlobService>, AddrError> {
    if addr.starts_with(objectstore::PREFIX) {
        return Ok(Arc::new(ObjectStoreBlobService::new(objectstore::open(addr)?.into())));
    }
    if addr.starts_with(near::SCHEME) {
        return near::blob_service(addr);
    }
    if addr.starts_with(addr::GRPC) && addr.contains("://") {
        return Ok(Arc::new(GrpcBlobService::new(Peer::from_addr(addr, &PeerOptions::default())?)));
    }
    match addr::parse(addr, "file", addr::BLOB_SCHEMES)? {
        None => Ok(Arc::new(MemoryBlobService::default())),
        Some(path) => match LocalBlobService::open(&path) {
            Ok(service) => Ok(Arc::new(service)),
            Err(source) => Err(AddrError::Open { addr: addr.to_owned(), source }),
        },
    }
}
