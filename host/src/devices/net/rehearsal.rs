//! For fuzzing: the device's decoders, without a guest and a host; and the device with both, but without its VMM's messages.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use vhost_user_backend::VhostUserBackendMut as _;

use super::backend::{Backend, MAX_QUEUE_SIZE};
use super::dns::{self, Received};
use super::packet::Packet;
use super::reply::{Unreachable, unreachable};
use super::ring::GuestMemory;
use super::stack::{BUFFER_BYTES, Stack};
use super::wire::{Answer, Request, receive_request, send_answer};
use crate::devices::rehearsal::{Rings, memory, vring};
use crate::network::Refusal;

/// Times that a device looks at its guest's queues and its host's answers.
const TURNS: usize = 4;

/// Whether a packet is a request. One that is survives encoding.
pub(crate) fn survives(packet: &[u8]) -> bool {
    let Ok(request) = Request::decode(packet) else { return false };
    let again = postcard::to_stdvec(&request).expect("it has been decoded");
    assert_eq!(Request::decode(&again).as_ref(), Ok(&request));
    true
}

/// Takes a guest's packets, each behind its length in two bytes. Returns whether any means anything.
pub(crate) fn receive_all(mut packets: &[u8]) -> bool {
    let (mut stack, mut any) = (Stack::new(), false);
    while let Some((length, rest)) = packets.split_first_chunk() {
        let (packet, rest) = rest.split_at(rest.len().min(u16::from_be_bytes(*length).into()));
        packets = rest;
        let kind = Packet::of(packet);
        any |= kind != Packet::Nothing;
        match kind {
            // Nobody refuses here.
            Packet::Opening(ends) if !stack.waiting().is_full() => _ = stack.accept(ends, packet, BUFFER_BYTES),
            Packet::Stack if !stack.waiting().is_full() => stack.pass(packet),
            Packet::Query { message, .. } => {
                if let Received::Query(query) = dns::receive(message) {
                    query.answer(Some(&[]), true, None);
                }
            }
            Packet::Unreachable => drop(unreachable(packet, Unreachable::Port)),
            Packet::Opening(_) | Packet::Stack | Packet::Nothing => {}
        }
        stack.send();
    }
    any
}

/// Lets a device serve a guest with this memory and these queues, the first for frames to it. The host makes connections, wants
/// to see their beginnings, or refuses them, in turn. Returns whether the device goes on.
pub(crate) fn serves(regions: &[(u64, &[u8])], queues: [Rings; 2]) -> bool {
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
    let (broker, host) = pair.expect("sockets can be made");
    let memory = GuestMemory::new(memory(regions));
    let mut backend = Backend::new(memory.clone(), broker).expect("descriptors can be made");
    backend.set_event_idx(queues[0].event_index);
    let vrings = queues.map(|rings| vring(&memory, rings, MAX_QUEUE_SIZE as u32));
    let mut servers = Vec::new();
    for _ in 0..TURNS {
        if backend.run(&vrings).is_err() {
            return false;
        }
        while let Ok(Some(request)) = receive_request(host.as_fd()) {
            let request = request.expect("the device asks what can be read");
            answer(host.as_fd(), &request, &mut servers);
        }
    }
    true
}

/// Answers as a host may.
fn answer(host: BorrowedFd<'_>, request: &Request, servers: &mut Vec<UnixStream>) {
    let (answer, with) = match *request {
        Request::Connect { id, .. } if id % 3 == 0 => (Answer::Refused { id, why: Refusal::Unreachable }, None),
        Request::Connect { id, .. } if id % 3 == 1 => (Answer::Speak { id }, None),
        Request::Connect { id, .. } | Request::Head { id, .. } => {
            let (ours, theirs) = UnixStream::pair().expect("sockets can be made");
            theirs.set_nonblocking(true).expect("it is a socket");
            servers.push(ours);
            (Answer::Connected { id }, Some(OwnedFd::from(theirs)))
        }
        Request::Resolve { id, .. } => (Answer::Resolved { id, found: Some(Vec::new()), exists: true }, None),
        Request::Close { .. } | Request::TurnedAway { .. } => return,
    };
    // A device that takes no answers misses this one.
    let _ = send_answer(host, &answer, with.as_ref().map(OwnedFd::as_fd));
}

/// Whether a message is a query of a guest's that has an answer.
pub(crate) fn answers(message: &[u8]) -> bool {
    match dns::receive(message) {
        Received::Query(query) => {
            let found: Vec<_> = (0..64).map(|last| [10, 0, 0, last].into()).collect();
            [None, Some(dns::MAX_STREAM_BYTES)].iter().all(|max| query.answer(Some(&found), true, *max).is_some())
        }
        Received::Answer(_) => true,
        Received::Nothing => false,
    }
}
