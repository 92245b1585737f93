//! The device's questions to the broker: ids, queries that wait for their answers, and messages that wait to be sent.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};

use super::dns::{MAX_STREAM_BYTES, Query};
use super::packet::Ends;
use super::wire::{Answer, Request, receive_answer, send_request};

/// Most queries that wait for an answer. More are not answered, and the guest asks again.
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
}

impl Questions {
    pub(super) fn new(broker: OwnedFd) -> Self {
        Self { broker, last_id: 0, queries: HashMap::new(), unsent: VecDeque::new() }
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

    /// Asks for a query's name, unless too many wait already.
    pub(super) fn resolve(&mut self, query: Query, way: Way) {
        let queries = self.queries.values().filter(|(_, way)| matches!(way, Way::Datagram(_))).count();
        if matches!(way, Way::Datagram(_)) && queries >= MAX_QUERIES {
            return;
        }
        let id = self.new_id();
        self.ask(Request::Resolve { id, name: query.name.clone(), family: query.family });
        self.queries.insert(id, (query, way));
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
