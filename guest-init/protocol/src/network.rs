//! The addresses of a machine that has a network. They are the same for all machines: each is alone on its link.
//!
//! The IPv4 network is the one that RFC 7335 reserves for links like this. No other host has an address in it. The IPv6
//! network is a local one, from which hosts prefer IPv4 where a name has both.

use std::net::{Ipv4Addr, Ipv6Addr};

/// The guest's interface.
pub const INTERFACE: &str = "eth0";

/// The largest packet on the link, in bytes, without the Ethernet header.
pub const MTU: u16 = 65_520;

/// The guest's Ethernet address.
pub const GUEST_MAC: [u8; 6] = [0x02, 0x63, 0x6f, 0x66, 0x00, 0x02];

/// The Ethernet address of the host's side.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0x63, 0x6f, 0x66, 0x00, 0x01];

/// The guest's IPv4 address.
pub const GUEST_IPV4: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 2);

/// The gateway, which answers DNS queries, too.
pub const GATEWAY_IPV4: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 1);

/// The length of the IPv4 network's prefix, in bits.
pub const IPV4_PREFIX: u8 = 30;

/// The guest's IPv6 address.
pub const GUEST_IPV6: Ipv6Addr = Ipv6Addr::new(0xfd63, 0x6f66, 0x6665, 0, 0, 0, 0, 2);

/// The IPv6 gateway.
pub const GATEWAY_IPV6: Ipv6Addr = Ipv6Addr::new(0xfd63, 0x6f66, 0x6665, 0, 0, 0, 0, 1);

/// The length of the IPv6 network's prefix, in bits.
pub const IPV6_PREFIX: u8 = 64;
