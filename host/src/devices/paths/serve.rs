//! The process that shows paths of the host.

use nix::sys::prctl::set_name;

use super::fs::PathsFs;
use crate::devices::serve::{DeviceError, FIRST_OWN, inherited_file, inherited_listener, serve};
use crate::machine::jail::{allow_descriptors, confine_to_reading};

/// The system calls by which files of the host are found, looked at and listed.
const LOOKING_UP: &[libc::c_long] =
    &[libc::SYS_openat2, libc::SYS_newfstatat, libc::SYS_readlinkat, libc::SYS_getdents64];

/// Descriptors for what a guest has open, beside queues, guest memory and epoll.
const DESCRIPTORS: u64 = 1024;

/// Shows files and directories, which are the descriptors from 4 on.
pub(in crate::devices) fn run() -> Result<(), DeviceError> {
    let listener = inherited_listener()?;
    let shown: Vec<_> = (FIRST_OWN..).map_while(inherited_file).collect();
    allow_descriptors(DESCRIPTORS);
    let _ = set_name(c"paths-device");
    confine_to_reading(&shown)?;
    serve(listener, PathsFs::new(shown), 0, LOOKING_UP)
}
