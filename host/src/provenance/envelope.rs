//! DSSE, the envelope of signed statements (<https://github.com/secure-systems-lab/dsse>, version 1).

use data_encoding::BASE64;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::key::{PublicKey, SigningKey};

/// Most bytes of an envelope that is verified.
pub(crate) const MAX_ENVELOPE_BYTES: u64 = 16 * 1024 * 1024;

const PAYLOAD_TYPE: &str = "application/vnd.in-toto+json";

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope {
    payload: String,
    payload_type: String,
    signatures: Vec<Signature>,
}

#[derive(Serialize, Deserialize)]
struct Signature {
    #[serde(default)]
    keyid: String,
    sig: String,
}

/// Why an envelope proves nothing.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EnvelopeError {
    /// It is damaged, or something else.
    #[error("it {0}")]
    Malformed(&'static str),
    /// None of its signatures is one of this key's.
    #[error("it has no valid signature of the key {0}")]
    Unsigned(String),
}

/// Signs a statement.
pub(super) fn seal(key: &SigningKey, payload: &[u8]) -> Vec<u8> {
    let signature = Signature { keyid: key.public().id(), sig: BASE64.encode(&key.sign(&signed(payload))) };
    let envelope = Envelope {
        payload: BASE64.encode(payload),
        payload_type: PAYLOAD_TYPE.to_owned(),
        signatures: vec![signature],
    };
    let mut line = serde_json::to_vec(&envelope).expect("text can be written as JSON");
    line.push(b'\n');
    line
}

/// The statement in an envelope that this key has signed.
///
/// # Errors
///
/// See [`EnvelopeError`].
pub(crate) fn verify(envelope: &[u8], key: PublicKey) -> Result<Value, EnvelopeError> {
    let envelope: Envelope =
        serde_json::from_slice(envelope).map_err(|_| EnvelopeError::Malformed("is no DSSE envelope in JSON"))?;
    if envelope.payload_type != PAYLOAD_TYPE {
        return Err(EnvelopeError::Malformed("has a payload of another type than in-toto's"));
    }
    let decode = |text: &str| BASE64.decode(text.as_bytes());
    let payload =
        decode(&envelope.payload).map_err(|_| EnvelopeError::Malformed("has a payload that is not in base64"))?;
    let signed = signed(&payload);
    let is_signed = envelope
        .signatures
        .iter()
        .any(|Signature { sig, .. }| decode(sig).is_ok_and(|signature| key.verifies(&signed, &signature)));
    if !is_signed {
        return Err(EnvelopeError::Unsigned(key.id()));
    }
    serde_json::from_slice(&payload).map_err(|_| EnvelopeError::Malformed("has a payload that is not JSON"))
}

/// What is signed: the pre-authentication encoding of the payload and its type.
fn signed(payload: &[u8]) -> Vec<u8> {
    let header = format!("DSSEv1 {} {PAYLOAD_TYPE} {} ", PAYLOAD_TYPE.len(), payload.len());
    [header.as_bytes(), payload].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(dir: &tempfile::TempDir, name: &str) -> SigningKey {
        SigningKey::open_or_create(&dir.path().join(name)).unwrap()
    }

    #[test]
    fn the_signed_bytes_are_those_of_the_protocols_own_example() {
        // With the type and payload of DSSE's protocol.md, in its form.
        let header = format!("DSSEv1 {} {PAYLOAD_TYPE} 11 hello world", PAYLOAD_TYPE.len());
        assert_eq!(signed(b"hello world"), header.as_bytes());
    }

    #[test]
    fn one_changed_bit_fails() {
        let dir = tempfile::tempdir().unwrap();
        let (key, other) = (key(&dir, "key"), key(&dir, "other"));
        let envelope = seal(&key, br#"{"subject":[]}"#);
        assert_eq!(verify(&envelope, key.public()).unwrap()["subject"], serde_json::json!([]));
        assert_eq!(verify(&envelope, other.public()), Err(EnvelopeError::Unsigned(other.public().id())));
        let unprotected = envelope.windows(9).position(|window| window == br#"{"keyid":"#).unwrap();
        for bit in 0..8 * (envelope.len() - 1) {
            let mut changed = envelope.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            // The key's id is only a hint.
            let is_hint = (unprotected..unprotected + 9 + 66).contains(&(bit / 8));
            assert!(is_hint || verify(&changed, key.public()).is_err(), "bit {bit}");
        }
        for wrong in [&b""[..], b"{}", b"[]", br#"{"payload":"","payloadType":"","signatures":[]}"#] {
            assert!(matches!(verify(wrong, key.public()), Err(EnvelopeError::Malformed(_))));
        }
    }
}
