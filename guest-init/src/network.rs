//! The interface of a build with a network.
//!
//! The host's side has every address but the guest's, and nobody else is on the link. So the interface asks nobody for
//! Ethernet addresses, and its own are in use at once.

use std::{io, net::Ipv4Addr, os::fd::OwnedFd};

use cofferdam_protocol::network::{
    GATEWAY_IPV4, GATEWAY_IPV6, GUEST_IPV4, GUEST_IPV6, INTERFACE, IPV4_PREFIX, IPV6_PREFIX, MTU,
};
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};

use crate::sys::{change_network, interface_index, interface_request};

/// The metric that Linux gives to routes of IPv6 by itself.
const METRIC: u32 = 1024;

/// Configures the interface of the calling process's network namespace.
pub(crate) fn configure() -> io::Result<()> {
    let ipv4 = open(AddressFamily::Inet)?;
    let mut request = interface_request(INTERFACE);
    request.ifr_ifru.ifru_mtu = MTU.into();
    // SAFETY: SIOCSIFMTU takes an ifreq.
    unsafe { change_network(&ipv4, libc::SIOCSIFMTU, &request) }?;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_NOARP) as i16;
    // SAFETY: SIOCSIFFLAGS takes an ifreq.
    unsafe { change_network(&ipv4, libc::SIOCSIFFLAGS, &request) }?;
    request.ifr_ifru.ifru_addr = ipv4_address(GUEST_IPV4);
    // SAFETY: SIOCSIFADDR of a socket of IPv4 takes an ifreq.
    unsafe { change_network(&ipv4, libc::SIOCSIFADDR, &request) }?;
    request.ifr_ifru.ifru_netmask = ipv4_address(Ipv4Addr::from_bits(u32::MAX << (32 - IPV4_PREFIX)));
    // SAFETY: SIOCSIFNETMASK takes an ifreq.
    unsafe { change_network(&ipv4, libc::SIOCSIFNETMASK, &request) }?;
    // SAFETY: all-zero bytes are a valid rtentry.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = ipv4_address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = ipv4_address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = ipv4_address(GATEWAY_IPV4);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    // SAFETY: SIOCADDRT of a socket of IPv4 takes an rtentry.
    unsafe { change_network(&ipv4, libc::SIOCADDRT, &route) }?;

    match open(AddressFamily::Inet6) {
        // A kernel without IPv6.
        Err(Errno::EAFNOSUPPORT) => Ok(()),
        ipv6 => configure_ipv6(&ipv6?),
    }
}

/// `struct in6_rtmsg` of Linux's `ipv6_route.h`.
#[repr(C)]
#[derive(Default)]
struct Ipv6Route {
    destination: [u8; 16],
    source: [u8; 16],
    gateway: [u8; 16],
    kind: u32,
    destination_length: u16,
    source_length: u16,
    metric: u32,
    info: libc::c_ulong,
    flags: u32,
    interface: libc::c_int,
}

fn configure_ipv6(ipv6: &OwnedFd) -> io::Result<()> {
    let interface = interface_index(INTERFACE)?;
    let address = libc::in6_ifreq {
        ifr6_addr: libc::in6_addr { s6_addr: GUEST_IPV6.octets() },
        ifr6_prefixlen: IPV6_PREFIX.into(),
        ifr6_ifindex: interface,
    };
    // SAFETY: SIOCSIFADDR of a socket of IPv6 takes an in6_ifreq.
    unsafe { change_network(ipv6, libc::SIOCSIFADDR, &address) }?;
    let route = Ipv6Route {
        gateway: GATEWAY_IPV6.octets(),
        metric: METRIC,
        flags: (libc::RTF_UP | libc::RTF_GATEWAY).into(),
        interface,
        ..Ipv6Route::default()
    };
    // SAFETY: SIOCADDRT of a socket of IPv6 takes an in6_rtmsg.
    unsafe { change_network(ipv6, libc::SIOCADDRT, &route) }
}

fn open(family: AddressFamily) -> Result<OwnedFd, Errno> {
    socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
}

/// The address of a socket, with port 0.
fn ipv4_address(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: all-zero bytes are a valid sockaddr.
    let mut bytes: libc::sockaddr = unsafe { std::mem::zeroed() };
    bytes.sa_family = libc::AF_INET as libc::sa_family_t;
    // The address follows the port.
    for (to, from) in bytes.sa_data[2..].iter_mut().zip(address.octets()) {
        *to = from.cast_signed();
    }
    bytes
}
