//! Opens the store of an address.

use std::{path::PathBuf, sync::Arc};

use crate::{
    AddrError,
    blobservice::{BlobService, LocalBlobService, MemoryBlobService},
    cache::{self, CacheAddress, CacheBlobService, CacheDirectoryService},
    directoryservice::{DirectoryService, MemoryDirectoryService, RedbDirectoryService},
    grpc::{GrpcBlobService, GrpcDirectoryService, Peer, PeerOptions},
    objectstore::{self, ObjectStoreBlobService, ObjectStoreDirectoryService},
};

const BLOB_SCHEMES: &str = "\"memory://\", \"file:///directory\", \"objectstore+…\", \"cache:///…\" and \"grpc+http://\", \"grpc+https://\" or \"grpc+unix:///\"";
const DIRECTORY_SCHEMES: &str = "\"memory://\", \"redb:///file\", \"objectstore+…\", \"cache:///…\" and \"grpc+http://\", \"grpc+https://\" or \"grpc+unix:///\"";

const GRPC: &str = "grpc+";

/// Opens the blob service of an address.
///
/// | address | service |
/// |---|---|
/// | `memory://` | in memory, empty |
/// | `file:///directory` | plain files; the directory is created if it is missing |
/// | `objectstore+URL` | an object store, as in `objectstore+s3://bucket/path?region=…` |
/// | `cache:///directory?size=20G&write=through&remote=ADDRESS` | a cache in front of the store of that address, see [`CacheBlobService`] |
/// | `grpc+http://…`, `grpc+https://…`, `grpc+unix:///…` | over gRPC, see [`Peer::from_addr`] |
///
/// # Errors
///
/// Names the part of the address that is wrong, or why the store can't be opened.
///
/// ```
/// # use cofferdam_castore::blobservice;
/// assert!(blobservice::from_addr("memory://").is_ok());
/// let error = blobservice::from_addr("file://relative/path").err().unwrap();
/// assert!(error.to_string().contains("does not start with a slash"));
/// ```
pub fn blob_service(addr: &str) -> Result<Arc<dyn BlobService>, AddrError> {
    if addr.starts_with(objectstore::PREFIX) {
        return Ok(Arc::new(ObjectStoreBlobService::new(objectstore::open(addr)?.into())));
    }
    if addr.starts_with(cache::SCHEME) {
        let cache = CacheAddress::parse(addr)?;
        let remote = blob_service(cache.remote)?;
        let opened = CacheBlobService::open(&cache.dir, cache.max_bytes, cache.policy, remote);
        return Ok(Arc::new(opened.map_err(|source| cache.not_opened(source))?));
    }
    if addr.starts_with(GRPC) && addr.contains("://") {
        return Ok(Arc::new(GrpcBlobService::new(Peer::from_addr(addr, &PeerOptions::default())?)));
    }
    match parse(addr, "file", BLOB_SCHEMES)? {
        None => Ok(Arc::new(MemoryBlobService::default())),
        Some(path) => match LocalBlobService::open(&path) {
            Ok(service) => Ok(Arc::new(service)),
            Err(source) => Err(AddrError::Open { addr: addr.to_owned(), source }),
        },
    }
}

/// Opens the directory service of an address: `redb:///file`, which is created when the first directory is put, or an
/// address that [`blobservice::from_addr`](crate::blobservice::from_addr) takes, other than `file:///…`.
///
/// # Errors
///
/// Names the part of the address that is wrong, or why the store can't be opened.
pub fn directory_service(addr: &str) -> Result<Arc<dyn DirectoryService>, AddrError> {
    if addr.starts_with(objectstore::PREFIX) {
        return Ok(Arc::new(ObjectStoreDirectoryService::new(objectstore::open(addr)?.into())));
    }
    if addr.starts_with(cache::SCHEME) {
        let cache = CacheAddress::parse(addr)?;
        let remote = directory_service(cache.remote)?;
        let opened = CacheDirectoryService::open(&cache.dir, cache.max_directory_bytes(), cache.policy, remote);
        return Ok(Arc::new(opened.map_err(|source| cache.not_opened(source))?));
    }
    if addr.starts_with(GRPC) && addr.contains("://") {
        return Ok(Arc::new(GrpcDirectoryService::new(Peer::from_addr(addr, &PeerOptions::default())?)));
    }
    match parse(addr, "redb", DIRECTORY_SCHEMES)? {
        None => Ok(Arc::new(MemoryDirectoryService::default())),
        Some(path) => match RedbDirectoryService::open(&path) {
            Ok(service) => Ok(Arc::new(service)),
            Err(source) => Err(AddrError::Open { addr: addr.to_owned(), source }),
        },
    }
}

