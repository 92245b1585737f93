//! A file system with an opener on a thread, for tests and fuzzing.

use std::fs::File;
use std::os::fd::OwnedFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::fs::PathsFs;
use super::opener;

/// Shows these. The thread ends with the file system.
pub(in crate::devices) fn paths_fs(shown: Vec<File>) -> PathsFs {
    let (device, theirs) = pair();
    std::thread::spawn(move || opener::serve(&theirs, &shown));
    PathsFs::new(device)
}

pub(super) fn pair() -> (OwnedFd, OwnedFd) {
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
    pair.expect("sockets can be made")
}
