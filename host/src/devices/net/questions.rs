//! The device's questions to the broker: ids, queries that wait for their answers, and messages that wait to be sent.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};

use super::dns::{MAX_STREAM_BYTES, Query};
use super::packet::Ends;
use super::wire::{Answer, Request, receive_answer, send_request};

/// Most queries of each way that wait for an answer. More are not answered.
const MAX_QUERIES: usize = 64;

/// The way that a query has come by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// UDP.
    Datagram(Ends),
    /// The connection with this id.
    Stream(u32),
}

/// The device's side of the connection to the broker.
#[derive(Debug)]
pub(super) struct Questions {
    broker: OwnedFd,
    last_id: u32,
    queries: HashMap<u32, (Query, Way)>,
    /// Messages that the broker had no room for. Each belongs to a connection or a query, whose numbers are limited.
    unsent: VecDeque<Request>,
    /// A connection that was turned away, and how many others, of which the broker has not been told.
    turned_away: Option<(SocketAddr, u64)>,
}

impl Questions {
    pub(super) fn new(broker: OwnedFd) -> Self {
        Self { broker, last_id: 0, queries: HashMap::new(), unsent: VecDeque::new(), turned_away: None }
    }

    pub(super) fn broker(&self) -> &OwnedFd {
        &self.broker
    }

    /// An id that is not in use: none lives for four billion others.
    pub(super) fn new_id(&mut self) -> u32 {
        self.last_id = self.last_id.wrapping_add(1);
        self.last_id
    }

    pub(super) fn ask(&mut self, request: Request) {
        self.unsent.push_back(request);
    }

    /// Takes note of a connection for which there is no room.
    pub(super) fn turn_away(&mut self, to: SocketAddr) {
        let others = self.turned_away.map_or(0, |(_, others)| others + 1);
        self.turned_away = Some((to, others));
    }

    /// Asks for a query's name. Returns `false` if too many wait already, those of connections that have ended included.
    pub(super) fn resolve(&mut self, query: Query, way: Way) -> bool {
        let kind = std::mem::discriminant(&way);
        let queries = self.queries.values().filter(|(_, way)| std::mem::discriminant(way) == kind).count();
        if queries >= MAX_QUERIES {
            return false;
        }
        let id = self.new_id();
        self.ask(Request::Resolve { id, name: query.name.clone(), family: query.family });
        self.queries.insert(id, (query, way));
        true
    }

    /// The answer to a query, and the way back.
    pub(super) fn resolved(&mut self, id: u32, found: Option<&[IpAddr]>, exists: bool) -> Option<(Way, Vec<u8>)> {
        let (query, way) = self.queries.remove(&id)?;
        let max_bytes = match way {
            Way::Datagram(_) => None,
            Way::Stream(_) => Some(MAX_STREAM_BYTES),
        };
        Some((way, query.answer(found, exists, max_bytes)?))
    }

    /// Sends as many messages as the broker takes.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while let Some(request) = self.unsent.front() {
            match send_request(self.broker.as_fd(), request) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                sent => sent?,
            }
            self.unsent.pop_front();
        }
        if let Some((to, others)) = self.turned_away.filter(|_| self.unsent.is_empty()) {
            match send_request(self.broker.as_fd(), &Request::TurnedAway { to, others }) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                sent => {
                    sent?;
                    self.turned_away = None;
                }
            }
        }
        Ok(())
    }

    /// The next answer of the broker's.
    ///
    /// # Errors
    ///
    /// The broker has gone.
    pub(super) fn receive(&self) -> io::Result<Option<(Answer, Option<OwnedFd>)>> {
        match receive_answer(self.broker.as_fd()) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Ok(None) => Err(ErrorKind::UnexpectedEof.into()),
            received => received,
        }
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{Message, Query as Asked};
    use hickory_proto::rr::{Name, RecordType};
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::super::dns::{Received, receive};
    use super::super::testing::ends;
    use super::*;

    fn query() -> Query {
        let mut message = Message::query();
        message.add_query(Asked::query(Name::from_ascii("a.example.").unwrap(), RecordType::A));
        match receive(&message.to_vec().unwrap()) {
            Received::Query(query) => query,
            _ => panic!("it is a query"),
        }
    }

    /// A guest can end a connection for queries before its query is answered, and open another.
    #[test]
    fn queries_are_limited_whichever_way_they_come() {
        let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
        let mut questions = Questions::new(pair.unwrap().0);
        let way = |stream: bool, id: u32| if stream { Way::Stream(id) } else { Way::Datagram(ends("192.0.0.1:53")) };
        for stream in [true, false] {
            let asked = (0..1000).filter(|id| questions.resolve(query(), way(stream, *id))).count();
            assert_eq!(asked, MAX_QUERIES);
        }
        assert!(questions.resolved(1, None, false).is_some());
        assert!(questions.resolve(query(), Way::Stream(7)) && !questions.resolve(query(), Way::Stream(8)));
    }
}
