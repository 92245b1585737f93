//! What is said in the processes of a machine's paths, over `SOCK_SEQPACKET` pairs: the packet boundaries are the message
//! boundaries.
//!
//! ```text
//!   host process ─▶ opener     descriptors of the shown paths, in order, until the connection ends
//!   device       ─▶ opener     Request ──▶ Answer, perhaps with a descriptor
//! ```
//!
//! Requests and answers are encoded with [postcard](https://postcard.jamesmunns.com). The opener trusts nothing that the device
//! says. The device trusts the opener, and both trust the host process.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};

use nix::sys::socket::{MsgFlags, recv, send};
use nix::sys::stat::FileStat;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::devices::packets::{self, retry, send_with};

/// Longest path, and longest target of a symlink, which are Linux's limits.
const MAX_PATH_BYTES: usize = libc::PATH_MAX as usize;

/// Largest request or answer.
const MAX_PACKET_BYTES: usize = MAX_PATH_BYTES + 64;

/// Most descriptors in one packet. Linux allows 253.
const MAX_DESCRIPTORS: usize = 64;

/// A question of the device's about a place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::devices) struct Request {
    /// Which of the shown paths.
    pub(super) root: u32,
    /// From there on; empty for itself.
    pub(super) path: ByteBuf,
    pub(super) want: Want,
}

/// What the device wants of a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Want {
    Attributes,
    /// The target of a symlink.
    Target,
    /// A file's contents.
    File,
    /// A directory's listing.
    Directory,
}

/// An answer of the opener's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Answer {
    Attributes(Attributes),
    Target(ByteBuf),
    /// The packet comes with the file or the directory, open to be read.
    Opened,
    /// An errno.
    Refused(i32),
}

/// What a guest may know of a file, beside its contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Attributes {
    pub(super) mode: u32,
    pub(super) size: u64,
    pub(super) blocks: u64,
    pub(super) block_size: u32,
    /// In seconds.
    pub(super) modified: u64,
}

impl From<FileStat> for Attributes {
    fn from(stat: FileStat) -> Self {
        Self {
            mode: stat.st_mode,
            size: stat.st_size.cast_unsigned(),
            blocks: stat.st_blocks.cast_unsigned(),
            block_size: u32::try_from(stat.st_blksize).unwrap_or_default(),
            modified: stat.st_mtime.cast_unsigned(),
        }
    }
}

/// Bytes that are no request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the paths' device sent a packet of {length} bytes that is no request")]
pub struct NoRequest {
    /// Bytes in the packet.
    pub length: usize,
}

impl Request {
    pub(in crate::devices) fn decode(packet: &[u8]) -> Result<Self, NoRequest> {
        match postcard::take_from_bytes(packet) {
            Ok((request, [])) => Ok(request),
            _ => Err(NoRequest { length: packet.len() }),
        }
    }
}

/// Gives the opener what it may open.
pub(super) fn send_shown(socket: impl AsFd, shown: &[OwnedFd]) -> io::Result<()> {
    let send = |some: &[OwnedFd]| send_with(&socket, &[0], some.iter().map(AsFd::as_fd), MsgFlags::empty()).map(drop);
    shown.chunks(MAX_DESCRIPTORS).try_for_each(send)
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
    let mut packet = [0; MAX_PACKET_BYTES];
    // There is no room for control messages, so the kernel closes any descriptors that a hostile device attaches.
    let length = retry(|| recv(socket.as_fd().as_raw_fd(), &mut packet, MsgFlags::MSG_TRUNC))?;
    Ok(match packet.get(..length) {
        Some([]) => None,
        Some(request) => Some(Request::decode(request)),
        None => Some(Err(NoRequest { length })),
    })
}

/// Sends an answer, perhaps with a descriptor.
pub(super) fn send_answer(socket: impl AsFd, answer: &Answer, with: Option<BorrowedFd<'_>>) -> io::Result<()> {
    send_with(socket, &encode(answer)?, with, MsgFlags::empty()).map(drop)
}

/// Has a question answered. The guest gets `EIO` if nobody answers, since the connection's own errors would mislead it.
pub(super) fn ask(socket: impl AsFd, request: &Request) -> io::Result<(Answer, Option<OwnedFd>)> {
    let error = |errno| io::Error::from_raw_os_error(errno);
    if request.path.len() > MAX_PATH_BYTES {
        return Err(error(libc::ENAMETOOLONG));
    }
    let mut packet = [0; MAX_PACKET_BYTES];
    let asked = encode(request)?;
    let sent = retry(|| send(socket.as_fd().as_raw_fd(), &asked, MsgFlags::MSG_NOSIGNAL));
    let received = sent.and_then(|_| receive_with(&socket, &mut packet)).map_err(|cause| {
        if cause.raw_os_error() == Some(libc::EMFILE) {
            return cause;
        }
        tracing::debug!("nobody opens what the guest asks for: {cause}");
        error(libc::EIO)
    });
    let (length, with) = received?;
    match packet.get(..length).map(postcard::from_bytes) {
        Some(Ok(Answer::Refused(errno))) => Err(error(errno)),
        Some(Ok(answer)) => Ok((answer, with.into_iter().next())),
        _ => Err(error(libc::EIO)),
    }
}

fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    postcard::to_stdvec(message).map_err(io::Error::other)
}

/// The next packet's length, and the descriptors that came with it. `EMFILE` if this process can't have them all.
fn receive_with(socket: impl AsFd, packet: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let space = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let received = packets::receive(socket, packet, space, MsgFlags::empty())?;
    if received.flags.contains(MsgFlags::MSG_CTRUNC) {
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    Ok((received.length, received.descriptors))
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
        let long = "x".repeat(MAX_PATH_BYTES);
        for (root, path, want) in
            [(0, "", Want::Attributes), (u32::MAX, &long, Want::File), (7, "../\n", Want::Directory)]
        {
            let request = Request { root, path: ByteBuf::from(path), want };
            send(device.as_raw_fd(), &encode(&request).unwrap(), MsgFlags::empty()).unwrap();
            assert_eq!(receive_request(&opener).unwrap(), Some(Ok(request)));
        }
        for wrong in [vec![0; 2], vec![0; 4], vec![0, 0, 4], vec![0, 2, 0], vec![0; MAX_PACKET_BYTES + 1]] {
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
                prop_assert_eq!(Request::decode(&encode(&request).unwrap()), Ok(request));
            }
        }
    }
}
