//! What the device asks the host process, over a `SOCK_SEQPACKET` pair: the packet boundaries are the message boundaries.
//!
//! ```text
//!   device ─▶ host   0                        the root directory
//!                    3                        how the inputs appear
//!                    1 digest                 a directory
//!                    2 digest{1..=MAX_BLOBS}  blobs
//!   host ─▶ device   length:u32le, then that many bytes of a Directory in packets of at most MAX_PACKET_BYTES
//!                    the same with the time of read-only inputs in seconds:u64le, and the paths of writable copies, a NUL
//!                    after each
//!                    which of the blobs:u64le, the first one in bit 0, with a read-only descriptor for each, in the
//!                    order asked for
//! ```
//!
//! The first blob is wanted, and waited for. The others are guesses, and left out when they are not at hand. There may be
//! several connections, so that one blob which takes long does not hold up the others.
//!
//! The host side trusts nothing that it reads. The device trusts the host, and checks only what keeps its own mistakes
//! apart from the guest's.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd, RawFd};

use cofferdam_castore::{B3Digest, Directory};
use nix::sys::socket::{MsgFlags, recv, send};
use parking_lot::{Condvar, Mutex};

use crate::devices::packets::{self, retry};

/// Most blobs in one request; the kernel passes at most 253 descriptors in one message.
pub(super) const MAX_BLOBS: usize = 64;

/// Largest piece of a directory in one packet: well below the smallest usual socket buffer.
const MAX_PACKET_BYTES: usize = 32 * 1024;

const DIGEST_BYTES: usize = B3Digest::LENGTH;
const MAX_REQUEST_BYTES: usize = 1 + MAX_BLOBS * DIGEST_BYTES;

const ROOT: u8 = 0;
const DIRECTORY: u8 = 1;
const BLOBS: u8 = 2;
const APPEARANCE: u8 = 3;

/// A well-formed question of the device's.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Root,
    Appearance,
    Directory(B3Digest),
    Blobs(Vec<B3Digest>),
}

/// Bytes that are no request for inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a packet of {length} bytes that begins with {tag} is no request")]
pub struct NoRequest {
    /// Bytes in the packet.
    pub length: usize,
    /// Its first byte.
    pub tag: u8,
}

impl Request {
    pub(crate) fn decode(packet: &[u8]) -> Result<Self, NoRequest> {
        let (&tag, rest) = packet.split_first().ok_or(NoRequest { length: 0, tag: 0 })?;
        let (digests, left_over) = rest.as_chunks::<DIGEST_BYTES>();
        match (tag, digests, left_over) {
            (ROOT, [], []) => Ok(Self::Root),
            (APPEARANCE, [], []) => Ok(Self::Appearance),
            (DIRECTORY, [digest], []) => Ok(Self::Directory(B3Digest::from(*digest))),
            (BLOBS, [_, ..], []) if digests.len() <= MAX_BLOBS => {
                Ok(Self::Blobs(digests.iter().map(|digest| B3Digest::from(*digest)).collect()))
            }
            _ => Err(NoRequest { length: packet.len(), tag }),
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Root => vec![ROOT],
            Self::Appearance => vec![APPEARANCE],
            Self::Directory(digest) => [&[DIRECTORY], digest.as_slice()].concat(),
            Self::Blobs(digests) => {
                let mut packet = vec![BLOBS];
                packet.extend(digests.iter().flat_map(B3Digest::as_slice));
                packet
            }
        }
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
        None => Some(Err(NoRequest { length, tag: packet[0] })),
    })
}

/// Answers a request for a directory or for the appearance of the inputs.
pub(super) fn send_whole(socket: impl AsFd, bytes: &[u8]) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
    send_packet(&socket, &length.to_le_bytes())?;
    bytes.chunks(MAX_PACKET_BYTES).try_for_each(|piece| send_packet(&socket, piece))
}

/// Answers a request for at most [`MAX_BLOBS`] blobs. The first one must be there.
pub(super) fn send_blobs(socket: impl AsFd, files: &[Option<File>]) -> io::Result<()> {
    let there = files.iter().enumerate().fold(0_u64, |there, (at, file)| there | u64::from(file.is_some()) << at);
    let descriptors = files.iter().flatten().map(AsFd::as_fd);
    packets::send_with(socket, &there.to_le_bytes(), descriptors, MsgFlags::empty()).map(drop)
}

fn send_packet(socket: impl AsFd, packet: &[u8]) -> io::Result<()> {
    retry(|| send(socket.as_fd().as_raw_fd(), packet, MsgFlags::MSG_NOSIGNAL))?;
    Ok(())
}

/// The device's ends of its connections. On each, threads take turns: one question, one answer.
#[derive(Debug)]
pub(in crate::devices) struct Host {
    idle: Mutex<Vec<OwnedFd>>,
    became_idle: Condvar,
}

impl Host {
    pub(in crate::devices) fn new(sockets: Vec<OwnedFd>) -> Self {
        Self { idle: Mutex::new(sockets), became_idle: Condvar::new() }
    }

