//! The process that opens what the device's guest asks for, beneath the shown paths.
//!
//! ```text
//!   waits for the shown paths ──▶ confines itself to them ──▶ answers the device, until that has gone
//! ```
//!
//! It reads nothing of the device's before it is confined.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::Path;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::prctl::set_name;
use nix::sys::socket::{SockType, setsockopt, sockopt};
use nix::sys::stat::fstat;

use super::wire::{self, NoRequest, Request};
use crate::devices::serve::{DeviceError, inherited};
use crate::devices::syscalls::allow_only_what_serving_needs;
use crate::machine::jail::{allow_descriptors, confine_to_reading};

/// The inherited connection over which the shown paths come.
const HOST: RawFd = 3;

/// The inherited connection to the device.
const DEVICE: RawFd = 4;

/// The system calls by which files of the host are found.
const FINDING: &[libc::c_long] = &[libc::SYS_openat2, libc::SYS_newfstatat];

/// Descriptors for the shown paths, of which a request has at most 1024.
const DESCRIPTORS: u64 = 2048;

/// Bytes of answers that the device hasn't taken. The kernel makes it its least, so that a device that takes none has few
/// descriptors on their way.
const UNTAKEN_BYTES: usize = 1;

/// Why the opener ended.
#[derive(Debug, thiserror::Error)]
pub enum OpenerError {
    /// A connection broke.
    #[error("a connection of the paths' opener failed: {0}")]
    Connection(#[from] io::Error),
    /// The device sent something else than a request: it has been taken over or is broken.
    #[error(transparent)]
    Protocol(#[from] NoRequest),
}

/// Waits for the shown paths, and opens what is beneath them.
pub(in crate::devices) fn run() -> Result<(), DeviceError> {
    let connection = |number, wanted| inherited(number, SockType::SeqPacket, wanted);
    let host = connection(HOST, "a connection to the host process")?;
    let device = connection(DEVICE, "a connection to the paths' device")?;
    allow_descriptors(DESCRIPTORS);
    let _ = set_name(c"paths-opener");
    let failed = |error| DeviceError::Opener(OpenerError::Connection(error));
    let shown: Vec<File> = wire::receive_shown(&host).map_err(failed)?.into_iter().map(File::from).collect();
    drop(host);
    setsockopt(&device, sockopt::SndBuf, &UNTAKEN_BYTES).map_err(|error| failed(error.into()))?;
    confine_to_reading(&shown)?;
    allow_only_what_serving_needs(FINDING)?;
    serve(&device, &shown).map_err(DeviceError::Opener)
}

/// Answers a device until it has gone.
pub(super) fn serve(device: &OwnedFd, shown: &[File]) -> Result<(), OpenerError> {
    while let Some(request) = unless_gone(wire::receive_request(device))?.flatten() {
        let request = request?;
        let answered = match open(shown, &request) {
            Ok(Opened::Shown(file)) => wire::send_answer(device, Ok(file)),
            Ok(Opened::Beneath(file)) => wire::send_answer(device, Ok(file)),
            Err(errno) => wire::send_answer(device, Err::<OwnedFd, _>(errno)),
        };
        if unless_gone(answered)?.is_none() {
            break;
        }
    }
    Ok(())
}

/// Something that the device may have.
enum Opened<'a> {
    /// A shown file itself.
    Shown(&'a File),
    Beneath(OwnedFd),
}

/// Opens the file at a place itself. It follows no symlink and crosses no mount, even if the path was just replaced.
fn open<'a>(shown: &'a [File], request: &Request) -> nix::Result<Opened<'a>> {
    let root = usize::try_from(request.root).ok().and_then(|number| shown.get(number)).ok_or(nix::Error::ENOENT)?;
    let is_itself = request.path.as_os_str().is_empty();
    if is_itself && fstat(root)?.st_mode & libc::S_IFMT != libc::S_IFDIR {
        return Ok(Opened::Shown(root));
    }
    let path = if is_itself { Path::new(".") } else { &request.path };
    let resolve = ResolveFlag::RESOLVE_BENEATH
        | ResolveFlag::RESOLVE_NO_SYMLINKS
        | ResolveFlag::RESOLVE_NO_MAGICLINKS
        | ResolveFlag::RESOLVE_NO_XDEV;
    let flags = match request.to_read {
        true => OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY,
        false => OFlag::O_PATH,
    };
    let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    openat2(root.as_fd(), path, OpenHow::new().flags(flags).resolve(resolve)).map(Opened::Beneath)
}

/// `None` when the device has gone, perhaps with an answer unread: that is an end like any other.
fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe) => Ok(None),
        Err(error) => Err(error),
    }
}
