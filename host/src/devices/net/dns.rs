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

#[cfg(test)]
mod tests {
    use hickory_proto::rr::Name;
    use proptest::prelude::*;

    use super::*;

    fn query(name: &str, kind: RecordType) -> Message {
        let mut query = Message::query();
        query.metadata.recursion_desired = true;
        query.add_query(Question::query(Name::from_ascii(name).unwrap(), kind));
        query
    }

    fn asked(name: &str, kind: RecordType) -> Query {
        match receive(&query(name, kind).to_vec().unwrap()) {
            Received::Query(query) => query,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_query_is_answered_with_the_addresses_that_were_found() {
        let query = asked("Good.Example.", RecordType::A);
        assert_eq!((query.name.as_str(), query.family), ("good.example", Family::V4));
        let found = ["93.184.215.14".parse().unwrap()];
        let answer = Message::from_vec(&query.answer(Some(&found), true, None).unwrap()).unwrap();
        assert_eq!(answer.metadata.id, query.id);
        assert_eq!(answer.answers.len(), 1);
        for (found, exists, code) in [
            (Some(&[][..]), true, ResponseCode::NoError),
            (Some(&[]), false, ResponseCode::NXDomain),
            (None, false, ResponseCode::ServFail),
        ] {
            let answer = Message::from_vec(&query.answer(found, exists, None).unwrap()).unwrap();
            assert_eq!((answer.metadata.response_code, answer.answers.len()), (code, 0));
        }
    }

    #[test]
    fn an_answer_that_is_too_long_for_udp_is_cut() {
        let query = asked("good.example.", RecordType::AAAA);
        let found: Vec<IpAddr> = (0..60_u16).map(|last| [0x2606, 0, 0, 0, 0, 0, 0, last].into()).collect();
        let cut = query.answer(Some(&found), true, None).unwrap();
        assert!(cut.len() <= 512 && Message::from_vec(&cut).unwrap().metadata.truncation);
        let whole = Message::from_vec(&query.answer(Some(&found), true, Some(MAX_STREAM_BYTES)).unwrap()).unwrap();
        assert_eq!((whole.answers.len(), whole.metadata.truncation), (60, false));
    }

    #[test]
    fn other_types_have_no_records_and_other_messages_no_answer() {
        for kind in [RecordType::HTTPS, RecordType::TXT, RecordType::ANY, RecordType::PTR] {
            let Received::Answer(answer) = receive(&query("good.example.", kind).to_vec().unwrap()) else {
                panic!("{kind} is asked for");
            };
            let answer = Message::from_vec(&answer).unwrap();
            assert_eq!((answer.metadata.response_code, answer.answers.len()), (ResponseCode::NoError, 0));
        }
        let response = Message::response(1, OpCode::Query).to_vec().unwrap();
        assert!(matches!(receive(&response), Received::Nothing));
        let empty = Message::query().to_vec().unwrap();
        assert!(matches!(receive(&empty), Received::Answer(_)), "it has no question");
    }

    proptest! {
        #[test]
        fn any_bytes_are_some_message(message in proptest::collection::vec(any::<u8>(), 0..200)) {
            receive(&message);
        }
    }
}
