use bytes::{Buf, BufMut};
use prost::{
    DecodeError, Message,
    encoding::{DecodeContext, WireType, decode_varint, encode_key, encode_varint},
};

use crate::request::{BuildRequest, RequestError};

/// A `BuildRequest` message in the bytes that came, alone or as a field of another message: nothing is made of it before
/// it has been checked how much there is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EncodedRequest(Vec<u8>);

impl EncodedRequest {
    /// Checks and decodes it.
    ///
    /// # Errors
    ///
    /// The bytes are no `BuildRequest`, or it breaks a rule.
    pub fn decode_checked(&self) -> Result<BuildRequest, RequestError> {
        BuildRequest::from_binary(&self.0)
    }
}

impl From<Vec<u8>> for EncodedRequest {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl From<&BuildRequest> for EncodedRequest {
    fn from(request: &BuildRequest) -> Self {
        Self(request.to_proto().encode_to_vec())
    }
}

impl Message for EncodedRequest {
    fn encode_raw(&self, buffer: &mut impl BufMut) {
        buffer.put_slice(&self.0);
    }

    fn encoded_len(&self) -> usize {
        self.0.len()
    }

    /// As a message of its own.
    fn merge(&mut self, buffer: impl Buf) -> Result<(), DecodeError> {
        self.0.put(buffer);
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
        encode_key(tag, wire_type, &mut self.0);
        let length = match wire_type {
            WireType::Varint => {
                encode_varint(decode_varint(buffer)?, &mut self.0);
                0
            }
            WireType::LengthDelimited => {
                let length = decode_varint(buffer)?;
                encode_varint(length, &mut self.0);
                length
            }
            WireType::SixtyFourBit => 8,
            WireType::ThirtyTwoBit => 4,
            WireType::StartGroup | WireType::EndGroup => return Err(malformed("groups are not supported")),
        };
        match usize::try_from(length) {
            Ok(length) if length <= buffer.remaining() => self.0.put(buffer.take(length)),
            _ => return Err(malformed("buffer underflow")),
        }
        Ok(())
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}

fn malformed(why: &'static str) -> DecodeError {
    #[expect(deprecated, reason = "prost has no other way for messages that are not generated")]
    DecodeError::new(why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::proto::cofferdam;

    fn request() -> BuildRequest {
        let message = crate::request::proto::BuildRequest {
            command_args: vec!["a".into(), "b".into()],
            refscan_needles: vec!["needle".into()],
            ..Default::default()
        };
        message.try_into().unwrap()
    }

    #[test]
    fn a_request_survives_alone_and_as_a_field() {
        let encoded = EncodedRequest::from(&request());
        let alone = EncodedRequest::decode(encoded.encode_to_vec().as_slice()).unwrap();
        assert_eq!(alone.decode_checked().unwrap(), request());
        let message = cofferdam::BuildRequest { request: Some(encoded), detached: true, ..Default::default() };
        let back = cofferdam::BuildRequest::decode(message.encode_to_vec().as_slice()).unwrap();
        assert!(back.detached);
        assert_eq!(back.request.unwrap().decode_checked().unwrap(), request());
    }

    #[test]
    fn bytes_of_every_wire_type_are_kept_and_those_cut_short_refused() {
        for fields in [&b"\x08\x96\x01"[..], b"\x0d1234", b"\x0912345678", b"\x0a\x02ab", b""] {
            let mut outer = vec![0x0a, u8::try_from(fields.len()).unwrap()];
            outer.extend_from_slice(fields);
            let message = cofferdam::BuildRequest::decode(outer.as_slice()).unwrap();
            assert_eq!(message.request.unwrap().0, fields);
            outer.pop();
            assert!(fields.is_empty() || cofferdam::BuildRequest::decode(outer.as_slice()).is_err());
        }
        assert!(cofferdam::BuildRequest::decode(&b"\x0a\x02\x0b\x0c"[..]).is_err());
    }

    #[test]
    fn too_many_entries_are_refused_by_name() {
        let many = EncodedRequest(b"\x12\x00".repeat(2_000_000));
        assert_eq!(many.decode_checked().unwrap_err().field, "command_args");
    }
}
