use bytes::{Buf, BufMut, Bytes};
use prost::{
    DecodeError, Message,
    encoding::{DecodeContext, WireType, decode_key, skip_field},
};

use super::MAX_DIRECTORY_ENTRIES;
use crate::{B3Digest, Directory, directory::MAX_DIRECTORY_BYTES, proto};

/// A `Directory` message in the very bytes that came: what is checked against a digest is not an encoding of our own, and
/// nothing is made of a message before its entries are counted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct EncodedDirectory(Bytes);

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

impl EncodedDirectory {
    pub(super) fn encode(directory: &Directory) -> Result<Self, DirectoryMessageError> {
        if directory.len() > MAX_DIRECTORY_ENTRIES {
            return Err(DirectoryMessageError::Entries);
        }
        let encoded = directory.encode();
        if encoded.len() > MAX_DIRECTORY_BYTES {
            return Err(DirectoryMessageError::Bytes(encoded.len()));
        }
        Ok(Self(encoded.into()))
    }

    pub(crate) fn decode_checked(&self) -> Result<Directory, DirectoryMessageError> {
        if self.entries()? > MAX_DIRECTORY_ENTRIES {
            return Err(DirectoryMessageError::Entries);
        }
        Ok(Directory::decode(&self.0)?)
    }

    pub(super) fn digest(&self) -> B3Digest {
        B3Digest::of(&self.0)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Each entry of a directory is a field of the message.
    fn entries(&self) -> Result<usize, proto::DecodeError> {
        let mut rest = self.0.as_ref();
        let mut count = 0;
        while !rest.is_empty() {
            let (tag, wire_type) = decode_key(&mut rest)?;
            skip_field(wire_type, tag, &mut rest, DecodeContext::default())?;
            count += 1;
        }
        Ok(count)
    }
}

impl Message for EncodedDirectory {
    fn encode_raw(&self, buffer: &mut impl BufMut) {
        buffer.put_slice(&self.0);
    }

    fn encoded_len(&self) -> usize {
        self.0.len()
    }

    fn merge(&mut self, mut buffer: impl Buf) -> Result<(), DecodeError> {
        self.0 = buffer.copy_to_bytes(buffer.remaining());
        Ok(())
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buffer: &mut impl Buf,
        context: DecodeContext,
    ) -> Result<(), DecodeError> {
        // Never a field of another message, so `merge` takes it whole.
        skip_field(wire_type, tag, buffer, context)
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}
