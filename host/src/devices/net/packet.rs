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
