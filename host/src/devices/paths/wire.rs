//! What is said in the processes of a machine's paths, over `SOCK_SEQPACKET` pairs: the packet boundaries are the message
//! boundaries.
//!
//! ```text
//!   host process ─▶ opener     descriptors of the shown paths, in order, until the connection ends
//!   device       ─▶ opener     Request ──▶ a descriptor, or an errno
//! ```
//!
//! The opener trusts nothing that the device says. Both trust the host process.

use std::ffi::OsString;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recv, recvmsg, send, sendmsg};

/// Longest path, which is Linux's limit.
const MAX_PATH_BYTES: usize = libc::PATH_MAX as usize;

/// Bytes before the path: whether it is opened to be read, and the number of the shown path.
const HEADER_BYTES: usize = 1 + size_of::<u32>();

/// Largest request.
const MAX_REQUEST_BYTES: usize = HEADER_BYTES + MAX_PATH_BYTES;

/// Most descriptors in one packet. Linux allows 253.
const MAX_DESCRIPTORS: usize = 64;

/// The device wants something opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// Which of the shown paths.
    pub(super) root: u32,
    /// From there on; empty for itself.
    pub(super) path: PathBuf,
    /// Whether its contents are to be read; else only its metadata.
    pub(super) to_read: bool,
}

/// Bytes that are no request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the paths' device sent a packet of {length} bytes that is no request")]
pub struct NoRequest {
    /// Bytes in the packet.
    pub length: usize,
}

impl Request {
    fn decode(packet: &[u8]) -> Result<Self, NoRequest> {
        let wrong = NoRequest { length: packet.len() };
        let (&to_read, rest) = packet.split_first().ok_or(wrong.clone())?;
        let (root, path) = rest.split_first_chunk().ok_or(wrong.clone())?;
        let path = PathBuf::from(OsString::from_vec(path.to_vec()));
        match to_read {
            0 | 1 => Ok(Self { root: u32::from_le_bytes(*root), path, to_read: to_read == 1 }),
            _ => Err(wrong),
        }
    }

    fn encode(&self) -> Vec<u8> {
        [&[u8::from(self.to_read)][..], &self.root.to_le_bytes(), self.path.as_os_str().as_bytes()].concat()
    }
}

/// Gives the opener what it may open.
pub(super) fn send_shown(socket: impl AsFd, shown: &[OwnedFd]) -> io::Result<()> {
    shown.chunks(MAX_DESCRIPTORS).try_for_each(|some| send_with(&socket, &[0], some.iter().map(AsFd::as_fd)))
}

/// Waits for all that may be opened.
pub(super) fn receive_shown(socket: impl AsFd) -> io::Result<Vec<OwnedFd>> {
    let mut shown = Vec::new();
    loop {
        let (length, some) = receive_with(&socket, &mut [0])?;
        if length == 0 {
            return Ok(shown);
        }
        shown.extend(some);
    }
}

/// Waits for the next request; `None` when the device has gone.
pub(super) fn receive_request(socket: impl AsFd) -> io::Result<Option<Result<Request, NoRequest>>> {
    let mut packet = [0; MAX_REQUEST_BYTES];
    // There is no room for control messages, so the kernel closes any descriptors that a hostile device attaches.
    let length = retry(|| recv(socket.as_fd().as_raw_fd(), &mut packet, MsgFlags::MSG_TRUNC))?;
    Ok(match packet.get(..length) {
        Some([]) => None,
        Some(request) => Some(Request::decode(request)),
        None => Some(Err(NoRequest { length })),
    })
}

/// Answers a request with what was opened, or an errno.
pub(super) fn send_answer(socket: impl AsFd, opened: Result<impl AsFd, nix::Error>) -> io::Result<()> {
    match opened {
        Ok(opened) => send_with(socket, &0_i32.to_le_bytes(), [opened.as_fd()].into_iter()),
        Err(errno) => send_with(socket, &(errno as i32).to_le_bytes(), [].into_iter()),
    }
}

