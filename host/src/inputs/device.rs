//! The process that is a VM's inputs device: from inherited descriptors to the VMM's hanging up.
//!
//! ```text
//!   3: listener ─┐
//!   4: host ─────┴▶ confine ─▶ ask for the root ─▶ accept the VMM ─▶ filter system calls ─▶ serve ─▶ the VMM has gone: end
//! ```

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use nix::sys::prctl::set_name;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{SockType, getsockopt, sockopt};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::VhostUserDaemon;
use virtiofsd::vhost_user::VhostUserFsBackendBuilder;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use super::blobs::MAX_OPEN;
use super::fs::InputsFs;
use super::syscalls::{FilterError, allow_only_what_serving_needs};
use super::wire::{Host, MAX_BLOBS};
use crate::jail::{ConfineError, confine_without_files};

/// The descriptors that the process inherits.
const LISTENER: RawFd = 3;
const HOST: RawFd = 4;

/// Descriptors beside those of blobs: queues, guest memory, sockets, epoll.
const OTHER_DESCRIPTORS: u64 = 256;

/// Requests are handled by the thread that takes them off the queue: handing them on costs more than they do.
const THREADS: usize = 0;

/// The exit code after a panic, as Rust's own is.
const PANICKED: i32 = 101;

/// Why a device process ended.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Not started by the host process.
    #[error("descriptor {descriptor} is not {wanted}: this command is for the program's own use")]
    Inherited {
        /// The number.
        descriptor: RawFd,
        /// What it should be.
        wanted: &'static str,
    },
    /// The process could not give up its rights.
    #[error("can't confine the process")]
    Confine(#[from] ConfineError),
    /// The system calls could not be restricted.
    #[error("can't restrict the process's system calls")]
    Filter(#[from] FilterError),
    /// The host process did not answer.
    #[error("can't get the root of the inputs from the host process")]
    Root(#[source] io::Error),
    /// The device could not be set up.
    #[error("can't set up the virtiofs device")]
    SetUp(#[source] virtiofsd::vhost_user::Error),
    /// The VMM did not connect, or said something wrong.
    #[error("the connection to the VMM failed: {0}")]
    VhostUser(vhost_user_backend::Error),
}

/// Serves one VM, until its VMM hangs up.
///
/// To be called first thing in a process of its own, whose descriptor 3 is a vhost-user listener and 4 a
/// `SOCK_SEQPACKET` connection to the [`Server`](super::Server): no other thread may run yet, since a thread confines
/// itself and those that it starts.
///
/// # Errors
///
/// See [`DeviceError`]. A request so malformed that the `virtiofsd` crate can't answer it ends the process.
pub fn run_device() -> Result<(), DeviceError> {
    let listener = UnixListener::from(inherited(LISTENER, SockType::Stream, "a listening socket")?);
    let host = Arc::new(Host::new(inherited(HOST, SockType::SeqPacket, "a connection to the host process")?));
    // Else tools show it as "exe", which is what it was started as. Nothing depends on it.
    let _ = set_name(c"fs-device");
    die_of_any_panic();
    allow_descriptors();
    confine_without_files()?;

    let fs = InputsFs::new(host).map_err(DeviceError::Root)?;
    let backend =
        VhostUserFsBackendBuilder::default().set_thread_pool_size(THREADS).build(fs).map_err(DeviceError::SetUp)?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon =
        VhostUserDaemon::new("vhost-user".into(), Arc::new(backend), memory).map_err(DeviceError::VhostUser)?;
    daemon.start(&mut Listener::from(listener)).map_err(DeviceError::VhostUser)?;
    // Every thread is there, and the guest does not run before the VMM has had its first answers.
    allow_only_what_serving_needs()?;
    match daemon.wait() {
        // A VMM that is killed hangs up wherever it is.
        Err(vhost_user_backend::Error::HandleRequest(
            VhostUserError::Disconnected | VhostUserError::PartialMessage,
        )) => Ok(()),
        ended => ended.map_err(DeviceError::VhostUser),
    }
}

fn inherited(descriptor: RawFd, kind: SockType, wanted: &'static str) -> Result<OwnedFd, DeviceError> {
    // SAFETY: called once for each number, before anything else in the process could have made such a descriptor; when
    // there is none, the value is forgotten and never closed.
    let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };
    match getsockopt(&socket, sockopt::SockType) {
        Ok(found) if found == kind => Ok(socket),
        _ => {
            std::mem::forget(socket);
            Err(DeviceError::Inherited { descriptor, wanted })
        }
    }
}

/// A guest can make the thread that serves it panic, through buffers that are too short for an answer. Then it has lost
/// its device: a process that stayed would only leave the VM hanging.
fn die_of_any_panic() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        default(panic);
        std::process::exit(PANICKED);
    }));
}

/// Without this the open blobs may not fit; if it fails, reads beyond the limit fail, which the guest sees.
fn allow_descriptors() {
    let wanted = MAX_OPEN as u64 + MAX_BLOBS as u64 + OTHER_DESCRIPTORS;
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) if soft < wanted => {
            if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, wanted.min(hard), hard) {
                tracing::warn!("can't raise the limit on open files from {soft} to {wanted}: {error}");
            }
        }
        _ => {}
    }
}