    /// The directory that holds the request's inputs.
    pub(super) fn root(&self) -> io::Result<Directory> {
        self.ask(&Request::Root, receive_directory)
    }

    /// The time of read-only inputs in seconds since the epoch, and the paths below the root of which the build has writable
    /// copies. Each may be any bytes.
    pub(super) fn appearance(&self) -> io::Result<(u64, Vec<Vec<u8>>)> {
        let answer = self.ask(&Request::Appearance, receive_whole)?;
        let (time, paths) = answer.split_first_chunk().ok_or_else(out_of_step)?;
        let paths = paths.split_inclusive(|byte| *byte == 0).filter_map(|path| Some(path.strip_suffix(&[0])?.to_vec()));
        Ok((u64::from_le_bytes(*time), paths.collect()))
    }

    pub(super) fn directory(&self, digest: &B3Digest) -> io::Result<Directory> {
        self.ask(&Request::Directory(*digest), receive_directory)
    }

    /// The files of at most [`MAX_BLOBS`] blobs: of the first, and of those others that are at hand.
    pub(super) fn blobs(&self, digests: Vec<B3Digest>) -> io::Result<Vec<(B3Digest, File)>> {
        self.ask(&Request::Blobs(digests.clone()), |socket| {
            let (there, files) = receive_files(socket)?;
            let digests: Vec<_> = digests
                .into_iter()
                .enumerate()
                .filter(|(at, _)| there >> at & 1 == 1)
                .map(|(_, digest)| digest)
                .collect();
            if there & 1 == 0 || files.len() != digests.len() {
                return Err(out_of_step());
            }
            Ok(digests.into_iter().zip(files).collect())
        })
    }

    /// The guest gets `EIO` for any failure, since the connection's own errors (`EPIPE`) would mislead it. The host process
    /// reports the cause.
    fn ask<T>(&self, request: &Request, receive: impl FnOnce(&OwnedFd) -> io::Result<T>) -> io::Result<T> {
        let mut idle = self.idle.lock();
        self.became_idle.wait_while(&mut idle, |idle| idle.is_empty());
        let Some(socket) = idle.pop() else { return Err(io::Error::from_raw_os_error(libc::EIO)) };
        drop(idle);
        let answer = send_packet(&socket, &request.encode()).and_then(|()| receive(&socket));
        self.idle.lock().push(socket);
        self.became_idle.notify_one();
        answer.map_err(|error| {
            tracing::debug!("no answer from the host process: {error}");
            io::Error::from_raw_os_error(libc::EIO)
        })
    }
}

fn receive_directory(socket: &OwnedFd) -> io::Result<Directory> {
    Directory::decode(&receive_whole(socket)?).map_err(io::Error::other)
}

fn receive_whole(socket: &OwnedFd) -> io::Result<Vec<u8>> {
    let mut length = [0; size_of::<u32>()];
    receive_exactly(socket, &mut length)?;
    let mut bytes = vec![0; u32::from_le_bytes(length) as usize];
    for piece in bytes.chunks_mut(MAX_PACKET_BYTES) {
        receive_exactly(socket, piece)?;
    }
    Ok(bytes)
}

fn receive_exactly(socket: &OwnedFd, packet: &mut [u8]) -> io::Result<()> {
    let length = retry(|| recv(socket.as_raw_fd(), packet, MsgFlags::MSG_TRUNC))?;
    if length == packet.len() { Ok(()) } else { Err(out_of_step()) }
}

fn receive_files(socket: &OwnedFd) -> io::Result<(u64, Vec<File>)> {
    let mut there = [0; size_of::<u64>()];
    let space = nix::cmsg_space!([RawFd; MAX_BLOBS]);
    let received = packets::receive(socket, &mut there, space, MsgFlags::empty())?;
    Ok((u64::from_le_bytes(there), received.descriptors.into_iter().map(File::from).collect()))
}

/// The host closed the connection, or answered something else than it was asked.
fn out_of_step() -> io::Error {
    io::ErrorKind::UnexpectedEof.into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn digests(count: usize) -> Vec<B3Digest> {
        (0..count).map(|index| B3Digest::of(&index.to_le_bytes())).collect()
    }

    #[test]
    fn requests_survive_the_wire() {
        let requests =
            [Request::Root, Request::Appearance, Request::Directory(digests(1)[0]), Request::Blobs(digests(MAX_BLOBS))];
        for request in requests {
            assert_eq!(Request::decode(&request.encode()), Ok(request));
        }
    }

    #[test]
    fn packets_of_the_wrong_size_are_no_requests() {
        let whole = Request::Blobs(digests(2)).encode();
        let too_many = Request::Blobs(digests(MAX_BLOBS + 1)).encode();
        let packets = [
            &[][..],
            &[ROOT, 0],
            &[DIRECTORY],
            &[BLOBS],
            &whole[..40],
            &[&[DIRECTORY], &whole[1..]].concat(),
            &too_many,
        ];
        for packet in packets {
            assert!(Request::decode(packet).is_err(), "{} bytes", packet.len());
        }
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
