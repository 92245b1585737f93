//! `Directory` messages, which are checked for their size before they are decoded.

use cofferdam_proto::EncodedDirectory;
use prost::encoding::{DecodeContext, decode_key, skip_field};

use super::MAX_DIRECTORY_ENTRIES;
use crate::{Directory, directory::MAX_DIRECTORY_BYTES, proto};

/// Why a directory doesn't go over gRPC.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DirectoryMessageError {
    #[error("the directory has more than {MAX_DIRECTORY_ENTRIES} entries, which is the limit over gRPC")]
    Entries,
    #[error("the directory has {0} bytes, and {MAX_DIRECTORY_BYTES} is the limit over gRPC")]
    Bytes(usize),
    #[error(transparent)]
    Decode(#[from] proto::DecodeError),
}

pub(super) fn encode(directory: &Directory) -> Result<EncodedDirectory, DirectoryMessageError> {
    if directory.len() > MAX_DIRECTORY_ENTRIES {
        return Err(DirectoryMessageError::Entries);
    }
    let encoded = directory.encode();
    if encoded.len() > MAX_DIRECTORY_BYTES {
        return Err(DirectoryMessageError::Bytes(encoded.len()));
    }
    Ok(encoded.into())
}

pub(crate) fn decode_checked(message: &EncodedDirectory) -> Result<Directory, DirectoryMessageError> {
    if count_entries(message.as_bytes())? > MAX_DIRECTORY_ENTRIES {
        return Err(DirectoryMessageError::Entries);
    }
    Ok(Directory::decode(message.as_bytes())?)
}

/// Each entry of a directory is a field of the message.
fn count_entries(mut rest: &[u8]) -> Result<usize, proto::DecodeError> {
    let mut count = 0;
    while !rest.is_empty() {
        let (tag, wire_type) = decode_key(&mut rest)?;
        skip_field(wire_type, tag, &mut rest, DecodeContext::default())?;
        count += 1;
    }
    Ok(count)
}
