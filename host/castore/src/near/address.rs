//! `near:///directory?size=SIZE&write=through|back&far=ADDRESS`: the last option is the rest of the address as it is.

use std::{path::PathBuf, sync::Arc};

use super::{NearBlobService, NearDirectoryService, WritePolicy};
use crate::{
    AddrError,
    blobservice::{self, BlobService},
    directoryservice::{self, DirectoryService},
};

/// What the address of a near store begins with.
pub(crate) const SCHEME: &str = "near://";

/// The bound where none is given.
const DEFAULT_MAX_BYTES: u64 = 20 << 30;

/// Directories may take this part of the bound, beside the blobs, which may take all of it.
const DIRECTORIES_SHARE: u64 = 16;

pub(crate) struct Near<'a> {
    dir: PathBuf,
    max_bytes: u64,
    policy: WritePolicy,
    pub(crate) far: &'a str,
}

/// The blobs of a near store.
pub(crate) fn blob_service(addr: &str) -> Result<Arc<dyn BlobService>, AddrError> {
    let Near { dir, max_bytes, policy, far } = parse(addr)?;
    let far = blobservice::from_addr(far)?;
    let service = NearBlobService::open(&dir, max_bytes, policy, far);
    Ok(Arc::new(service.map_err(|source| AddrError::Open { addr: addr.to_owned(), source })?))
}

/// The directories of a near store.
pub(crate) fn directory_service(addr: &str) -> Result<Arc<dyn DirectoryService>, AddrError> {
    let Near { dir, max_bytes, policy, far } = parse(addr)?;
    let far = directoryservice::from_addr(far)?;
    let service = NearDirectoryService::open(&dir, max_bytes / DIRECTORIES_SHARE, policy, far);
    Ok(Arc::new(service.map_err(|source| AddrError::Open { addr: addr.to_owned(), source })?))
}

/// The parts of the address of a near store.
pub(crate) fn parse(addr: &str) -> Result<Near<'_>, AddrError> {
    let rest = addr.strip_prefix(SCHEME).unwrap_or(addr);
    let (dir, options) = rest.split_once('?').unwrap_or((rest, ""));
    // The far address may hold secrets.
    let wrong = |part, value: &str, rule| {
        Err(AddrError::Part { addr: format!("{SCHEME}{dir}"), part, value: value.to_owned(), rule })
    };
    if !dir.starts_with('/') {
        return wrong("directory", dir, "does not start with a slash");
    }
    let mut near = Near { dir: dir.into(), max_bytes: DEFAULT_MAX_BYTES, policy: WritePolicy::Through, far: "" };
    let mut rest = options;
    while !rest.is_empty() {
        if let Some(far) = rest.strip_prefix("far=") {
            near.far = far;
            break;
        }
        let (option, after) = rest.split_once('&').unwrap_or((rest, ""));
        rest = after;
        match option.split_once('=') {
            Some(("size", size)) => match parse_size(size) {
                Some(bytes) => near.max_bytes = bytes,
                None => return wrong("size", size, "is not a number of bytes, as in 500M or 20G"),
            },
            Some(("write", "through")) => near.policy = WritePolicy::Through,
            Some(("write", "back")) => near.policy = WritePolicy::Back,
            Some(("write", policy)) => return wrong("write policy", policy, "is neither \"through\" nor \"back\""),
            _ => return wrong("option", option, "is neither \"size=…\" nor \"write=…\" nor, as the last, \"far=…\""),
        }
    }
    if near.far.is_empty() {
        return wrong("far address", "", "is missing: end with \"far=\" and the address of the store behind this one");
    }
    Ok(near)
}

/// Bytes, with a binary unit or none.
fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|end: char| !end.is_ascii_digit());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        "T" | "TiB" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}
