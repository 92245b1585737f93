use std::{io, path::PathBuf};

use crate::{grpc::Peer, near, objectstore};

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
    /// A part of the address of a store elsewhere.
    #[error("the {part} {value:?} of {addr:?} {rule}")]
    Part {
        /// The address.
        addr: String,
        /// Which part.
        part: &'static str,
        /// The part.
        value: String,
        /// What is wrong with it, as in "does not start with a slash".
        rule: &'static str,
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

pub(crate) const BLOB_SCHEMES: &str = "\"memory://\", \"file:///directory\", \"objectstore+…\", \"near:///…\" and \"grpc+http://\", \"grpc+https://\" or \"grpc+unix:///\"";
pub(crate) const DIRECTORY_SCHEMES: &str = "\"memory://\", \"redb:///file\", \"objectstore+…\", \"near:///…\" and \"grpc+http://\", \"grpc+https://\" or \"grpc+unix:///\"";

pub(crate) const GRPC: &str = "grpc+";

/// `None` for `memory://`, else the path of the one scheme that has one.
pub(crate) fn parse(addr: &str, path_scheme: &'static str, known: &'static str) -> Result<Option<PathBuf>, AddrError> {
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

/// Whether each part of this address is what it should be, as far as that can be told without the store.
pub fn is_addr(addr: &str) -> bool {
    if addr.starts_with(objectstore::PREFIX) {
        objectstore::parse(addr).is_ok()
    } else if addr.starts_with(near::SCHEME) {
        near::parse(addr).is_ok_and(|near| is_addr(near.far))
    } else if addr.starts_with(GRPC) {
        Peer::is_addr(addr)
    } else {
        parse(addr, "file", BLOB_SCHEMES).is_ok() || parse(addr, "redb", DIRECTORY_SCHEMES).is_ok()
    }
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
    fn an_error_says_which_part_of_an_object_stores_address_is_wrong() {
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
