//! The process of a network device.

use std::sync::{Arc, Mutex};

use nix::sys::prctl::set_name;
use nix::sys::socket::SockType;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

use super::backend::{Backend, EVENTS_ID};
use super::order::in_order;
use super::ring::GuestMemory;
use crate::devices::serve::{DeviceError, FIRST_OWN, inherited, inherited_listener, until_hang_up};
use crate::machine::jail::{allow_descriptors, confine_without_files};

/// Descriptors for connections, beside queues, guest memory and epoll.
const DESCRIPTORS: u64 = 1024;

/// The system calls by which a connection's end is passed on, and the clock is set.
const CONNECTIONS: &[libc::c_long] = &[libc::SYS_shutdown, libc::SYS_timerfd_settime];

/// Serves the network. Descriptor 4 is a `SOCK_SEQPACKET` connection to the [`Server`](super::server::Server). See
/// [`ENABLED_EARLY`](crate::devices::ENABLED_EARLY) for the argument.
pub(in crate::devices) fn run(enabled_early: bool) -> Result<(), DeviceError> {
    let listener = inherited_listener()?;
    let broker = inherited(FIRST_OWN, SockType::SeqPacket, "a connection to the host process")?;
    allow_descriptors(DESCRIPTORS);
    let _ = set_name(c"net-device");
    confine_without_files()?;
    let memory = GuestMemory::new(GuestMemoryMmap::new());
    let backend = Backend::new(memory.clone(), broker).map_err(DeviceError::Network)?;
    let events = backend.events();
    let backend = Arc::new(Mutex::new(backend));
    let daemon = VhostUserDaemon::new("vhost-user".into(), backend, memory).map_err(DeviceError::VhostUser)?;
    for worker in daemon.get_epoll_handlers() {
        worker.register_listener(events, EventSet::IN, EVENTS_ID).map_err(DeviceError::Network)?;
    }
    let listener = if enabled_early { in_order(&listener).map_err(DeviceError::Network)? } else { listener };
    until_hang_up(daemon, listener, CONNECTIONS)
}
