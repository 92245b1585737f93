//! The process that shows paths of the host.

use nix::sys::prctl::set_name;
use nix::sys::socket::SockType;

use super::fs::PathsFs;
use crate::devices::serve::{DeviceError, FIRST_OWN, inherited, inherited_listener, serve};
use crate::machine::jail::{allow_descriptors, confine_without_files};

/// The system call by which open directories of the host are listed. None takes a path: a directory's descriptor would lead to all
/// others of the host, by `..`.
pub(super) const LISTING: &[libc::c_long] = &[libc::SYS_getdents64];

/// Descriptors for what a guest has open, beside queues, guest memory and epoll.
const DESCRIPTORS: u64 = 1024;

/// Shows what the opener opens, whose connection is descriptor 4.
pub(in crate::devices) fn run() -> Result<(), DeviceError> {
    let listener = inherited_listener()?;
    let opener = inherited(FIRST_OWN, SockType::SeqPacket, "a connection to the paths' opener")?;
    allow_descriptors(DESCRIPTORS);
    let _ = set_name(c"paths-device");
    confine_without_files()?;
    serve(listener, PathsFs::new(opener), 0, LISTING)
}
