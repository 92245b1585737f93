//! Bytes over Unix sockets, with descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};

/// What was received.
pub(super) struct Received {
    /// Bytes.
    pub(super) length: usize,
    /// The descriptors that came with them.
    pub(super) descriptors: Vec<OwnedFd>,
    /// Has `MSG_CTRUNC` if this process could not have all descriptors.
    pub(super) flags: MsgFlags,
}

/// Receives bytes and descriptors, for which `space` has room, see [`nix::cmsg_space`].
pub(super) fn receive(
    socket: impl AsFd,
    bytes: &mut [u8],
    mut space: Vec<u8>,
    flags: MsgFlags,
) -> io::Result<Received> {
    let mut parts = [IoSliceMut::new(bytes)];
    let (socket, flags) = (socket.as_fd().as_raw_fd(), flags | MsgFlags::MSG_CMSG_CLOEXEC);
    let message = loop {
        match recvmsg::<UnixAddr>(socket, &mut parts, Some(&mut space), flags) {
            Err(nix::Error::EINTR) => {}
            done => break done?,
        }
    };
    let mut descriptors = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(all) = control {
            // SAFETY: the kernel has just installed these descriptors for us and nothing else knows of them.
            descriptors.extend(all.into_iter().map(|one| unsafe { OwnedFd::from_raw_fd(one) }));
        }
    }
    Ok(Received { length: message.bytes, descriptors, flags: message.flags })
}

/// Sends bytes with descriptors, and returns how many bytes were sent.
pub(super) fn send_with<'a>(
    socket: impl AsFd,
    bytes: &[u8],
    descriptors: impl IntoIterator<Item = BorrowedFd<'a>>,
    flags: MsgFlags,
) -> io::Result<usize> {
    let descriptors: Vec<RawFd> = descriptors.into_iter().map(|descriptor| descriptor.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let rights = if descriptors.is_empty() { &[] } else { &rights[..] };
    let (socket, flags) = (socket.as_fd().as_raw_fd(), flags | MsgFlags::MSG_NOSIGNAL);
    retry(|| sendmsg::<UnixAddr>(socket, &[IoSlice::new(bytes)], rights, flags, None))
}

/// Calls again when a signal has interrupted the call.
pub(super) fn retry<T>(mut call: impl FnMut() -> nix::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(nix::Error::EINTR) => {}
            done => return Ok(done?),
        }
    }
}
