use std::marker::PhantomData;

use bytes::{Buf, BufMut};
use prost::{
    DecodeError, Message,
    encoding::{DecodeContext, WireType, decode_varint, encode_key, encode_varint},
};

use crate::{
    cofferdam::v1::Network,
    snix::{build::v1::BuildRequest, castore::v1::Directory},
};

/// A `Directory` that is not decoded yet.
pub type EncodedDirectory = Encoded<Directory>;

/// A `BuildRequest` that is not decoded yet.
pub type EncodedRequest = Encoded<BuildRequest>;

/// A `Network` that is not decoded yet.
pub type EncodedNetwork = Encoded<Network>;

/// A message in the bytes that came, alone or as a field of another message.
///
/// A decoded message takes many times the memory of its bytes, so its receiver checks first how much there is in it. And
/// what it compares with a digest are the sender's bytes, not an encoding of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoded<M> {
    bytes: Vec<u8>,
    message: PhantomData<M>,
}

impl<M> Encoded<M> {
    /// The bytes of the message.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl<M> From<Vec<u8>> for Encoded<M> {
    fn from(bytes: Vec<u8>) -> Self {
        Self { bytes, message: PhantomData }
    }
}

impl<M: Message> From<&M> for Encoded<M> {
    fn from(message: &M) -> Self {
        message.encode_to_vec().into()
    }
}

impl<M: Message> Message for Encoded<M> {
    fn encode_raw(&self, buffer: &mut impl BufMut) {
        buffer.put_slice(&self.bytes);
    }

    fn encoded_len(&self) -> usize {
        self.bytes.len()
    }

    /// As a message of its own.
    fn merge(&mut self, buffer: impl Buf) -> Result<(), DecodeError> {
        self.bytes.put(buffer);
        Ok(())
    }

    /// As a field of another one.
    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buffer: &mut impl Buf,
        _context: DecodeContext,
    ) -> Result<(), DecodeError> {
        encode_key(tag, wire_type, &mut self.bytes);
        let length = match wire_type {
            WireType::Varint => {
                encode_varint(decode_varint(buffer)?, &mut self.bytes);
                0
            }
            WireType::LengthDelimited => {
                let length = decode_varint(buffer)?;
                encode_varint(length, &mut self.bytes);
                length
            }
            WireType::SixtyFourBit => 8,
            WireType::ThirtyTwoBit => 4,
            WireType::StartGroup | WireType::EndGroup => return Err(malformed("groups are not supported")),
        };
        match usize::try_from(length) {
            Ok(length) if length <= buffer.remaining() => self.bytes.put(buffer.take(length)),
            _ => return Err(malformed("buffer underflow")),
        }
        Ok(())
    }

    fn clear(&mut self) {
        self.bytes.clear();
    }
}

fn malformed(why: &'static str) -> DecodeError {
    #[expect(deprecated, reason = "prost has no other way for messages that are not generated")]
    DecodeError::new(why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cofferdam::v1 as cofferdam;

    #[test]
    fn a_message_survives_alone_and_as_a_field() {
        let request = BuildRequest {
            command_args: vec!["a".into(), "b".into()],
            refscan_needles: vec!["needle".into()],
            ..Default::default()
        };
        let encoded = EncodedRequest::from(&request);
        let alone = EncodedRequest::decode(encoded.encode_to_vec().as_slice()).unwrap();
        assert_eq!(BuildRequest::decode(alone.as_bytes()).unwrap(), request);
        let message = cofferdam::BuildRequest { request: Some(encoded), detached: true, ..Default::default() };
        let back = cofferdam::BuildRequest::decode(message.encode_to_vec().as_slice()).unwrap();
        assert!(back.detached);
        assert_eq!(BuildRequest::decode(back.request.unwrap().as_bytes()).unwrap(), request);
    }

    #[test]
    fn every_wire_type_is_kept_and_truncated_ones_are_refused() {
        for fields in [&b"\x08\x96\x01"[..], b"\x0d1234", b"\x0912345678", b"\x0a\x02ab", b""] {
            let mut outer = vec![0x0a, u8::try_from(fields.len()).unwrap()];
            outer.extend_from_slice(fields);
            let message = cofferdam::BuildRequest::decode(outer.as_slice()).unwrap();
            assert_eq!(message.request.unwrap().as_bytes(), fields);
            outer.pop();
            assert!(fields.is_empty() || cofferdam::BuildRequest::decode(outer.as_slice()).is_err());
        }
        assert!(cofferdam::BuildRequest::decode(&b"\x0a\x02\x0b\x0c"[..]).is_err());
    }
}
