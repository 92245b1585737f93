//! Puts a VMM's messages into the order that the `vhost` crate wants.
//!
//! QEMU enables the rings of a network device before the guest's driver has agreed on features, and of no other device. The
//! crate takes that for an error, in each of its layers. So its messages pass through here: a ring that is enabled early is
//! enabled right after the features are set.
//!
//! ```text
//!   VMM ──▶ SET_VRING_ENABLE, SET_FEATURES ──▶ here ──▶ SET_FEATURES, SET_VRING_ENABLE ──▶ the crate
//! ```

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, bind, connect, getsockname, listen, socket,
};

use crate::devices::packets;

/// Messages by number, as the vhost-user specification has them.
const SET_FEATURES: u32 = 2;
const SET_VRING_ENABLE: u32 = 18;

/// The length of a message's header: its number, flags and the length of its body.
const HEADER_BYTES: usize = 12;

/// Longest body of a message, in bytes.
const MAX_BODY_BYTES: usize = 4096;

/// Most descriptors that come with a message.
const MAX_DESCRIPTORS: usize = 32;

/// Most rings that are enabled early.
const MAX_EARLY: usize = 16;

/// Waits for the VMM to connect. Returns a listener on which it seems to connect in its place, with its messages in order.
///
/// A thread passes them on until either side hangs up.
pub(super) fn in_order(listener: &UnixListener) -> io::Result<UnixListener> {
    let (vmm, _) = listener.accept()?;
    let open = || socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
    let (place, device) = (open()?, open()?);
    // The kernel chooses a free name in this process's network namespace.
    bind(place.as_raw_fd(), &UnixAddr::new_unnamed())?;
    // There is room for one connection. If it is another process's, this one's is refused.
    listen(&place, Backlog::new(0)?)?;
    connect(device.as_raw_fd(), &getsockname::<UnixAddr>(place.as_raw_fd())?)?;
    std::thread::Builder::new().name("order".into()).spawn(move || {
        if let Err(error) = pass(&vmm.into(), &device) {
            tracing::debug!("the VMM's messages end: {error}");
        }
    })?;
    Ok(place.into())
}

/// A message, or a part of one, with its descriptors.
struct Message {
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

fn pass(vmm: &OwnedFd, device: &OwnedFd) -> io::Result<()> {
    let (mut early, mut has_features) = (Vec::new(), false);
    loop {
        let mut ready = [PollFd::new(vmm.as_fd(), PollFlags::POLLIN), PollFd::new(device.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::NONE) {
            Err(nix::Error::EINTR) => continue,
            polled => polled?,
        };
        let [from_vmm, from_device] = ready.map(|ready| ready.any().unwrap_or(true));
        if from_device {
            let answer = receive(device.as_fd(), MAX_BODY_BYTES, MsgFlags::empty())?;
            send(vmm.as_fd(), &answer)?;
        }
        if !from_vmm {
            continue;
        }
        let mut message = receive(vmm.as_fd(), HEADER_BYTES, MsgFlags::MSG_WAITALL)?;
        let Some(header) = message.bytes.first_chunk::<HEADER_BYTES>() else {
            return Err(ErrorKind::UnexpectedEof.into());
        };
        let [a, b, c, d, _, _, _, _, lengths @ ..] = *header;
        let (number, length) = (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes(lengths) as usize);
        if length > MAX_BODY_BYTES {
            return Err(ErrorKind::InvalidData.into());
        }
        if length > 0 {
            let body = receive(vmm.as_fd(), length, MsgFlags::MSG_WAITALL)?;
            message.bytes.extend(body.bytes);
            message.descriptors.extend(body.descriptors);
        }
        if number == SET_VRING_ENABLE && !has_features && early.len() < MAX_EARLY {
            early.push(message);
            continue;
        }
        send(device.as_fd(), &message)?;
        if number == SET_FEATURES {
            has_features = true;
            early.drain(..).try_for_each(|message| send(device.as_fd(), &message))?;
        }
    }
}

/// Receives at most so many bytes.
fn receive(socket: BorrowedFd<'_>, length: usize, flags: MsgFlags) -> io::Result<Message> {
    let mut bytes = vec![0; length];
    let space = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let received = packets::receive(socket, &mut bytes, space, flags)?;
    bytes.truncate(received.length);
    let descriptors = received.descriptors;
    if bytes.is_empty() { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(Message { bytes, descriptors }) }
}

fn send(socket: BorrowedFd<'_>, message: &Message) -> io::Result<()> {
    let descriptors = message.descriptors.iter().map(AsFd::as_fd);
    let sent = packets::send_with(socket, &message.bytes, descriptors, MsgFlags::empty())?;
    if sent == message.bytes.len() { Ok(()) } else { Err(ErrorKind::WriteZero.into()) }
}
