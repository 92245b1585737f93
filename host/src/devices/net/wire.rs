//! What the network device asks the host process, over a `SOCK_SEQPACKET` pair: the packet boundaries are the message
//! boundaries.
//!
//! ```text
//!   device ─▶ host     Connect ──▶ Connected, with the socket · Speak · Refused
//!                      Head ─────▶ Connected, with the socket · Speak · Refused     only after Speak
//!                      Close ────▶ nothing                                          ends the id, whatever its state
//!                      Turned away ▶ nothing                                        for the record
//!                      Resolve ──▶ Resolved
//! ```
//!
//! Messages are encoded with [postcard](https://postcard.jamesmunns.com). Several questions may be open at a time, each
//! with an id of its own, and are answered in any order. The host side trusts nothing that it reads. The device trusts the
//! host.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd};

use nix::sys::socket::{MsgFlags, recv, send};
use serde::{Deserialize, Serialize};

use crate::{
    devices::packets::{self, retry},
    network::{Family, Refusal},
};

/// Most bytes of a connection's beginning in one message.
pub(super) const MAX_HEAD_BYTES: usize = 16 * 1024;

/// Largest message.
const MAX_MESSAGE_BYTES: usize = MAX_HEAD_BYTES + 256;

/// A question of the device's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Connect to this address.
    Connect { id: u32, to: SocketAddr },
    /// The next bytes that the guest has sent on a connection. None: it will send no more.
    Head { id: u32, bytes: serde_bytes::ByteBuf },
    /// The addresses of this name.
    Resolve { id: u32, name: String, family: Family },
    /// The device has done with a connection, and has closed its socket.
    Close { id: u32, reset: bool },
    /// The device had no room for a connection to this address, nor for so many others.
    TurnedAway { to: SocketAddr, others: u64 },
}

/// An answer of the host's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// The message comes with the connected socket.
    Connected { id: u32 },
    /// The host wants to see the next bytes that the guest sends.
    Speak { id: u32 },
    /// There is no connection.
    Refused { id: u32, why: Refusal },
    /// The addresses of a name; none if it has no such addresses.
    Resolved { id: u32, found: Option<Vec<IpAddr>>, exists: bool },
}

/// Bytes that are no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a packet of {length} bytes is no request")]
pub struct NoRequest {
    /// Bytes in the packet.
    pub length: usize,
}

impl Request {
    pub(crate) fn decode(packet: &[u8]) -> Result<Self, NoRequest> {
        match postcard::take_from_bytes(packet) {
            Ok((request, [])) => Ok(request),
            _ => Err(NoRequest { length: packet.len() }),
        }
    }
}

/// Sends a message. `WouldBlock` if the other side reads too slowly.
pub(super) fn send_request(socket: BorrowedFd<'_>, request: &Request) -> io::Result<()> {
    let packet = postcard::to_stdvec(request).map_err(io::Error::other)?;
    retry(|| send(socket.as_raw_fd(), &packet, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT)).map(drop)
}

/// Sends an answer, perhaps with a socket. `WouldBlock` if the device reads too slowly.
pub(super) fn send_answer(socket: BorrowedFd<'_>, answer: &Answer, with: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let packet = postcard::to_stdvec(answer).map_err(io::Error::other)?;
    packets::send_with(socket, &packet, with, MsgFlags::MSG_DONTWAIT).map(drop)
}

/// The next request; `None` when the device has gone, `WouldBlock` when there is none yet.
pub(super) fn receive_request(socket: BorrowedFd<'_>) -> io::Result<Option<Result<Request, NoRequest>>> {
    let mut packet = [0; MAX_MESSAGE_BYTES];
    // There is no room for control messages, so the kernel closes any descriptors that a hostile device attaches.
    let flags = MsgFlags::MSG_TRUNC | MsgFlags::MSG_DONTWAIT;
    let length = retry(|| recv(socket.as_raw_fd(), &mut packet, flags))?;
    Ok(match packet.get(..length) {
        Some([]) => None,
        Some(request) => Some(Request::decode(request)),
        None => Some(Err(NoRequest { length })),
    })
}

/// The next answer; `None` when the host has gone, `WouldBlock` when there is none yet.
pub(super) fn receive_answer(socket: BorrowedFd<'_>) -> io::Result<Option<(Answer, Option<OwnedFd>)>> {
    let mut packet = [0; MAX_MESSAGE_BYTES];
    let space = nix::cmsg_space!([RawFd; 1]);
    let received = packets::receive(socket, &mut packet, space, MsgFlags::MSG_DONTWAIT)?;
    if received.length == 0 {
        return Ok(None);
    }
    let answer = postcard::from_bytes(&packet[..received.length]).map_err(io::Error::other)?;
    Ok(Some((answer, received.descriptors.into_iter().next_back())))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use proptest::prelude::*;

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    fn messages_survive_the_wire_with_their_socket() {
        let (host, device) = pair();
        for request in [
            Request::Connect { id: 1, to: "[2606:2800:21f::14]:443".parse().unwrap() },
            Request::Head { id: 2, bytes: vec![7; MAX_HEAD_BYTES].into() },
            Request::Resolve { id: u32::MAX, name: "a.example".into(), family: Family::V6 },
            Request::Close { id: 3, reset: true },
            Request::TurnedAway { to: "93.184.215.14:443".parse().unwrap(), others: u64::MAX },
        ] {
            send_request(device.as_fd(), &request).unwrap();
            assert_eq!(receive_request(host.as_fd()).unwrap(), Some(Ok(request)));
        }
        let (socket, _other) = UnixStream::pair().unwrap();
        send_answer(host.as_fd(), &Answer::Connected { id: 1 }, Some(socket.as_fd())).unwrap();
        let (answer, with) = receive_answer(device.as_fd()).unwrap().unwrap();
        assert_eq!((answer, with.is_some()), (Answer::Connected { id: 1 }, true));
        drop(host);
        assert!(receive_answer(device.as_fd()).unwrap().is_none());
    }

    #[test]
    fn a_packet_that_is_too_long_is_no_request() {
        let (host, device) = pair();
        let packet = vec![1; MAX_MESSAGE_BYTES + 1];
        send(device.as_raw_fd(), &packet, MsgFlags::MSG_NOSIGNAL).unwrap();
        let expected = Err(NoRequest { length: packet.len() });
        assert_eq!(receive_request(host.as_fd()).unwrap(), Some(expected));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_request_or_refused(packet in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = Request::decode(&packet);
        }
    }
}
