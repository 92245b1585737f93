//! Packets as a guest sends them.

use std::net::{IpAddr, SocketAddr};

use cofferdam_protocol::network::{GUEST_IPV4, GUEST_IPV6};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    IPV4_HEADER_LEN, Icmpv4Packet, Icmpv4Repr, Icmpv6Packet, Icmpv6Repr, IpAddress, IpProtocol, IpRepr, Ipv4Packet,
    TCP_HEADER_LEN, TcpPacket, TcpSeqNumber, UdpPacket, UdpRepr,
};

use super::packet::Ends;

/// The guest's port.
const FROM: u16 = 40_000;

/// Flags of a TCP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Segment {
    Syn,
    Ack,
    SynAck,
    SynRst,
    SynFin,
    /// A reset of the connection that `Syn` has asked for.
    RstNext,
}

/// A connection of the guest's to this address and port.
pub(super) fn ends(to: &str) -> Ends {
    let to: SocketAddr = to.parse().unwrap();
    let from = if to.is_ipv4() { IpAddr::from(GUEST_IPV4) } else { GUEST_IPV6.into() };
    Ends { from: SocketAddr::new(from, FROM), to }
}

/// An IP header, and what `fill` puts into so many bytes behind it.
fn packet(ends: Ends, protocol: IpProtocol, length: usize, fill: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let (from, to) = (IpAddress::from(ends.from.ip()), IpAddress::from(ends.to.ip()));
    let header = IpRepr::new(from, to, protocol, length, 64);
    let mut packet = vec![0; header.buffer_len()];
    header.emit(&mut packet, &ChecksumCapabilities::default());
    fill(&mut packet[header.header_len()..]);
    packet
}

/// A TCP packet without data.
pub(super) fn segment(ends: Ends, segment: Segment) -> Vec<u8> {
    packet(ends, IpProtocol::Tcp, 20, |bytes| {
        let mut tcp = TcpPacket::new_unchecked(bytes);
        tcp.set_src_port(ends.from.port());
        tcp.set_dst_port(ends.to.port());
        tcp.set_header_len(20);
        tcp.set_window_len(1000);
        tcp.set_seq_number(TcpSeqNumber(i32::from(segment == Segment::RstNext)));
        tcp.set_syn(!matches!(segment, Segment::Ack | Segment::RstNext));
        tcp.set_ack(matches!(segment, Segment::Ack | Segment::SynAck));
        tcp.set_rst(matches!(segment, Segment::SynRst | Segment::RstNext));
        tcp.set_fin(segment == Segment::SynFin);
    })
}

/// A TCP packet of IPv4 without data, with this option in place of those that it has.
pub(super) fn with_option(mut segment: Vec<u8>, option: [u8; 4]) -> Vec<u8> {
    segment.truncate(IPV4_HEADER_LEN + TCP_HEADER_LEN);
    segment.extend(option);
    let length = segment.len();
    let mut ip = Ipv4Packet::new_unchecked(&mut segment);
    ip.set_total_len(length as u16);
    ip.fill_checksum();
    TcpPacket::new_unchecked(ip.payload_mut()).set_header_len((TCP_HEADER_LEN + option.len()) as u8);
    segment
}

/// A UDP packet.
pub(super) fn datagram(ends: Ends, message: &[u8]) -> Vec<u8> {
    let udp = UdpRepr { src_port: ends.from.port(), dst_port: ends.to.port() };
    packet(ends, IpProtocol::Udp, udp.header_len() + message.len(), |bytes| {
        let (from, to) = (ends.from.ip().into(), ends.to.ip().into());
        let checksum = ChecksumCapabilities::default();
        let fill = |payload: &mut [u8]| payload.copy_from_slice(message);
        udp.emit(&mut UdpPacket::new_unchecked(bytes), &from, &to, message.len(), fill, &checksum);
    })
}

/// An echo request.
pub(super) fn echo(ends: Ends) -> Vec<u8> {
    let checksum = ChecksumCapabilities::default();
    match (ends.from.ip(), ends.to.ip()) {
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let echo = Icmpv6Repr::EchoRequest { ident: 1, seq_no: 2, data: b"echo" };
            packet(ends, IpProtocol::Icmpv6, echo.buffer_len(), |bytes| {
                echo.emit(&from, &to, &mut Icmpv6Packet::new_unchecked(bytes), &checksum);
            })
        }
        _ => {
            let echo = Icmpv4Repr::EchoRequest { ident: 1, seq_no: 2, data: b"echo" };
            packet(ends, IpProtocol::Icmp, echo.buffer_len(), |bytes| {
                echo.emit(&mut Icmpv4Packet::new_unchecked(bytes), &checksum);
            })
        }
    }
}
