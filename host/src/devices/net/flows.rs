//! The guest's connections.
//!
//! ```text
//!   first packet ──▶ Asked ── Connected ──▶ Spliced ────────────┐
//!                      │ └─── Speak ──▶ Overheard ── Connected ─┘
//!                      ▼                    │                   ▼
//!                   Refused: reset      Refused: reset       both sides have ended, or one was reset
//!                            or unreachable
//!   first packet, to the gateway's port 53 ──▶ Asking, answered by the device itself
//! ```
//!
//! The guest's first packet is held until the broker has connected, so that a connection which the guest has is one that
//! the other side has, too.

use std::collections::HashMap;
use std::net::{IpAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Instant;

use cofferdam_protocol::network::GATEWAY_IPV4;
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::{Socket, State as Tcp};

use super::events::Events;
use super::packet::{DNS_PORT, Ends};
use super::questions::Questions;
use super::reply::{Unreachable, unreachable};
use super::splice::{Broken, Splice, has_ended};
use super::stack::{BUFFER_BYTES, QUERY_BUFFER_BYTES, Stack};
use super::stream_queries::StreamQueries;
use super::wire::{MAX_HEAD_BYTES, Request};
use crate::network::Refusal;

/// Most connections at a time, those that wait for the broker included. The broker allows less.
const MAX_FLOWS: usize = 768;

/// Most connections that wait for the broker. The guest's kernel tries again.
const MAX_ASKED: usize = 64;

/// Most connections for DNS queries. The broker doesn't count them.
const MAX_ASKING: usize = 64;

/// A connection.
struct Flow {
    ends: Ends,
    state: State,
}

enum State {
    /// Its first packet waits for the broker.
    Asked { opening: Vec<u8> },
    /// The guest is connected.
    Open { socket: SocketHandle, other: Other },
}

/// The other side of a connection.
enum Other {
    /// The broker, until it knows enough.
    Overheard { is_asked: bool },
    /// A host.
    Spliced(Splice),
    /// The device's answers to DNS queries.
    Asking(StreamQueries),
}

/// All connections.
#[derive(Default)]
pub(super) struct Flows {
    flows: HashMap<u32, Flow>,
    ids: HashMap<Ends, u32>,
    asked: usize,
    asking: usize,
}

impl Flows {
    /// Takes the first packet of a connection.
    pub(super) fn open(&mut self, ends: Ends, opening: &[u8], stack: &mut Stack, questions: &mut Questions) {
        let is_gateways = ends.to.ip() == IpAddr::from(GATEWAY_IPV4) && ends.to.port() == DNS_PORT;
        if let Some(id) = self.ids.get(&ends) {
            // Sent again: it waits already, or it got an answer that the guest doesn't like.
            if let Some(Flow { state: State::Open { .. }, .. }) = self.flows.get(id) {
                stack.pass(opening);
            }
            return;
        }
        let has_room = !is_gateways || self.asking < MAX_ASKING;
        if self.flows.len() >= MAX_FLOWS || !has_room {
            questions.turn_away(ends.to);
            // No socket has it, so the stack answers with a reset.
            return stack.pass(opening);
        }
        let state = if is_gateways {
            self.asking += 1;
            let other = Other::Asking(StreamQueries::default());
            State::Open { socket: stack.accept(ends, opening, QUERY_BUFFER_BYTES), other }
        } else if self.asked < MAX_ASKED {
            self.asked += 1;
            State::Asked { opening: opening.to_vec() }
        } else {
            return;
        };
        let id = questions.new_id();
        if let State::Asked { .. } = state {
            questions.ask(Request::Connect { id, to: ends.to });
        }
        self.ids.insert(ends, id);
        self.flows.insert(id, Flow { ends, state });
    }

    /// The broker has connected.
    pub(super) fn connected(
        &mut self,
        id: u32,
        with: OwnedFd,
        stack: &mut Stack,
        events: &Events,
    ) -> std::io::Result<()> {
        let Some(flow) = self.flows.get_mut(&id) else { return Ok(()) };
        // It doesn't block, as all sockets of the broker's.
        let stream = TcpStream::from(with);
        events.watch(id, &stream)?;
        let splice = Other::Spliced(Splice::new(stream));
        match &mut flow.state {
            State::Asked { opening } => {
                self.asked -= 1;
                let socket = stack.accept(flow.ends, opening, BUFFER_BYTES);
                flow.state = State::Open { socket, other: splice };
            }
            State::Open { other, .. } => *other = splice,
        }
        Ok(())
    }

    /// The broker wants to see the next bytes of the guest's.
    pub(super) fn speak(&mut self, id: u32, stack: &mut Stack) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        match &mut flow.state {
            State::Asked { opening } => {
                self.asked -= 1;
                let socket = stack.accept(flow.ends, opening, BUFFER_BYTES);
                flow.state = State::Open { socket, other: Other::Overheard { is_asked: false } };
            }
            State::Open { other: Other::Overheard { is_asked }, .. } => *is_asked = false,
            State::Open { .. } => {}
        }
    }

    /// The broker gives no connection.
    pub(super) fn refused(&mut self, id: u32, why: Refusal, stack: &mut Stack) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        match &flow.state {
            State::Asked { opening } => {
                let error = match why {
                    Refusal::Denied | Refusal::Refused => None,
                    Refusal::Unreachable => unreachable(opening, Unreachable::Host),
                };
                match error {
                    Some(error) => stack.send_packet(&error),
                    // No socket has it, so the stack answers with a reset.
                    None => stack.pass(opening),
                }
                self.asked -= 1;
                self.ids.remove(&flow.ends);
                self.flows.remove(&id);
            }
            State::Open { socket, .. } => stack.socket(*socket).abort(),
        }
    }

    /// A socket of a connection has something to move.
    pub(super) fn became(&mut self, id: u32, readable: bool, writable: bool) {
        if let Some(Flow { state: State::Open { other: Other::Spliced(splice), .. }, .. }) = self.flows.get_mut(&id) {
            splice.became(readable, writable);
        }
    }

    /// The answer to a query that has come over this connection.
    pub(super) fn answer(&mut self, id: u32, message: &[u8]) {
        if let Some(Flow { state: State::Open { other: Other::Asking(queries), .. }, .. }) = self.flows.get_mut(&id) {
            queries.answer(message);
        }
    }

    /// Moves what there is to move on every connection.
    pub(super) fn pump(&mut self, stack: &mut Stack, questions: &mut Questions) {
        let now = Instant::now();
        for (id, flow) in &mut self.flows {
            let State::Open { socket, other } = &mut flow.state else { continue };
            let socket = stack.socket(*socket);
            let pumped = match other {
                Other::Overheard { is_asked: true } => Ok(()),
                Other::Overheard { is_asked } => {
                    if let Some(bytes) = head(socket) {
                        *is_asked = true;
                        questions.ask(Request::Head { id: *id, bytes: bytes.into() });
                    }
                    Ok(())
                }
                Other::Spliced(splice) => splice.pump(socket),
                Other::Asking(queries) => queries.pump(*id, socket, questions),
            };
            let is_overdue = other.deadline().is_some_and(|deadline| deadline <= now);
            if (pumped.is_err() || is_overdue) && socket.state() != Tcp::Closed {
                socket.abort();
            }
        }
    }

    /// Forgets connections that have ended. To be called after their last packets have been sent.
    pub(super) fn sweep(&mut self, stack: &mut Stack, questions: &mut Questions) {
        let (ids, asking) = (&mut self.ids, &mut self.asking);
        self.flows.retain(|id, flow| {
            let State::Open { socket: handle, other } = &flow.state else { return true };
            let socket = stack.socket(*handle);
            let is_complete = other.is_complete();
            let has_ended = match socket.state() {
                // The stack still has the other end's address as long as it has a reset to send.
                Tcp::Closed | Tcp::Listen => socket.remote_endpoint().is_none(),
                // The guest's kernel waits, too, and nothing is lost on the way.
                Tcp::TimeWait => is_complete,
                _ => false,
            };
            if has_ended {
                stack.remove(*handle);
                ids.remove(&flow.ends);
                if matches!(other, Other::Asking(_)) {
                    *asking -= 1;
                } else {
                    questions.ask(Request::Close { id: *id, reset: !is_complete });
                }
            }
            !has_ended
        });
    }

    /// When a connection has to be given up next.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let open = self.flows.values().filter_map(|flow| match &flow.state {
            State::Open { other, .. } => other.deadline(),
            State::Asked { .. } => None,
        });
        open.min()
    }
}

