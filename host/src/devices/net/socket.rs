//! What the host asks the kernel of a connection's socket.

use std::net::TcpStream;
use std::os::fd::AsRawFd as _;

/// Bytes of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Carried {
    pub(super) sent: u64,
    pub(super) received: u64,
}

impl Carried {
    pub(super) fn and(self, other: Self) -> Self {
        Self { sent: self.sent.saturating_add(other.sent), received: self.received.saturating_add(other.received) }
    }
}

/// Makes a connection end with a reset once its last copy is closed, which is at once unless the device has kept one. That one
/// hears nothing more, and says no more than a few packets.
pub(super) fn reset_with_last_copy(stream: &TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let mut nothing = libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 };
    let filter = libc::sock_fprog { len: 1, filter: &raw mut nothing };
    set(stream, libc::SOL_SOCKET, libc::SO_LINGER, &linger);
    set(stream, libc::SOL_SOCKET, libc::SO_SNDBUF, &0);
    set(stream, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, &1);
    set(stream, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &filter);
    set(stream, libc::SOL_SOCKET, libc::SO_LOCK_FILTER, &1);
}

/// Sets an option of a connected TCP socket, which has all of these.
fn set<T>(stream: &TcpStream, level: libc::c_int, option: libc::c_int, value: &T) {
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel reads one T through the pointer, and the instructions that a filter points to; all outlive the call.
    let _ = unsafe { libc::setsockopt(stream.as_raw_fd(), level, option, std::ptr::from_ref(value).cast(), length) };
}

/// Offsets in `struct tcp_info` of Linux 4.19 and later, and its length up to there, in bytes.
const BYTES_RECEIVED: usize = 128;
const BYTES_WAITING: usize = 144;
const BYTES_SENT: usize = 200;
const BYTES_SENT_AGAIN: usize = 208;
const TCP_INFO_BYTES: usize = 216;

/// The bytes that a connection has carried, as the kernel counts them. `None` if it doesn't.
pub(super) fn carried(stream: &TcpStream) -> Option<Carried> {
    let mut info = [0_u8; TCP_INFO_BYTES];
    let mut length = TCP_INFO_BYTES as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes through the first pointer, and the length through the second; both
    // outlive the call.
    let told = unsafe {
        let (level, option) = (libc::IPPROTO_TCP, libc::TCP_INFO);
        libc::getsockopt(stream.as_raw_fd(), level, option, info.as_mut_ptr().cast(), &raw mut length)
    };
    if told != 0 || (length as usize) < TCP_INFO_BYTES {
        return None;
    }
    let field = |at: usize| info[at..].first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
    // The kernel goes on to send what waits when the socket is closed.
    let waiting = info[BYTES_WAITING..].first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
    let sent = field(BYTES_SENT).saturating_sub(field(BYTES_SENT_AGAIN)).saturating_add(waiting.into());
    Some(Carried { sent, received: field(BYTES_RECEIVED) })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn nothing_is_made_up_of_a_socket_that_tells_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert_eq!(carried(&stream), Some(Carried::default()));
        let other = OwnedFd::from(UdpSocket::bind("127.0.0.1:0").unwrap());
        assert_eq!(carried(&other.into()), None);
    }
}
