//! DNS queries over TCP, one after the other: each message comes behind its length.

use std::time::{Duration, Instant};

use smoltcp::socket::tcp::Socket;

use super::dns::{self, Received};
use super::questions::{Questions, Way};
use super::splice::{Broken, has_ended};

/// How long the guest may keep a connection without a query.
const PATIENCE: Duration = Duration::from_secs(30);

/// Longest query, in bytes. Names have 255.
const MAX_QUERY_BYTES: usize = 1024;

/// One connection for queries.
#[derive(Debug)]
pub(super) struct StreamQueries {
    received: Vec<u8>,
    answer: Vec<u8>,
    is_asked: bool,
    last: Instant,
}

impl Default for StreamQueries {
    fn default() -> Self {
        Self { received: Vec::new(), answer: Vec::new(), is_asked: false, last: Instant::now() }
    }
}

impl StreamQueries {
    /// The answer to the query that was asked.
    pub(super) fn answer(&mut self, message: &[u8]) {
        self.is_asked = false;
        self.last = Instant::now();
        let Ok(length) = u16::try_from(message.len()) else { return };
        self.answer.extend_from_slice(&length.to_be_bytes());
        self.answer.extend_from_slice(message);
    }

    /// Sends the answers and takes the next query.
    pub(super) fn pump(&mut self, id: u32, socket: &mut Socket<'_>, questions: &mut Questions) -> Result<(), Broken> {
        while !self.answer.is_empty() && socket.can_send() {
            let sent = socket.send_slice(&self.answer).map_err(|_| Broken)?;
            self.answer.drain(..sent);
        }
        while !self.is_asked && self.answer.is_empty() {
            let wanted = match self.received.get(..2) {
                Some(length) => 2 + usize::from(u16::from_be_bytes([length[0], length[1]])),
                None => 2,
            };
            if wanted > MAX_QUERY_BYTES {
                return Err(Broken);
            }
            if wanted > 2 && self.received.len() == wanted {
                let received = std::mem::take(&mut self.received);
                match dns::receive(&received[2..]) {
                    Received::Query(query) => {
                        self.is_asked = true;
                        if !questions.resolve(query, Way::Stream(id)) {
                            return Err(Broken);
                        }
                    }
                    Received::Answer(answer) => self.answer(&answer),
                    Received::Nothing => return Err(Broken),
                }
                continue;
            }
            if !socket.can_recv() {
                break;
            }
            let missing = wanted - self.received.len();
            let taken = socket.recv(|bytes| {
                let taken = &bytes[..bytes.len().min(missing)];
                (taken.len(), taken.to_vec())
            });
            self.received.extend(taken?);
        }
        if has_ended(socket) && !self.is_asked && self.answer.is_empty() && socket.recv_queue() == 0 {
            socket.close();
        }
        Ok(())
    }

    pub(super) fn deadline(&self) -> Instant {
        self.last + PATIENCE
    }
}
