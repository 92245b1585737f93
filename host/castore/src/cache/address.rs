//! `cache:///directory?size=SIZE&write=through|back&remote=ADDRESS`
//!
//! The remote address comes last and is taken literally, so its own options need no escapes.

use std::{io, path::PathBuf};

use super::WritePolicy;
use crate::{AddrError, parse_size};

/// The beginning of a cache's address.
pub(crate) const SCHEME: &str = "cache://";

/// The size without `size=`.
const DEFAULT_MAX_BYTES: u64 = 20 << 30;

/// Directories get this fraction of the size in addition to the blobs, which may take all of it.
const DIRECTORIES_FRACTION: u64 = 16;

/// The parts of an address.
pub(crate) struct CacheAddress<'a> {
    pub(crate) dir: PathBuf,
    pub(crate) max_bytes: u64,
    pub(crate) policy: WritePolicy,
    pub(crate) remote: &'a str,
}

impl<'a> CacheAddress<'a> {
    pub(crate) fn parse(addr: &'a str) -> Result<Self, AddrError> {
        let rest = addr.strip_prefix(SCHEME).unwrap_or(addr);
        let (dir, mut options) = rest.split_once('?').unwrap_or((rest, ""));
        let wrong =
            |part, value: &str, rule| Err(AddrError::Part { addr: shown(dir), part, value: value.to_owned(), rule });
        if !dir.starts_with('/') {
            return wrong("directory", dir, "does not start with a slash");
        }
        let mut parsed =
            Self { dir: dir.into(), max_bytes: DEFAULT_MAX_BYTES, policy: WritePolicy::Through, remote: "" };
        while !options.is_empty() {
            if let Some(remote) = options.strip_prefix("remote=") {
                parsed.remote = remote;
                break;
            }
            let (option, others) = options.split_once('&').unwrap_or((options, ""));
            options = others;
            match option.split_once('=') {
                Some(("size", size)) => match parse_size(size) {
                    Ok(bytes) => parsed.max_bytes = bytes,
                    Err(_) => return wrong("size", size, "is not a size, as in 500M or 20G"),
                },
                Some(("write", "through")) => parsed.policy = WritePolicy::Through,
                Some(("write", "back")) => parsed.policy = WritePolicy::Back,
                Some(("write", policy)) => return wrong("write policy", policy, "is neither \"through\" nor \"back\""),
                _ => {
                    return wrong("option", option, "is not \"size=…\", \"write=…\" or, as the last one, \"remote=…\"");
                }
            }
        }
        if parsed.remote.is_empty() {
            return wrong("remote address", "", "is missing: end with \"remote=\" and the address of the remote store");
        }
        Ok(parsed)
    }

    /// Size limit of the directories.
    pub(crate) fn max_directory_bytes(&self) -> u64 {
        self.max_bytes / DIRECTORIES_FRACTION
    }

    pub(crate) fn not_opened(&self, source: io::Error) -> AddrError {
        AddrError::Open { addr: shown(&self.dir.to_string_lossy()), source }
    }
}

/// The address without its options: the remote address may hold secrets.
fn shown(dir: &str) -> String {
    format!("{SCHEME}{dir}")
}
