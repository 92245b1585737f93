//! A file system with an opener on a thread, for tests and fuzzing.

use std::fs::{self, File};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::fs::PathsFs;
use super::opener;
use super::wire::{Answer, Request};

/// Shows these. The thread ends with the file system.
pub(in crate::devices) fn paths_fs(shown: Vec<File>) -> PathsFs {
    let (device, theirs) = pair();
    std::thread::spawn(move || opener::serve(&theirs, &shown));
    PathsFs::new(device)
}

/// Whether a packet is a request, of which the first shown path is this directory. One that is survives encoding, and opens nothing
/// that is elsewhere.
pub(in crate::devices) fn is_contained(packet: &[u8], directory: &Path, shown: &[File]) -> bool {
    let Ok(request) = Request::decode(packet) else { return false };
    let again = postcard::to_stdvec(&request).expect("it has been decoded");
    assert_eq!(Request::decode(&again).as_ref(), Ok(&request));
    if let Ok((answer, opened)) = opener::answer(shown, &request) {
        assert_eq!(opened.is_some(), answer == Answer::Opened);
        if let Some(opened) = opened.filter(|_| request.root == 0) {
            let path = fs::read_link(format!("/proc/self/fd/{}", opened.as_raw_fd())).expect("it is open");
            assert!(path.starts_with(directory), "{request:?} opens {}", path.display());
        }
    }
    true
}

pub(super) fn pair() -> (OwnedFd, OwnedFd) {
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
    pair.expect("sockets can be made")
}
