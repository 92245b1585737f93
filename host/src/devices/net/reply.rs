//! Packets that the device makes itself, without the stack: errors, and answers to DNS queries.

use std::net::IpAddr;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    Icmpv4DstUnreachable, Icmpv4Packet, Icmpv4Repr, Icmpv6DstUnreachable, Icmpv6Packet, Icmpv6Repr, IpProtocol,
    Ipv4Packet, Ipv4Repr, Ipv6Packet, Ipv6Repr, UdpPacket, UdpRepr,
};

use super::packet::Ends;

/// The hop limit of all packets to the guest.
pub(super) const HOP_LIMIT: u8 = 64;

/// Most bytes of a packet that an error quotes, as RFC 1812 and RFC 4443 have it.
const MAX_QUOTED_BYTES: usize = 512;

/// What can't be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unreachable {
    /// A port.
    Port,
    /// A host.
    Host,
}

/// The error that answers a packet. None if it isn't one.
pub(super) fn unreachable(packet: &[u8], what: Unreachable) -> Option<Vec<u8>> {
    // What the guest has computed is of no interest, what it gets must be right.
    let (unchecked, checksum) = (ChecksumCapabilities::ignored(), ChecksumCapabilities::default());
    if packet.first()? >> 4 == 4 {
        let packet = Ipv4Packet::new_checked(packet).ok()?;
        let header = Ipv4Repr::parse(&packet, &unchecked).ok()?;
        let data = &packet.payload()[..packet.payload().len().min(MAX_QUOTED_BYTES)];
        let reason = match what {
            Unreachable::Port => Icmpv4DstUnreachable::PortUnreachable,
            Unreachable::Host => Icmpv4DstUnreachable::HostUnreachable,
        };
        let error = Icmpv4Repr::DstUnreachable { reason, header, data };
        let (mut reply, at) = ipv4(&header, IpProtocol::Icmp, error.buffer_len());
        error.emit(&mut Icmpv4Packet::new_unchecked(&mut reply[at..]), &checksum);
        Some(reply)
    } else {
        let packet = Ipv6Packet::new_checked(packet).ok()?;
        let header = Ipv6Repr::parse(&packet).ok()?;
        let data = &packet.payload()[..packet.payload().len().min(MAX_QUOTED_BYTES)];
        let reason = match what {
            Unreachable::Port => Icmpv6DstUnreachable::PortUnreachable,
            Unreachable::Host => Icmpv6DstUnreachable::AddrUnreachable,
        };
        let error = Icmpv6Repr::DstUnreachable { reason, header, data };
        let ip = Ipv6Repr {
            src_addr: header.dst_addr,
            dst_addr: header.src_addr,
            next_header: IpProtocol::Icmpv6,
            payload_len: error.buffer_len(),
            hop_limit: HOP_LIMIT,
        };
        let mut reply = vec![0; ip.buffer_len() + ip.payload_len];
        ip.emit(&mut Ipv6Packet::new_unchecked(&mut reply));
        let at = &mut reply[ip.buffer_len()..];
        error.emit(&ip.src_addr, &ip.dst_addr, &mut Icmpv6Packet::new_unchecked(at), &checksum);
        Some(reply)
    }
}

/// The packet with an answer to a DNS query over IPv4.
pub(super) fn datagram(ends: Ends, message: &[u8]) -> Option<Vec<u8>> {
    let (IpAddr::V4(from), IpAddr::V4(to)) = (ends.from.ip(), ends.to.ip()) else { return None };
    let udp = UdpRepr { src_port: ends.to.port(), dst_port: ends.from.port() };
    let length = udp.header_len() + message.len();
    let asked =
        Ipv4Repr { src_addr: from, dst_addr: to, next_header: IpProtocol::Udp, payload_len: 0, hop_limit: HOP_LIMIT };
    let (mut reply, at) = ipv4(&asked, IpProtocol::Udp, length);
    udp.emit(
        &mut UdpPacket::new_unchecked(&mut reply[at..]),
        &to.into(),
        &from.into(),
        message.len(),
        |payload| payload.copy_from_slice(message),
        &ChecksumCapabilities::default(),
    );
    Some(reply)
}

/// An IPv4 packet back to where another has come from, and where its payload begins.
fn ipv4(asked: &Ipv4Repr, next_header: IpProtocol, payload_len: usize) -> (Vec<u8>, usize) {
    let ip =
        Ipv4Repr { src_addr: asked.dst_addr, dst_addr: asked.src_addr, next_header, payload_len, hop_limit: HOP_LIMIT };
    let mut reply = vec![0; ip.buffer_len() + payload_len];
    ip.emit(&mut Ipv4Packet::new_unchecked(&mut reply), &ChecksumCapabilities::default());
    (reply, ip.buffer_len())
}
