//! How many entries a request's lists have.
//!
//! They are counted in the encoded request before it is decoded: an empty entry takes two bytes there, and some fifty times
//! as many afterwards.

use std::{borrow::Cow, fmt};

use prost::{
    DecodeError, decode_length_delimiter,
    encoding::{DecodeContext, WireType, decode_key, skip_field},
};
use prost_reflect::{Kind, MessageDescriptor};
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{
    MAX_ADDITIONAL_FILES, MAX_ARGS, MAX_ENVIRONMENT_VARS, MAX_INPUTS, MAX_NEEDLES, MAX_OUTPUTS, MAX_RO_PATHS,
    MAX_SCRATCH_PATHS, RequestError, proto,
};

/// The number of the field that holds the message, or [`REQUEST`], and the field's number in it.
type Number = (u32, u32);

/// No field has this number.
const REQUEST: u32 = 0;
const CONSTRAINTS: u32 = 8;

/// Each list, with its name and the most entries it may have.
const LISTS: [(Number, &str, usize); 8] = [
    ((REQUEST, 1), "inputs", MAX_INPUTS),
    ((REQUEST, 2), "command_args", MAX_ARGS),
    ((REQUEST, 4), "scratch_paths", MAX_SCRATCH_PATHS),
    ((REQUEST, 6), "outputs", MAX_OUTPUTS),
    ((REQUEST, 7), "environment_vars", MAX_ENVIRONMENT_VARS),
    ((CONSTRAINTS, 3), "constraints.available_ro_paths", MAX_RO_PATHS),
    ((REQUEST, 9), "additional_files", MAX_ADDITIONAL_FILES),
    ((REQUEST, 10), "refscan_needles", MAX_NEEDLES),
];

/// How many entries each of [`LISTS`] has.
#[derive(Debug, Default)]
pub(super) struct Counts([usize; LISTS.len()]);

impl Counts {
    /// Of inputs alone.
    pub(super) fn of_inputs(inputs: usize) -> Self {
        Self([inputs, 0, 0, 0, 0, 0, 0, 0])
    }

    pub(super) fn of_message(message: &proto::BuildRequest) -> Self {
        let ro_paths = message.constraints.as_ref().map_or(0, |constraints| constraints.available_ro_paths.len());
        Self([
            message.inputs.len(),
            message.command_args.len(),
            message.scratch_paths.len(),
            message.outputs.len(),
            message.environment_vars.len(),
            ro_paths,
            message.additional_files.len(),
            message.refscan_needles.len(),
        ])
    }

    pub(super) fn of_binary(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut counts = Self::default();
        counts.read(REQUEST, bytes)?;
        Ok(counts)
    }

    /// Protobuf merges the parts of a message, so their counts add up.
    fn read(&mut self, message: u32, mut bytes: &[u8]) -> Result<(), DecodeError> {
        while !bytes.is_empty() {
            let (field, wire_type) = decode_key(&mut bytes)?;
            let mut contents = bytes;
            skip_field(wire_type, field, &mut bytes, DecodeContext::default())?;
            self.add((message, field), 1);
            if (message, field) == (REQUEST, CONSTRAINTS) && wire_type == WireType::LengthDelimited {
                let length = decode_length_delimiter(&mut contents)?;
                self.read(CONSTRAINTS, &contents[..length])?;
            }
        }
        Ok(())
    }

    /// `request` describes the message.
    pub(super) fn of_json(text: &str, request: MessageDescriptor) -> serde_json::Result<Self> {
        let mut counts = Self::default();
        let fields = Fields { number: REQUEST, message: request, counts: &mut counts };
        fields.deserialize(&mut serde_json::Deserializer::from_str(text))?;
        Ok(counts)
    }

    fn add(&mut self, number: Number, entries: usize) {
        if let Some(at) = LISTS.iter().position(|(list, ..)| *list == number) {
            self.0[at] += entries;
        }
    }

    pub(super) fn check(&self) -> Result<(), RequestError> {
        for ((_, field, limit), count) in LISTS.into_iter().zip(self.0) {
            if count > limit {
                let rule = format!("must not have more than {limit} entries");
                return Err(RequestError::invalid(field, rule).got(count));
            }
        }
        Ok(())
    }
}

/// Counts the entries of lists in a message in ProtoJSON.
struct Fields<'a> {
    number: u32,
    message: MessageDescriptor,
    counts: &'a mut Counts,
}

impl<'de> DeserializeSeed<'de> for Fields<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Fields<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<Cow<'_, str>>()? {
            let field = self.message.get_field_by_json_name(&name).or_else(|| self.message.get_field_by_name(&name));
            match field.map(|field| (field.number(), field.is_list(), field.kind())) {
                Some((number, true, _)) => self.counts.add((self.number, number), map.next_value_seed(Entries)?),
                Some((number, false, Kind::Message(message))) => {
                    map.next_value_seed(Fields { number, message, counts: self.counts })?;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }

    /// In ProtoJSON `null` means that a field is absent.
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
}

/// A list in ProtoJSON.
struct Entries;

impl<'de> DeserializeSeed<'de> for Entries {
    type Value = usize;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<usize, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Entries {
    type Value = usize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<usize, A::Error> {
        let mut entries = 0;
        while list.next_element::<IgnoredAny>()?.is_some() {
            entries += 1;
        }
        Ok(entries)
    }

    fn visit_unit<E>(self) -> Result<usize, E> {
        Ok(0)
    }
}
