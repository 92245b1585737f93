//! A device's process from the inside: what each device does with its inherited descriptors.
//!
//! ```text
//!   3: listener ─┐
//!   4…: its own ─┴▶ confine ─▶ accept the VMM ─▶ filter system calls ─▶ serve ─▶ the VMM has gone: end
//! ```

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use nix::sys::socket::{SockType, getsockopt, sockopt};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon};
use virtiofsd::filesystem::FileSystem;

use super::backend::{Backend, SharedMemory};
use super::paths::OpenerError;
use super::requests::Memory;
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
    /// The threads that answer requests could not be started.
    #[error("can't start a thread")]
    Thread(#[source] io::Error),
    /// The network device could not be set up.
    #[error("can't set up the network device")]
    Network(#[source] io::Error),
    /// What the device may open, or a request to open something.
    #[error("can't open files for the paths' device")]
    Opener(#[source] OpenerError),
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
/// See [`DeviceError`]. A request that can't be answered, or a queue that makes no sense, ends the process.
pub(super) fn serve<F>(listener: UnixListener, fs: F, threads: usize, also: &[libc::c_long]) -> Result<(), DeviceError>
where
    F: FileSystem + Send + Sync + 'static,
{
    let memory = SharedMemory::new(Memory::new());
    let backend = Backend::new(fs, memory.clone(), threads).map_err(DeviceError::Thread)?;
    let daemon =
        VhostUserDaemon::new("vhost-user".into(), Arc::new(backend), memory).map_err(DeviceError::VhostUser)?;
    until_hang_up(daemon, listener, also)
}

/// Serves a device to the VMM that connects, until it hangs up. The process needs the system calls in `also` for it, too.
pub(super) fn until_hang_up<B>(
    daemon: VhostUserDaemon<B>,
    listener: UnixListener,
    also: &[libc::c_long],
) -> Result<(), DeviceError>
where
    B: VhostUserBackend<Bitmap = BitmapMmapRegion, Vring: Clone + Send + Sync> + Clone + 'static,
{
    // Its threads end with the process. One may wait for a blob, or for the VMM, and would never be joined.
    let mut daemon = ManuallyDrop::new(daemon);
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

/// A VM whose device has lost a thread would hang if the process stayed.
pub(super) fn die_of_any_panic() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        default(panic);
        std::process::exit(PANICKED);
    }));
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::mpsc::channel;
    use std::{env, thread};

    use super::*;

    /// Set for the process that panics.
    const PANICS: &str = "COFFERDAM_TEST_PANICS";

    /// The exit code of a process that has survived a panic.
    const SURVIVED: i32 = 7;

    /// As in a device: the thread is there before the system calls are restricted, and the others go on.
    fn panic_in_a_thread() -> ! {
        die_of_any_panic();
        let (restricted, wait) = channel();
        let thread = thread::spawn(move || {
            wait.recv().expect("it is sent");
            panic!("as a device would");
        });
        allow_only_what_serving_needs(&[]).expect("the kernel has seccomp");
        restricted.send(()).expect("it waits");
        let _ = thread.join();
        std::process::exit(SURVIVED);
    }

    #[test]
    fn a_panic_of_any_thread_ends_the_process() {
        if env::var_os(PANICS).is_some() {
            panic_in_a_thread();
        }
        let name = thread::current().name().expect("tests have names").to_owned();
        let mut panics = Command::new(env::current_exe().unwrap());
        let panicked = panics.args(["--exact", &name, "--nocapture"]).env(PANICS, "1").output().unwrap();
        let said = String::from_utf8_lossy(&panicked.stderr);
        assert_eq!(panicked.status.code(), Some(PANICKED), "{said}");
        assert!(said.contains("as a device would"), "{said}");
    }
}
