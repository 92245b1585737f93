//! What a packet of the guest's is, as far as the device treats packets differently.
//!
//! | packet | what becomes of it |
//! |---|---|
//! | the first of a TCP connection | held until the broker has answered |
//! | another of TCP; an echo request to the gateway | the stack's |
//! | UDP to port 53 of the gateway | a DNS query |
//! | other UDP, and ICMP to others | answered as unreachable |
//! | fragments, other protocols, packets from another address than the guest's | dropped |

use std::net::{IpAddr, SocketAddr};

use cofferdam_protocol::network::{GATEWAY_IPV4, GATEWAY_IPV6, GUEST_IPV4, GUEST_IPV6};
use smoltcp::wire::{IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket, UdpPacket};

/// The port of DNS.
pub(super) const DNS_PORT: u16 = 53;

/// Types of echo requests.
const ECHO_REQUEST_V4: u8 = 8;
const ECHO_REQUEST_V6: u8 = 128;

/// A connection, by its two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ends {
    /// The guest's.
    pub(super) from: SocketAddr,
    /// The other.
    pub(super) to: SocketAddr,
}

/// A packet of the guest's.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Packet<'p> {
    /// The first of a TCP connection.
    Opening(Ends),
    /// For the stack.
    Stack,
    /// A DNS query over UDP.
    Query {
        /// The ends.
        ends: Ends,
        /// The message.
        message: &'p [u8],
    },
    /// To be answered as unreachable.
    Unreachable,
    /// To be dropped.
    Nothing,
}

impl<'p> Packet<'p> {
    /// Looks at a packet: an IP header and all that follows.
    pub(super) fn of(packet: &'p [u8]) -> Self {
        Self::parse(packet).unwrap_or(Self::Nothing)
    }

