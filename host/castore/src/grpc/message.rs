//! Encodes and decodes `Directory` messages. Their entries are counted before they are decoded.

use cofferdam_proto::EncodedDirectory;

use super::MAX_DIRECTORY_ENTRIES;
use crate::{
    Directory,
    directory::MAX_DIRECTORY_BYTES,
    proto::{self, count_entries},
};

/// Why a directory can't be sent or received over gRPC.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DirectoryMessageError {
    #[error("the directory has {0} entries; the limit over gRPC is {MAX_DIRECTORY_ENTRIES}")]
    Entries(usize),
    #[error("the directory has {0} bytes; the limit over gRPC is {MAX_DIRECTORY_BYTES}")]
    Bytes(usize),
    #[error(transparent)]
    Decode(#[from] proto::DecodeError),
}

/// Encodes a directory that is within the limits.
pub(super) fn encode(directory: &Directory) -> Result<EncodedDirectory, DirectoryMessageError> {
    if directory.len() > MAX_DIRECTORY_ENTRIES {
        return Err(DirectoryMessageError::Entries(directory.len()));
    }
    let encoded = directory.encode();
    if encoded.len() > MAX_DIRECTORY_BYTES {
        return Err(DirectoryMessageError::Bytes(encoded.len()));
    }
    Ok(encoded.into())
}

/// Decodes and validates a directory that is within the limits.
pub(crate) fn decode_checked(message: &EncodedDirectory) -> Result<Directory, DirectoryMessageError> {
    let entries = count_entries(message.as_bytes())?;
    if entries > MAX_DIRECTORY_ENTRIES {
        return Err(DirectoryMessageError::Entries(entries));
    }
    Ok(Directory::decode(message.as_bytes())?)
}
