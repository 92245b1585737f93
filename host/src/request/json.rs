//! ProtoJSON: names in lowerCamelCase (snake_case is read too), bytes in base64, 64-bit integers as strings.

use std::sync::LazyLock;

use cofferdam_castore::proto::Entry;
use cofferdam_proto::BUILD_DESCRIPTOR_SET;
use prost::Message;
use prost_reflect::{DescriptorPool, DeserializeOptions, DynamicMessage, MessageDescriptor, SerializeOptions};
use serde_json::Value;

use super::{
    BuildRequest, BuildResult, RequestError, RequestErrorKind, counts::Counts, error::quoted, proto, validate,
};

static POOL: LazyLock<DescriptorPool> =
    LazyLock::new(|| DescriptorPool::decode(BUILD_DESCRIPTOR_SET).expect("they were encoded as descriptors"));

fn descriptor(name: &str) -> MessageDescriptor {
    POOL.get_message_by_name(name).expect("the message is in our own .proto file")
}

fn to_json(name: &str, message: &impl Message) -> String {
    let dynamic = DynamicMessage::decode(descriptor(name), message.encode_to_vec().as_slice())
        .expect("an encoded message decodes as itself");
    let mut json = Vec::new();
    dynamic
        .serialize_with_options(&mut serde_json::Serializer::new(&mut json), &SerializeOptions::new())
        .expect("messages without Any have a JSON form, and memory takes it");
    String::from_utf8(json).expect("JSON is UTF-8")
}

/// A node and its name in canonical ProtoJSON.
pub(crate) fn entry_to_json(entry: &Entry) -> Value {
    serde_json::from_str(&to_json("snix.castore.v1.Entry", entry)).expect("it was just written")
}

/// The parser's message quotes the client's text.
fn malformed(error: &serde_json::Error) -> RequestError {
    let place = format!(" at line {} column {}", error.line(), error.column());
    let said = error.to_string();
    let said = quoted(said.strip_suffix(&place).unwrap_or(&said).as_bytes());
    let rule = format!("must be a snix.build.v1.BuildRequest in ProtoJSON; reading it ended{place}: {said}");
    RequestError::new(RequestErrorKind::Malformed, "the request", rule)
}

impl BuildRequest {
    /// Reads and checks a request in ProtoJSON. Unknown fields are refused.
    ///
    /// # Errors
    ///
    /// The text is not a `BuildRequest`, or it breaks a rule.
    pub fn from_json(text: &str) -> Result<Self, RequestError> {
        validate::check_encoded_bytes(text.len())?;
        let descriptor = descriptor("snix.build.v1.BuildRequest");
        Counts::of_json(text, descriptor.clone()).map_err(|error| malformed(&error))?.check()?;
        let mut json = serde_json::Deserializer::from_str(text);
        let options = DeserializeOptions::new().deny_unknown_fields(true);
        let message = DynamicMessage::deserialize_with_options(descriptor, &mut json, &options)
            .map_err(|error| malformed(&error))?;
        json.end().map_err(|error| malformed(&error))?;
        let message: proto::BuildRequest = message.transcode_to().expect("it has the same descriptor");
        message.try_into()
    }

    /// The request in canonical ProtoJSON, on one line.
    pub fn to_json(&self) -> String {
        to_json("snix.build.v1.BuildRequest", &self.to_proto())
    }
}

impl BuildResult {
    /// The `snix.build.v1.BuildResponse` in canonical ProtoJSON, on one line.
    pub fn to_json(&self) -> String {
        to_json("snix.build.v1.BuildResponse", &self.to_proto())
    }
}
