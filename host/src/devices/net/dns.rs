//! DNS messages: queries of the guest's, and their answers. Names are resolved in the host process.

use std::net::IpAddr;

use hickory_proto::op::{Message, MessageType, OpCode, Query as Question, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA};
use hickory_proto::rr::{DNSClass, RData, Record, RecordType};

use crate::network::Family;

/// How long a guest may remember an answer, in seconds. The host answers again soon.
const TTL_S: u32 = 30;

/// Most bytes of an answer over UDP, whatever the guest says that it takes.
const MAX_DATAGRAM_BYTES: u16 = 4096;

/// Most bytes of an answer over TCP.
pub(super) const MAX_STREAM_BYTES: u16 = u16::MAX;

/// A query that the host process has to answer.
#[derive(Debug)]
pub(super) struct Query {
    id: u16,
    recursion_desired: bool,
    question: Question,
    max_payload: u16,
    /// The name, in lower case and without a dot at its end.
    pub(super) name: String,
    pub(super) family: Family,
}

/// A message of the guest's.
#[derive(Debug)]
pub(super) enum Received {
    /// To be asked for.
    Query(Query),
    /// To be answered with this.
    Answer(Vec<u8>),
    /// To be dropped.
    Nothing,
}

/// Looks at a message.
pub(super) fn receive(message: &[u8]) -> Received {
    let Ok(message) = Message::from_vec(message) else { return Received::Nothing };
    let metadata = &message.metadata;
    if metadata.message_type != MessageType::Query {
        return Received::Nothing;
    }
    let empty = |code| {
        let mut answer = Message::error_msg(metadata.id, metadata.op_code, code);
        answer.metadata.recursion_desired = metadata.recursion_desired;
        answer.metadata.recursion_available = true;
        answer.add_queries(message.queries.iter().cloned());
        answer.to_vec().map_or(Received::Nothing, Received::Answer)
    };
    if metadata.op_code != OpCode::Query {
        return empty(ResponseCode::NotImp);
    }
    let [question] = &message.queries[..] else { return empty(ResponseCode::FormErr) };
    let family = match (question.query_class(), question.query_type()) {
        (DNSClass::IN, RecordType::A) => Family::V4,
        (DNSClass::IN, RecordType::AAAA) => Family::V6,
        // Others, such as HTTPS, could hide the name of a server from the host.
        _ => return empty(ResponseCode::NoError),
    };
    let name = question.name().to_ascii().to_ascii_lowercase();
    Received::Query(Query {
        id: metadata.id,
        recursion_desired: metadata.recursion_desired,
        question: question.clone(),
        max_payload: message.max_payload().clamp(512, MAX_DATAGRAM_BYTES),
        name: name.trim_end_matches('.').to_owned(),
        family,
    })
}

impl Query {
    /// The answer of so many bytes at most; over UDP, as many as the guest takes. Without addresses, the name has none if it
    /// `exists`. None at all: it can't be found out.
    pub(super) fn answer(&self, found: Option<&[IpAddr]>, exists: bool, max_bytes: Option<u16>) -> Option<Vec<u8>> {
        let mut answer = Message::response(self.id, OpCode::Query);
        answer.metadata.recursion_desired = self.recursion_desired;
        answer.metadata.recursion_available = true;
        answer.metadata.response_code = match (found, exists) {
            (None, _) => ResponseCode::ServFail,
            (Some(_), true) => ResponseCode::NoError,
            (Some(_), false) => ResponseCode::NXDomain,
        };
        answer.add_query(self.question.clone());
        for address in found.unwrap_or_default() {
            let data = match address {
                IpAddr::V4(address) => RData::A(A(*address)),
                IpAddr::V6(address) => RData::AAAA(AAAA(*address)),
            };
            answer.add_answer(Record::from_rdata(self.question.name().clone(), TTL_S, data));
        }
        let whole = answer.to_vec().ok()?;
        if whole.len() <= max_bytes.unwrap_or(self.max_payload).into() {
            Some(whole)
        } else {
            answer.truncate().to_vec().ok()
        }
    }
}
