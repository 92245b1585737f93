//! The process that serves a VM's inputs.

use std::os::fd::RawFd;
use std::sync::Arc;

use nix::sys::prctl::set_name;
use nix::sys::socket::SockType;

use super::blobs::MAX_OPEN;
use super::fs::InputsFs;
use super::wire::{Host, MAX_BLOBS};
use crate::devices::serve::{DeviceError, FIRST_OWN, inherited, inherited_listener, serve};
use crate::machine::jail::{allow_descriptors, confine_without_files};

/// Descriptors beside those of blobs: queues, guest memory, sockets, epoll.
const OTHER_DESCRIPTORS: u64 = 256;

/// Serves inputs. From descriptor 4 on there are `SOCK_SEQPACKET` connections to the [`Server`](super::Server).
pub(in crate::devices) fn run() -> Result<(), DeviceError> {
    let listener = inherited_listener()?;
    let connection = |number: RawFd| inherited(number, SockType::SeqPacket, "a connection to the host process");
    let mut connections = vec![connection(FIRST_OWN)?];
    connections.extend((FIRST_OWN + 1..).map_while(|number| connection(number).ok()));
    allow_descriptors(MAX_OPEN as u64 + MAX_BLOBS as u64 + OTHER_DESCRIPTORS);
    // With one connection, requests are handled by the thread that takes them off the queue: handing them on costs more
    // than they do. With several, some of them take long.
    let threads = if connections.len() > 1 { connections.len() } else { 0 };
    // Else tools show the process as "exe", which is what it was started as. Nothing depends on it.
    let _ = set_name(c"inputs-device");
    confine_without_files()?;
    serve(listener, InputsFs::new(Arc::new(Host::new(connections))), threads, &[])
}