/// Whether an address is well-formed, as far as that can be told without opening the store.
pub fn is_addr(addr: &str) -> bool {
    if addr.starts_with(objectstore::PREFIX) {
        objectstore::parse(addr).is_ok()
    } else if addr.starts_with(cache::SCHEME) {
        CacheAddress::parse(addr).is_ok_and(|cache| is_addr(cache.remote))
    } else if addr.starts_with(GRPC) {
        Peer::is_addr(addr)
    } else {
        parse(addr, "file", BLOB_SCHEMES).is_ok() || parse(addr, "redb", DIRECTORY_SCHEMES).is_ok()
    }
}

/// The path on this host below which the store of an address keeps its contents: that of a `file`, `redb` or `cache` store.
pub fn local_path(addr: &str) -> Option<PathBuf> {
    if addr.starts_with(cache::SCHEME) {
        return CacheAddress::parse(addr).ok().map(|cache| cache.dir);
    }
    ["file://", "redb://"].iter().find_map(|scheme| addr.strip_prefix(scheme)).map(Into::into)
}

/// The path of an address with the scheme `path_scheme`; `None` for `memory://`.
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
    use crate::{Store, blobservice, directoryservice};

    fn refused(addr: &str) -> String {
        blobservice::from_addr(addr).err().unwrap().to_string()
    }

    #[test]
    fn an_error_says_which_part_is_wrong() {
        assert!(refused("/var/store").contains("no scheme"));
        assert!(refused("redb:///store").contains("the scheme \"redb\""));
        assert!(refused("memory://x").contains("\"x\" in"));
        assert!(refused("file://store").contains("does not start with a slash"));
        assert!(refused("file:///dev/null").contains("can't be opened"));
        assert!(refused("grpc+ftp://host").contains("the scheme \"grpc+ftp\""));
        assert!(refused("grpc+http://").contains("the host and port \"\""));
        assert!(refused("grpc+http://:80").contains("the host and port \":80\""));
        assert!(refused("grpc+http://host:port").contains("the host and port \"host:port\""));
        assert!(refused("grpc+https://user@host").contains("hold a user"));
        assert!(refused("grpc+http://host:1/path").contains("the path \"path\""));
        assert!(refused("grpc+http://host:1?wait=1").contains("the query \"wait=1\""));
        assert!(refused("grpc+unix://host/sock").contains("the path \"host/sock\""));
        assert!(refused("grpc+unix:///not/there?wait-connect=1").contains("can't be opened"));
        let error = directoryservice::from_addr("file:///store").err().unwrap();
        assert!(error.to_string().contains("redb:///file"));
    }

    #[test]
    fn errors_name_the_wrong_part_of_an_object_stores_address() {
        for (addr, part) in [
            ("objectstore+ftp://host/p", "the scheme \"objectstore+ftp\""),
            ("objectstore+file", "the URL \"file\""),
            ("objectstore+file://host/p", "the host \"host\""),
            ("objectstore+s3:///p", "the host \"\" of \"objectstore+s3:///p\" is missing"),
            ("objectstore+https://host:port/p", "the URL \"https://host:port/p\""),
            ("objectstore+file:///p#fragment", "the fragment \"fragment\""),
            ("objectstore+file:///a//b", "the path \"/a//b\""),
            ("objectstore+s3://bucket/p?regoin=x", "the option \"regoin\""),
            ("objectstore+file:///p?region=x", "the option \"region\""),
        ] {
            for error in [blobservice::from_addr(addr).err().unwrap(), directoryservice::from_addr(addr).err().unwrap()]
            {
                assert!(error.to_string().contains(part), "{addr}: {error}");
            }
        }
        let error = refused("objectstore+s3://bucket/p?aws_secret_access_key=secret&x=y");
        assert!(error.contains("the option \"x\"") && !error.contains("secret"), "{error}");
    }

    #[test]
    fn the_addresses_of_object_stores_open_them() {
        for addr in [
            "objectstore+memory:///",
            "objectstore+file:///tmp/some%20where",
            "objectstore+s3://bucket/path?region=eu-north-1&endpoint=http://localhost:1&allow_http=true",
            "objectstore+gs://bucket/path?google_skip_signature=true",
            "objectstore+az://container/path?account_name=a&azure_skip_signature=true",
            "objectstore+http://localhost:1/path?allow_http=true",
            "objectstore+https://localhost:1/path",
        ] {
            Store::from_addrs(addr, addr).unwrap_or_else(|error| panic!("{addr}: {error:?}"));
        }
    }

    #[test]
    fn the_addresses_of_stores_open_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        assert!(Store::from_addrs("memory://", "memory://").is_ok());
        assert!(
            Store::from_addrs(&format!("file://{path}/a/blobs"), &format!("redb://{path}/b/directories.redb")).is_ok()
        );
        assert!(Store::from_addrs("grpc+http://localhost:1", "grpc+https://[::1]:1/?wait-connect=0").is_ok());
        assert!(Store::from_addrs("grpc+unix:///not/there/yet", "grpc+http://localhost").is_ok());
    }
}
