//! The process that is a VM's inputs device: from inherited descriptors to the VMM's hanging up.
//!
//! ```text
//!   3: listener ─┐
//!   4…: host ────┴▶ confine ─▶ ask for the root ─▶ accept the VMM ─▶ filter system calls ─▶ serve ─▶ the VMM has gone: end
//! ```
//!
//! The device for [paths of the host](crate::devices::paths) lives in the same way, with the paths from 4 on.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use nix::sys::prctl::set_name;
use nix::sys::socket::{SockType, getsockopt, sockopt};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::VhostUserDaemon;
use virtiofsd::filesystem::{FileSystem, SerializableFileSystem};
use virtiofsd::vhost_user::VhostUserFsBackendBuilder;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use super::blobs::MAX_OPEN;
use super::fs::InputsFs;
use super::syscalls::{FilterError, allow_only_what_serving_needs};
use super::wire::{Host, MAX_BLOBS};
use crate::devices::paths::PathsFs;
use crate::machine::jail::{ConfineError, allow_descriptors, confine_to_reading, confine_without_files};

/// The descriptors that the process inherits.
const LISTENER: RawFd = 3;
/// The first of one or several.
const HOST: RawFd = 4;

/// The system calls by which files of the host are found, looked at and listed, and that the inputs' device doesn't need.
const LOOKING_UP: &[libc::c_long] =
    &[libc::SYS_openat2, libc::SYS_newfstatat, libc::SYS_readlinkat, libc::SYS_getdents64];

/// Descriptors beside those of blobs: queues, guest memory, sockets, epoll.
const OTHER_DESCRIPTORS: u64 = 256;

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
/// To be called first thing in a process of its own, whose descriptor 3 is a vhost-user listener. Where 4 and those that
/// follow are `SOCK_SEQPACKET` connections to the [`Server`](super::Server), it serves inputs; where they are files and
/// directories, it shows these. No other thread may run yet, since a thread confines itself and those that it starts.
///
/// # Errors
///
/// See [`DeviceError`]. A request so malformed that the `virtiofsd` crate can't answer it ends the process.
pub fn run_device() -> Result<(), DeviceError> {
    let listener = UnixListener::from(inherited(LISTENER, SockType::Stream, "a listening socket")?);
    let connection = |number| inherited(number, SockType::SeqPacket, "a connection to the host process");
    let first = connection(HOST);
    let shown: Vec<_> = (HOST..).map_while(inherited_file).collect();
    die_of_any_panic();
    allow_descriptors(MAX_OPEN as u64 + MAX_BLOBS as u64 + OTHER_DESCRIPTORS);
    if !shown.is_empty() {
        let _ = set_name(c"paths-device");
        confine_to_reading(&shown)?;
        return serve(listener, PathsFs::new(shown), 0, LOOKING_UP);
    }
    let mut connections = vec![first?];
    connections.extend((HOST + 1..).map_while(|number| connection(number).ok()));
    // With one connection, requests are handled by the thread that takes them off the queue: handing them on costs more
    // than they do. With several, some of them take long.
    let threads = if connections.len() > 1 { connections.len() } else { 0 };
    let host = Arc::new(Host::new(connections));
    // Else tools show it as "exe", which is what it was started as. Nothing depends on it.
    let _ = set_name(c"fs-device");
    confine_without_files()?;
    serve(listener, InputsFs::new(host).map_err(DeviceError::Root)?, threads, &[])
}

fn serve<F>(listener: UnixListener, fs: F, threads: usize, also: &[libc::c_long]) -> Result<(), DeviceError>
where
    F: FileSystem + SerializableFileSystem + Send + Sync + 'static,
{
    let backend =
        VhostUserFsBackendBuilder::default().set_thread_pool_size(threads).build(fs).map_err(DeviceError::SetUp)?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon =
        VhostUserDaemon::new("vhost-user".into(), Arc::new(backend), memory).map_err(DeviceError::VhostUser)?;
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
fn inherited_file(descriptor: RawFd) -> Option<File> {
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
