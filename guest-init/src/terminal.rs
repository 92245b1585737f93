//! A pseudo-terminal that a client sees.
//!
//! ```text
//!   host ◀── Output ── guest-init ◀───── pseudo-terminal ◀──▶ command, or shell
//!        ── Input ───▶ at most one ─────▶
//! ```
//!
//! A slow side holds back the other, so nothing piles up: guest-init reads no input from the host while the terminal
//! accepts none, and reads nothing from the terminal while the host accepts no output.

use std::{
    fs::File,
    io::{ErrorKind, Read as _, Write as _},
    os::fd::AsFd as _,
};

use cofferdam_protocol::{BUILD_GID, BUILD_UID, FromGuest, Step, WindowSize};
use nix::{
    poll::{PollFd, PollFlags},
    unistd::{Gid, Uid, fchown},
};

use crate::{
    error::{Context as _, SessionError, SetupError},
    host::Host,
    root::Root,
    sys,
};

/// The terminal.
#[derive(Debug)]
pub(crate) struct Terminal {
    ours: File,
    /// The build's side. While it is open, the terminal doesn't hang up when no process has it open.
    theirs: File,
    /// Input that the terminal has not accepted yet.
    input: Vec<u8>,
}

impl Terminal {
    /// Opens a terminal of the build's own devpts. It belongs to the build's user.
    pub(crate) fn open(root: &Root, size: WindowSize) -> Result<Self, SetupError> {
        let (ours, theirs) = sys::open_terminal(&root.ptmx).context(Step::Start, || "open a pseudo-terminal")?;
        sys::resize_terminal(&ours, size).context(Step::Start, || "set the terminal's size")?;
        fchown(&theirs, Some(Uid::from_raw(BUILD_UID)), Some(Gid::from_raw(BUILD_GID)))
            .context(Step::Start, || "give the terminal to the build's user")?;
        Ok(Self { ours, theirs, input: Vec::new() })
    }

    /// The build's side, for a process.
    pub(crate) fn side(&self) -> Result<File, SetupError> {
        self.theirs.try_clone().context(Step::Start, || "copy a descriptor")
    }

    /// What to wait for at the host's connection: nothing while there is input to write.
    pub(crate) fn host_events(&self) -> PollFlags {
        if self.input.is_empty() { PollFlags::POLLIN } else { PollFlags::empty() }
    }

    /// What to wait for at the terminal: output, and room for input if there is any.
    pub(crate) fn poll_fd(&self) -> PollFd<'_> {
        let room = if self.input.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
        PollFd::new(self.ours.as_fd(), PollFlags::POLLIN | room)
    }

    /// Takes input, which [`write_input`](Self::write_input) writes.
    pub(crate) fn take(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// Changes the size.
    pub(crate) fn resize(&self, size: WindowSize) {
        // This fails only for a terminal that has gone.
        let _ = sys::resize_terminal(&self.ours, size);
    }

    /// Writes as much input as the terminal accepts now.
    pub(crate) fn write_input(&mut self) {
        if self.input.is_empty() {
            return;
        }
        match self.ours.write(&self.input) {
            Ok(length) => drop(self.input.drain(..length)),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => self.input.clear(),
        }
    }

    /// Sends the output that is there now, at most one frame. Returns its length.
    pub(crate) fn send_output(&mut self, host: &mut Host, buffer: &mut [u8]) -> Result<usize, SessionError> {
        // Only a terminal without output fails: its other side is open here.
        let length = self.ours.read(buffer).unwrap_or(0);
        if length > 0 {
            host.send(&FromGuest::Output(&buffer[..length]))?;
        }
        Ok(length)
    }
}
