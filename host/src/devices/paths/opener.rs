//! The process that opens what the device's guest asks for, beneath the shown paths.
//!
//! ```text
//!   waits for the shown paths ──▶ confines itself to them ──▶ answers the device, until that has gone
//! ```
//!
//! It reads nothing of the device's before it is confined. It holds each rule itself, since a device that has been taken over holds
//! none: it goes from name to name, through directories that everybody may enter, and gives only files and directories that
//! everybody may read.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt as _;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2, readlinkat};
use nix::sys::prctl::set_name;
use nix::sys::socket::{SockType, setsockopt, sockopt};
use nix::sys::stat::{FileStat, fstat};
use nix::unistd::dup;

use super::wire::{self, Answer, NoRequest, Request, Want};
use crate::devices::serve::{DeviceError, inherited};
use crate::devices::syscalls::allow_only_what_serving_needs;
use crate::machine::jail::{allow_descriptors, confine_to_reading};

/// The inherited connection over which the shown paths come.
const HOST: RawFd = 3;

/// The inherited connection to the device.
const DEVICE: RawFd = 4;

/// The system calls by which files of the host are found and looked at.
const FINDING: &[libc::c_long] = &[libc::SYS_openat2, libc::SYS_newfstatat, libc::SYS_readlinkat];

/// Descriptors for the shown paths, of which a request has at most 1024. Behind walls the process may have no more in all.
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
        let (answer, with) = answer(shown, &request?).unwrap_or_else(|errno| (Answer::Refused(errno as i32), None));
        if unless_gone(wire::send_answer(device, &answer, with.as_ref().map(AsFd::as_fd)))?.is_none() {
            break;
        }
    }
    Ok(())
}

/// The answer to a request, and what goes with it.
pub(super) fn answer(shown: &[File], request: &Request) -> nix::Result<(Answer, Option<OwnedFd>)> {
    let root = usize::try_from(request.root).ok().and_then(|number| shown.get(number)).ok_or(Errno::ENOENT)?;
    let place = Place::find(root, &request.path)?;
    let found = place.open(OFlag::O_PATH)?;
    let stat = fstat(&found)?;
    match (request.want, kind(&stat)) {
        (Want::Attributes, libc::S_IFREG | libc::S_IFDIR | libc::S_IFLNK) => {
            Ok((Answer::Attributes(stat.into()), None))
        }
        (Want::Attributes, _) => Err(Errno::EACCES),
        (Want::Target, libc::S_IFLNK) => Ok((Answer::Target(readlinkat(&found, "")?.into_vec().into()), None)),
        (Want::Target, _) => Err(Errno::EINVAL),
        (Want::File, wanted @ libc::S_IFREG) | (Want::Directory, wanted @ libc::S_IFDIR) => {
            let check = |stat| if is_readable(&stat, wanted) { Ok(()) } else { Err(Errno::EACCES) };
            // Before it is opened, since that alone does something with a device or a pipe.
            check(stat)?;
            let opened = place.open(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)?;
            // It may be another one by now.
            check(fstat(&opened)?)?;
            Ok((Answer::Opened, Some(opened)))
        }
        (Want::File, _) => Err(Errno::EISDIR),
        (Want::Directory, _) => Err(Errno::ENOTDIR),
    }
}

/// Where something is.
enum Place<'a> {
    /// A shown file itself.
    Itself(OwnedFd),
    /// The name in a directory.
    In(OwnedFd, &'a [u8]),
}

impl<'a> Place<'a> {
    /// Goes from a shown path to the directory that the path ends in.
    fn find(root: &File, path: &'a [u8]) -> nix::Result<Self> {
        let mut at = dup(root)?;
        if path.is_empty() {
            let is_directory = kind(&fstat(root)?) == libc::S_IFDIR;
            return Ok(if is_directory { Self::In(at, b".") } else { Self::Itself(at) });
        }
        let mut names = path.split(|byte| *byte == b'/');
        let mut name = names.next().unwrap_or_default();
        for next in names {
            check_entry(&at)?;
            at = open(&at, name, OFlag::O_PATH)?;
            name = next;
        }
        check_entry(&at)?;
        Ok(Self::In(at, name))
    }

    fn open(&self, flags: OFlag) -> nix::Result<OwnedFd> {
        match self {
            Self::Itself(file) => dup(file),
            Self::In(directory, name) => open(directory, name, flags),
        }
    }
}

/// Opens what a directory has under a name. It follows no symlink and crosses no mount, even if the name was just replaced.
fn open(directory: &OwnedFd, name: &[u8], flags: OFlag) -> nix::Result<OwnedFd> {
    let resolve = ResolveFlag::RESOLVE_BENEATH
        | ResolveFlag::RESOLVE_NO_SYMLINKS
        | ResolveFlag::RESOLVE_NO_MAGICLINKS
        | ResolveFlag::RESOLVE_NO_XDEV;
    let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    openat2(directory, name, OpenHow::new().flags(flags).resolve(resolve))
}

/// Refuses what isn't a directory that everybody may enter.
fn check_entry(directory: &OwnedFd) -> nix::Result<()> {
    let stat = fstat(directory)?;
    match kind(&stat) {
        libc::S_IFDIR if stat.st_mode & libc::S_IXOTH != 0 => Ok(()),
        libc::S_IFDIR => Err(Errno::EACCES),
        libc::S_IFLNK => Err(Errno::ELOOP),
        _ => Err(Errno::ENOTDIR),
    }
}

fn kind(stat: &FileStat) -> u32 {
    stat.st_mode & libc::S_IFMT
}

/// Whether it is of this kind, and everybody may read it.
fn is_readable(stat: &FileStat, wanted: u32) -> bool {
    kind(stat) == wanted && stat.st_mode & libc::S_IROTH != 0
}

/// `None` when the device has gone, perhaps with an answer unread: that is an end like any other.
fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe) => Ok(None),
        Err(error) => Err(error),
    }
}