impl Other {
    fn is_complete(&self) -> bool {
        match self {
            Self::Spliced(splice) => splice.is_complete(),
            Self::Overheard { .. } => false,
            Self::Asking(_) => true,
        }
    }

    fn deadline(&self) -> Option<Instant> {
        match self {
            Self::Spliced(splice) => splice.deadline(),
            Self::Asking(queries) => Some(queries.deadline()),
            // The broker's patience is shorter.
            Self::Overheard { .. } => None,
        }
    }
}

/// The next bytes that the guest has sent; empty when it will send no more.
fn head(socket: &mut Socket<'_>) -> Option<Vec<u8>> {
    if socket.can_recv() {
        let taken = socket.recv(|bytes| {
            let taken = &bytes[..bytes.len().min(MAX_HEAD_BYTES)];
            (taken.len(), taken.to_vec())
        });
        return taken.ok();
    }
    has_ended(socket).then(Vec::new)
}

/// A connection that can't go on.
impl From<smoltcp::socket::tcp::RecvError> for Broken {
    fn from(_: smoltcp::socket::tcp::RecvError) -> Self {
        Self
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::os::fd::AsFd as _;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::super::testing::{Segment, ends, segment, with_option};
    use super::super::wire::receive_request;
    use super::*;

    /// A device with its questions' other end.
    fn device() -> (Flows, Stack, Questions, OwnedFd) {
        let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
        let (broker, host) = pair.unwrap();
        (Flows::default(), Stack::new(), Questions::new(broker), host)
    }

    #[test]
    fn a_first_packet_that_the_stack_cannot_read_leaves_nothing() {
        let (mut flows, mut stack, mut questions, _host) = device();
        let ends = ends("192.0.0.1:53");
        let unreadable = with_option(segment(ends, Segment::Syn), [2, 0, 0, 0]);
        flows.open(ends, &unreadable, &mut stack, &mut questions);
        flows.sweep(&mut stack, &mut questions);
        assert_eq!((flows.flows.len(), flows.ids.len(), flows.asking), (0, 0, 0));
        flows.open(ends, &with_option(unreadable, [2, 4, 5, 180]), &mut stack, &mut questions);
        flows.sweep(&mut stack, &mut questions);
        assert_eq!(flows.flows.len(), 1, "a maximum segment size can be read");
    }

    #[test]
    fn a_connection_that_is_reset_before_it_is_made_leaves_nothing() {
        let (mut flows, mut stack, mut questions, _host) = device();
        let from = |port| {
            let mut ends = ends("192.0.0.1:53");
            ends.from.set_port(port);
            ends
        };
        flows.open(from(1), &segment(from(1), Segment::Syn), &mut stack, &mut questions);
        assert!(stack.send(), "it is answered");
        stack.pass(&segment(from(1), Segment::RstNext));
        // Before anything is swept.
        flows.open(from(2), &segment(from(2), Segment::Syn), &mut stack, &mut questions);
        flows.sweep(&mut stack, &mut questions);
        let left: Vec<_> = flows.ids.keys().map(|ends| ends.from.port()).collect();
        assert_eq!((left, flows.asking), (vec![2], 1));
        let State::Open { socket, .. } = &flows.flows.values().next().unwrap().state else { panic!("it waits") };
        assert_eq!(stack.socket(*socket).remote_endpoint().map(|end| end.port), Some(2));
    }

    #[test]
    fn connections_for_queries_are_limited_by_the_device() {
        let (mut flows, mut stack, mut questions, host) = device();
        let mut open = |flows: &mut Flows, port: u16| {
            let mut ends = ends("192.0.0.1:53");
            ends.from.set_port(port);
            flows.open(ends, &segment(ends, Segment::Syn), &mut stack, &mut questions);
        };
        (1..1000).for_each(|port| open(&mut flows, port));
        assert_eq!((flows.flows.len(), flows.asking), (MAX_ASKING, MAX_ASKING));
        questions.flush().unwrap();
        let turned_away = Request::TurnedAway { to: "192.0.0.1:53".parse().unwrap(), others: 999 - 64 - 1 };
        assert_eq!(receive_request(host.as_fd()).unwrap(), Some(Ok(turned_away)));
        questions.flush().unwrap();
        assert_eq!(receive_request(host.as_fd()).unwrap_err().kind(), ErrorKind::WouldBlock, "it is told twice");
        for flow in flows.flows.values() {
            let State::Open { socket, .. } = flow.state else { panic!("it waits for the broker") };
            stack.socket(socket).abort();
        }
        // Each time that the guest takes what waits, there is room for one more at least.
        for _ in 0..=MAX_ASKING {
            while stack.waiting().first().is_some() {
                stack.waiting().remove_first();
            }
            stack.send();
        }
        flows.sweep(&mut stack, &mut questions);
        assert_eq!((flows.flows.len(), flows.asking), (0, 0));
    }
}