    fn parse(packet: &'p [u8]) -> Option<Self> {
        let (from, to, protocol, payload): (IpAddr, IpAddr, _, _) = match packet.first()? >> 4 {
            4 => {
                let packet = Ipv4Packet::new_checked(packet).ok()?;
                if packet.more_frags() || packet.frag_offset() != 0 {
                    return None;
                }
                let (from, to) = (packet.src_addr(), packet.dst_addr());
                (from.into(), to.into(), packet.next_header(), packet.payload())
            }
            6 => {
                let packet = Ipv6Packet::new_checked(packet).ok()?;
                let (from, to) = (packet.src_addr(), packet.dst_addr());
                (from.into(), to.into(), packet.next_header(), packet.payload())
            }
            _ => return None,
        };
        if ![IpAddr::from(GUEST_IPV4), GUEST_IPV6.into()].contains(&from) {
            return None;
        }
        let ends = |from_port, to_port| {
            let (from, to) = (SocketAddr::new(from, from_port), SocketAddr::new(to, to_port));
            Ends { from, to }
        };
        let is_gateway = [IpAddr::from(GATEWAY_IPV4), GATEWAY_IPV6.into()].contains(&to);
        // A multicast of the guest's kernel is no question to anybody.
        let unreachable = (!to.is_multicast()).then_some(Self::Unreachable);
        match protocol {
            IpProtocol::Tcp => {
                let tcp = TcpPacket::new_checked(payload).ok()?;
                if tcp.src_port() == 0 || tcp.dst_port() == 0 {
                    return None;
                }
                let is_first = tcp.syn() && !tcp.ack() && !tcp.rst() && !tcp.fin();
                Some(if is_first { Self::Opening(ends(tcp.src_port(), tcp.dst_port())) } else { Self::Stack })
            }
            IpProtocol::Udp => {
                let udp = UdpPacket::new_checked(payload).ok()?;
                match (to, udp.dst_port()) {
                    (IpAddr::V4(GATEWAY_IPV4), DNS_PORT) if udp.src_port() != 0 => {
                        Some(Self::Query { ends: ends(udp.src_port(), DNS_PORT), message: udp.payload() })
                    }
                    _ => unreachable,
                }
            }
            IpProtocol::Icmp | IpProtocol::Icmpv6 => {
                let is_echo = matches!(
                    (protocol, *payload.first()?),
                    (IpProtocol::Icmp, ECHO_REQUEST_V4) | (IpProtocol::Icmpv6, ECHO_REQUEST_V6)
                );
                match (is_echo, is_gateway) {
                    (true, true) => Some(Self::Stack),
                    (true, false) => unreachable,
                    (false, _) => None,
                }
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{Segment, datagram, echo, ends, segment};
    use super::*;

    #[test]
    fn a_connections_first_packet_is_told_from_the_others() {
        for to in ["93.184.215.14:443", "[2606:2800:21f::14]:443"] {
            let ends = ends(to);
            assert_eq!(Packet::of(&segment(ends, Segment::Syn)), Packet::Opening(ends));
            for other in [Segment::Ack, Segment::SynAck, Segment::SynRst, Segment::SynFin] {
                assert_eq!(Packet::of(&segment(ends, other)), Packet::Stack, "{to} {other:?}");
            }
        }
        assert_eq!(Packet::of(&segment(ends("93.184.215.14:0"), Segment::Syn)), Packet::Nothing);
    }

    #[test]
    fn queries_are_those_to_the_gateway() {
        let to = |to| datagram(ends(to), b"message");
        let query = Packet::Query { ends: ends("192.0.0.1:53"), message: b"message" };
        assert_eq!(Packet::of(&to("192.0.0.1:53")), query);
        for other in ["192.0.0.1:54", "8.8.8.8:53", "[2606:2800:21f::14]:53", "[fd63:6f66:6665::1]:53"] {
            assert_eq!(Packet::of(&to(other)), Packet::Unreachable, "{other}");
        }
        for other in ["224.0.0.251:5353", "[ff02::fb]:5353"] {
            assert_eq!(Packet::of(&to(other)), Packet::Nothing, "{other}");
        }
    }

    #[test]
    fn echo_requests_are_for_the_gateway_alone() {
        for (to, expected) in [
            ("192.0.0.1:0", Packet::Stack),
            ("8.8.8.8:0", Packet::Unreachable),
            ("[fd63:6f66:6665::1]:0", Packet::Stack),
            ("[2606:2800:21f::14]:0", Packet::Unreachable),
        ] {
            assert_eq!(Packet::of(&echo(ends(to))), expected, "{to}");
        }
    }

    #[test]
    fn packets_from_elsewhere_and_fragments_are_dropped() {
        let good = segment(ends("93.184.215.14:443"), Segment::Syn);
        let mut forged = good.clone();
        forged[15] ^= 1;
        let mut fragment = good.clone();
        fragment[6] = 0x20;
        for wrong in [&forged, &fragment, &good[..good.len() - 1], &good[..19], &[]] {
            assert_eq!(Packet::of(wrong), Packet::Nothing);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_some_packet(
            mut packet in proptest::collection::vec(any::<u8>(), 0..200),
            is_ipv6 in any::<bool>(),
            protocol in prop_oneof![Just(6_u8), Just(17), Just(1), Just(58), any::<u8>()],
        ) {
            // Half of the way to a good one, so that there is something to get wrong.
            let (length, at) = (packet.len(), if is_ipv6 { 6 } else { 9 });
            if length > 40 {
                packet[0] = if is_ipv6 { 0x60 } else { 0x45 };
                packet[at] = protocol;
                let (field, value) = if is_ipv6 { (4, length - 40) } else { (2, length) };
                packet[field..field + 2].copy_from_slice(&(value as u16).to_be_bytes());
                let from = if is_ipv6 { GUEST_IPV6.octets().to_vec() } else { GUEST_IPV4.octets().to_vec() };
                let start = if is_ipv6 { 8 } else { 12 };
                packet[start..start + from.len()].copy_from_slice(&from);
            }
            let mut stack = super::super::stack::Stack::new();
            if let Packet::Stack | Packet::Opening(_) = Packet::of(&packet) {
                stack.pass(&packet);
            }
            super::super::reply::unreachable(&packet, super::super::reply::Unreachable::Port);
        }
    }
}
