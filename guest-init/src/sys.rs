//! Safe functions for the system calls that `nix` has no safe function for.

use std::{
    ffi::{c_int, c_ulong},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, FromRawFd as _},
        unix::process::ExitStatusExt as _,
    },
    path::Path,
    process::ExitStatus,
    time::Duration,
};

use cofferdam_protocol::WindowSize;
use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    poll::{PollFd, PollTimeout},
    sys::stat::Mode,
};

/// Grows a mounted ext4 file system to `blocks` of its own blocks.
pub(crate) fn resize_ext4(mounted: &File, blocks: u64) -> io::Result<()> {
    const EXT4_IOC_RESIZE_FS: c_ulong = nix::request_code_write!(b'f', 16, size_of::<u64>());
    // SAFETY: the kernel reads one u64 through the pointer, which outlives the call.
    let result = unsafe { libc::ioctl(mounted.as_raw_fd(), EXT4_IOC_RESIZE_FS, &raw const blocks) };
    Ok(Errno::result(result).map(drop)?)
}

/// Waits until one of these is ready, for at most so long; a signal ends it sooner.
pub(crate) fn poll(polled: &mut [PollFd<'_>], limit: Duration) -> nix::Result<()> {
    match nix::poll::poll(polled, PollTimeout::try_from(limit).unwrap_or(PollTimeout::ZERO)) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error),
    }
}

/// How many bytes a pipe holds.
pub(crate) fn readable_bytes(pipe: &File) -> usize {
    let mut bytes: c_int = 0;
    // SAFETY: the kernel writes one int through the pointer, which outlives the call.
    let result = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
    if result == 0 { usize::try_from(bytes).unwrap_or(0) } else { 0 }
}

/// Brings up `lo` in the calling process's network namespace.
pub(crate) fn raise_loopback() -> io::Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut request = interface_request("lo");
    request.ifr_ifru.ifru_flags = libc::IFF_UP as i16;
    // SAFETY: SIOCSIFFLAGS takes an ifreq.
    unsafe { change_network(&socket, libc::SIOCSIFFLAGS, &request) }
}

/// An `ifreq` for the interface with this name, of at most 15 bytes.
pub(crate) fn interface_request(name: &str) -> libc::ifreq {
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.as_bytes()) {
        *to = from.cast_signed();
    }
    request
}

/// The index of an interface in the calling process's network namespace.
pub(crate) fn interface_index(name: &str) -> io::Result<c_int> {
    let name = std::ffi::CString::new(name)?;
    // SAFETY: the name is a string with a NUL at its end, and outlives the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => c_int::try_from(index).map_err(io::Error::other),
    }
}

/// Changes an interface, its addresses or a route, with one of the calls `SIOCS…` or `SIOCADDRT`.
///
/// # Safety
///
/// The call must take a structure of this type.
pub(crate) unsafe fn change_network<T>(socket: impl AsFd, call: c_ulong, request: &T) -> io::Result<()> {
    // SAFETY: the kernel reads one T through the pointer, which outlives the call.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), call, std::ptr::from_ref(request)) };
    Ok(Errno::result(result).map(drop)?)
}

/// Opens a pseudo-terminal. Returns the master side, which is non-blocking, and the slave side.
pub(crate) fn open_terminal(ptmx: &Path) -> io::Result<(File, File)> {
    const FLAGS: OFlag = OFlag::O_RDWR.union(OFlag::O_NOCTTY).union(OFlag::O_CLOEXEC);
    let master = File::from(open(ptmx, FLAGS | OFlag::O_NONBLOCK, Mode::empty())?);
    let locked: c_int = 0;
    // SAFETY: the kernel reads one int through the pointer, which outlives the call.
    let result = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const locked) };
    Errno::result(result)?;
    // SAFETY: the call takes a number.
    let result = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, FLAGS.bits()) };
    let descriptor = Errno::result(result)?;
    // SAFETY: the descriptor is new and has no other owner.
    Ok((master, unsafe { File::from_raw_fd(descriptor) }))
}

/// Sets a pseudo-terminal's size. The kernel sends SIGWINCH to the processes on it.
pub(crate) fn resize_terminal(master: &File, size: WindowSize) -> io::Result<()> {
    let size = libc::winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel reads one winsize through the pointer, which outlives the call.
    let result = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    Ok(Errno::result(result).map(drop)?)
}

/// Sets the controlling terminal of the calling process's session.
pub(crate) fn set_controlling_terminal(terminal: &File) -> io::Result<()> {
    // SAFETY: the call takes a number.
    let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) };
    Ok(Errno::result(result).map(drop)?)
}

/// Waits for one child, or for any. Unlike `nix`'s, the status may be a real-time signal.
pub(crate) fn wait(pid: Option<nix::unistd::Pid>) -> io::Result<(nix::unistd::Pid, ExitStatus)> {
    let mut status: c_int = 0;
    let asked = pid.map_or(-1, nix::unistd::Pid::as_raw);
    loop {
        // SAFETY: the kernel writes one int through the pointer, which outlives the call.
        let result = unsafe { libc::waitpid(asked, &raw mut status, 0) };
        match Errno::result(result) {
            Ok(pid) => return Ok((nix::unistd::Pid::from_raw(pid), ExitStatus::from_raw(status))),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sets close-on-exec on every descriptor from `first` on.
pub(crate) fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: the call takes numbers, and closes no descriptor that has an owner.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    Ok(Errno::result(result).map(drop)?)
}

/// Sets every signal to its default action, and unblocks all signals.
pub(crate) fn reset_signals() -> io::Result<()> {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL installs no handler. For SIGKILL, SIGSTOP and libc's own signals the call fails without effect.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    Ok(nix::sys::signal::SigSet::empty().thread_set_mask()?)
}

/// Empties the bounding and the ambient capability set of the calling process.
///
/// This needs capabilities, and so does changing the user. [`drop_capabilities`] comes last.
pub(crate) fn drop_bounding_set() -> io::Result<()> {
    for capability in 0..64 {
        match prctl(libc::PR_CAPBSET_DROP, capability) {
            Err(Errno::EINVAL) => break,
            other => other?,
        }
    }
    Ok(prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as c_ulong)?)
}

/// Empties the effective, permitted and inheritable capability sets of the calling process.
pub(crate) fn drop_capabilities() -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: c_int,
    }
    let header = Header { version: 0x2008_0522, pid: 0 };
    let empty = [0_u32; 6];
    // SAFETY: version 3 of the call reads one header and two triples of u32; both outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, &raw const empty) };
    Ok(Errno::result(result).map(drop)?)
}

/// Installs a seccomp filter, which can't be removed. The process must have set `no_new_privs`.
pub(crate) fn install_filter(program: &[libc::sock_filter]) -> io::Result<()> {
    let length = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel reads `len` instructions through `filter` and writes none; both outlive the call.
    let result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program, 0, 0) };
    Ok(Errno::result(result).map(drop)?)
}

/// Forks the process.
pub(crate) fn fork() -> io::Result<nix::unistd::ForkResult> {
    // SAFETY: guest-init never starts a thread, so the child's copy of memory is consistent.
    Ok(unsafe { nix::unistd::fork() }?)
}

fn prctl(option: c_int, argument: c_ulong) -> Result<(), Errno> {
    const NONE: c_ulong = 0;
    // SAFETY: the options used here take numbers only.
    Errno::result(unsafe { libc::prctl(option, argument, NONE, NONE, NONE) }).map(drop)
}
