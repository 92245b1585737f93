//! A device's process from the inside: what each device does with its inherited descriptors.
//!
//! ```text
//!   3: listener ─┐
//!   4…: its own ─┴▶ confine ─▶ accept the VMM ─▶ filter system calls ─▶ serve ─▶ the VMM has gone: end
//! ```

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use nix::sys::socket::{SockType, getsockopt, sockopt};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon};
use virtiofsd::filesystem::{FileSystem, SerializableFileSystem};
use virtiofsd::vhost_user::VhostUserFsBackendBuilder;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use super::syscalls::{FilterError, allow_only_what_serving_needs};
use crate::machine::jail::ConfineError;

/// The inherited socket on which the VMM connects.
const LISTENER: RawFd = 3;

/// The first of the device's own inherited descriptors.
pub(super) const FIRST_OWN: RawFd = 4;

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
        /// The kind of descriptor that belongs there.
        wanted: &'static str,
    },
    /// The process could not give up its rights.
    #[error("can't confine the process")]
    Confine(#[from] ConfineError),
    /// The system calls could not be restricted.
    #[error("can't restrict the process's system calls")]
    Filter(#[from] FilterError),
    /// The device could not be set up.
    #[error("can't set up the virtiofs device")]
    SetUp(#[source] virtiofsd::vhost_user::Error),
    /// The network device could not be set up.
    #[error("can't set up the network device")]
    Network(#[source] io::Error),
    /// The VMM did not connect, or said something wrong.
    #[error("the connection to the VMM failed: {0}")]
    VhostUser(vhost_user_backend::Error),
}

/// The socket on which the VMM connects.
pub(super) fn inherited_listener() -> Result<UnixListener, DeviceError> {
    inherited(LISTENER, SockType::Stream, "a listening socket").map(Into::into)
}

/// Serves a file system to the VMM that connects, until it hangs up. With `threads`, requests are handled by as many, else
/// by the thread that takes them off the queue. The process needs the system calls in `also` for it, too.
///
/// # Errors
///
/// See [`DeviceError`]. A request so malformed that the `virtiofsd` crate can't answer it ends the process.
pub(super) fn serve<F>(listener: UnixListener, fs: F, threads: usize, also: &[libc::c_long]) -> Result<(), DeviceError>
where
    F: FileSystem + SerializableFileSystem + Send + Sync + 'static,
{
    let backend =
        VhostUserFsBackendBuilder::default().set_thread_pool_size(threads).build(fs).map_err(DeviceError::SetUp)?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let daemon =
        VhostUserDaemon::new("vhost-user".into(), Arc::new(backend), memory).map_err(DeviceError::VhostUser)?;
    until_hang_up(daemon, listener, also)
}

/// Serves a device to the VMM that connects, until it hangs up. The process needs the system calls in `also` for it, too.
pub(super) fn until_hang_up<B>(
    mut daemon: VhostUserDaemon<B>,
    listener: UnixListener,
    also: &[libc::c_long],
) -> Result<(), DeviceError>
where
    B: VhostUserBackend<Bitmap = BitmapMmapRegion, Vring: Clone + Send + Sync> + Clone + 'static,
{
    daemon.start(&mut Listener::from(listener)).map_err(DeviceError::VhostUser)?;
    // Every thread is there, and the guest does not run before the VMM has had its first answers.
    allow_only_what_serving_needs(also)?;
    match daemon.wait() {
        // A VMM that is killed hangs up wherever it is.
        Err(vhost_user_backend::Error::HandleRequest(
            VhostUserError::Disconnected | VhostUserError::PartialMessage,
        )) => Ok(()),
        ended => ended.map_err(DeviceError::VhostUser),
    }
}

/// A file or directory that the process inherits.
pub(super) fn inherited_file(descriptor: RawFd) -> Option<File> {
    // SAFETY: called once for each number, before anything else in the process could have made such a descriptor; when
    // there is none, or it is something else, the value is forgotten and never closed.
    let file = unsafe { File::from_raw_fd(descriptor) };
    match file.metadata() {
        Ok(found) if found.is_dir() || found.is_file() => Some(file),
        _ => {
            std::mem::forget(file);
            None
        }
    }
}

pub(super) fn inherited(descriptor: RawFd, kind: SockType, wanted: &'static str) -> Result<OwnedFd, DeviceError> {
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
pub(super) fn die_of_any_panic() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        default(panic);
        std::process::exit(PANICKED);
    }));
}