/// Has something opened. The guest gets `EIO` if nobody answers, since the connection's own errors would mislead it.
pub(super) fn ask(socket: impl AsFd, request: &Request) -> io::Result<OwnedFd> {
    let error = |errno| io::Error::from_raw_os_error(errno);
    if request.path.as_os_str().len() > MAX_PATH_BYTES {
        return Err(error(libc::ENAMETOOLONG));
    }
    let mut answer = [0; size_of::<i32>()];
    let packet = request.encode();
    let sent = retry(|| send(socket.as_fd().as_raw_fd(), &packet, MsgFlags::MSG_NOSIGNAL));
    let received = sent.and_then(|_| receive_with(&socket, &mut answer)).map_err(|cause| {
        if cause.raw_os_error() == Some(libc::EMFILE) {
            return cause;
        }
        tracing::debug!("nobody opens what the guest asks for: {cause}");
        error(libc::EIO)
    });
    match (received?, i32::from_le_bytes(answer)) {
        ((length, _), errno) if length == answer.len() && errno > 0 => Err(error(errno)),
        ((length, opened), 0) if length == answer.len() => opened.into_iter().next().ok_or_else(|| error(libc::EIO)),
        _ => Err(error(libc::EIO)),
    }
}

fn send_with<'a>(
    socket: impl AsFd,
    packet: &[u8],
    descriptors: impl Iterator<Item = BorrowedFd<'a>>,
) -> io::Result<()> {
    let descriptors: Vec<RawFd> = descriptors.map(|descriptor| descriptor.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let rights = if descriptors.is_empty() { &[] } else { &rights[..] };
    let parts = [IoSlice::new(packet)];
    let socket = socket.as_fd().as_raw_fd();
    retry(|| sendmsg::<UnixAddr>(socket, &parts, rights, MsgFlags::MSG_NOSIGNAL, None)).map(drop)
}

/// The next packet's length, and the descriptors that came with it. `EMFILE` if this process can't have them all.
fn receive_with(socket: impl AsFd, packet: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let mut parts = [IoSliceMut::new(packet)];
    let socket = socket.as_fd().as_raw_fd();
    let message = loop {
        match recvmsg::<UnixAddr>(socket, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
            Err(nix::Error::EINTR) => {}
            done => break done?,
        }
    };
    let mut received = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control {
            // SAFETY: the kernel has just installed these descriptors for us and nothing else knows of them.
            received.extend(descriptors.into_iter().map(|one| unsafe { OwnedFd::from_raw_fd(one) }));
        }
    }
    if message.flags.contains(MsgFlags::MSG_CTRUNC) {
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    Ok((message.bytes, received))
}

fn retry<T>(mut call: impl FnMut() -> nix::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(nix::Error::EINTR) => {}
            done => return Ok(done?),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use proptest::prelude::*;

    use super::super::testing::pair;
    use super::*;

    #[test]
    fn requests_survive_the_wire_and_nothing_else_is_one() {
        let (device, opener) = pair();
        for (root, path, to_read) in [(0, "", false), (u32::MAX, "a/b", true), (7, "../\n", false)] {
            let request = Request { root, path: path.into(), to_read };
            send(device.as_raw_fd(), &request.encode(), MsgFlags::empty()).unwrap();
            assert_eq!(receive_request(&opener).unwrap(), Some(Ok(request)));
        }
        for wrong in [vec![0; HEADER_BYTES - 1], vec![2; HEADER_BYTES], vec![0; MAX_REQUEST_BYTES + 1]] {
            send(device.as_raw_fd(), &wrong, MsgFlags::empty()).unwrap();
            assert_eq!(receive_request(&opener).unwrap(), Some(Err(NoRequest { length: wrong.len() })));
        }
        drop(device);
        assert_eq!(receive_request(&opener).unwrap(), None);
    }

    #[test]
    fn any_number_of_descriptors_arrives_in_order() {
        let files: Vec<_> = (0..2 * MAX_DESCRIPTORS + 1)
            .map(|number| {
                let file = tempfile::tempfile().unwrap();
                file.set_len(number as u64).unwrap();
                file
            })
            .collect();
        let (host, opener) = pair();
        send_shown(&host, &files.into_iter().map(OwnedFd::from).collect::<Vec<_>>()).unwrap();
        drop(host);
        let received = receive_shown(&opener).unwrap().into_iter().map(File::from);
        let lengths: Vec<_> = received.map(|file| file.metadata().unwrap().len()).collect();
        assert_eq!(lengths, (0..2 * MAX_DESCRIPTORS as u64 + 1).collect::<Vec<_>>());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_request_or_refused(packet in proptest::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(request) = Request::decode(&packet) {
                prop_assert_eq!(request.encode(), packet);
            }
        }
    }
}
