//! Where an address leads, as this host's routes say. Nothing is sent to the address.

use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

/// The lengths of `struct nlmsghdr`, `struct rtmsg` and `struct rtattr`, in bytes.
const HEADER_BYTES: usize = 16;
const ROUTE_BYTES: usize = 12;
const ATTRIBUTE_BYTES: usize = 4;

/// Offsets in a message: its kind, and behind the header a route's kind or an error.
const KIND: usize = 4;
const ROUTE_KIND: usize = HEADER_BYTES + 7;
const ERROR: usize = HEADER_BYTES;

/// Most bytes of an answer that matter.
const MAX_ANSWER_BYTES: usize = 512;

/// Where an address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// To this host itself.
    Own,
    /// Elsewhere.
    Other,
    /// Nowhere: there is nothing to connect to.
    Nowhere,
}

/// Asks for the route to an address.
///
/// A socket that is connected to the address would tell its own address, which is another one where a subnet has several
/// of the host's addresses, or a route makes addresses the host's own.
///
/// # Errors
///
/// It can't be found out.
pub(super) fn route(address: IpAddr) -> io::Result<Route> {
    let kernel = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    send(kernel.as_raw_fd(), &question(address), MsgFlags::empty())?;
    let mut answer = [0; MAX_ANSWER_BYTES];
    // The kernel has answered by the time that the question is sent.
    let length = recv(kernel.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
    let answer = answer.get(..length).unwrap_or(&answer);
    let kind = answer.get(KIND..).and_then(|rest| rest.first_chunk()).map(|kind| u16::from_ne_bytes(*kind));
    match kind {
        Some(libc::RTM_NEWROUTE) => match answer.get(ROUTE_KIND).copied() {
            Some(libc::RTN_LOCAL | libc::RTN_ANYCAST | libc::RTN_BROADCAST) => Ok(Route::Own),
            Some(libc::RTN_UNREACHABLE | libc::RTN_PROHIBIT | libc::RTN_BLACKHOLE) => Ok(Route::Nowhere),
            Some(_) => Ok(Route::Other),
            None => Err(ErrorKind::InvalidData.into()),
        },
        Some(kind) if i32::from(kind) == libc::NLMSG_ERROR => {
            let error =
                answer.get(ERROR..).and_then(|rest| rest.first_chunk()).map_or(0, |error| i32::from_ne_bytes(*error));
            match error.saturating_neg() {
                libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES | libc::EINVAL => Ok(Route::Nowhere),
                error => Err(io::Error::from_raw_os_error(error)),
            }
        }
        _ => Err(ErrorKind::InvalidData.into()),
    }
}

/// `RTM_GETROUTE` for one address.
fn question(address: IpAddr) -> Vec<u8> {
    let (family, octets) = match address {
        IpAddr::V4(address) => (libc::AF_INET, address.octets().to_vec()),
        IpAddr::V6(address) => (libc::AF_INET6, address.octets().to_vec()),
    };
    let attribute_bytes = ATTRIBUTE_BYTES + octets.len();
    let length = (HEADER_BYTES + ROUTE_BYTES + attribute_bytes) as u32;
    let mut route = [0; ROUTE_BYTES];
    // The family and the length of the destination, in bits.
    (route[0], route[1]) = (family as u8, (octets.len() * 8) as u8);
    [
        &length.to_ne_bytes()[..],
        &libc::RTM_GETROUTE.to_ne_bytes(),
        &(libc::NLM_F_REQUEST as u16).to_ne_bytes(),
        // The message's number and its sender, which the kernel fills in.
        &[0; 8],
        &route,
        &(attribute_bytes as u16).to_ne_bytes(),
        &libc::RTA_DST.to_ne_bytes(),
        &octets,
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All of 127.0.0.0/8 is the host's, but a socket that is connected to 127.0.0.2 has the address 127.0.0.1.
    #[test]
    fn addresses_that_lead_to_the_host_are_its_own() {
        for address in ["127.0.0.1", "127.0.0.2", "127.255.255.254"] {
            assert_eq!(route(address.parse().unwrap()).unwrap(), Route::Own, "{address}");
        }
    }

    #[test]
    fn other_addresses_are_not_its_own_with_a_route_or_without() {
        for address in ["93.184.215.14", "2606:2800:21f::14"] {
            assert_ne!(route(address.parse().unwrap()).unwrap(), Route::Own, "{address}");
        }
    }
}
