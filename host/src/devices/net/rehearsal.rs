//! For fuzzing: the device's decoders, without a guest and a host.

use super::dns::{self, Received};
use super::packet::Packet;
use super::reply::{Unreachable, unreachable};
use super::stack::{BUFFER_BYTES, Stack};
use super::wire::Request;

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
