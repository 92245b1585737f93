//! An interactive shell in a failed build: it runs where the command ran, on a terminal of its own.
//!
//! ```text
//!   host ◀── Output ── guest-init ◀───── pseudo-terminal ◀──▶ shell
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

use cofferdam_protocol::{BUILD_GID, BUILD_UID, FromGuest, FromHost, Step, WindowSize, frame::MAX_DATA_BYTES};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::{Signal, kill},
    unistd::{Gid, Pid, Uid, fchown},
};

use crate::{
    build::EndedBuild,
    command::{self, Command},
    error::{Context as _, SessionError, SetupError},
    host::Host,
    sys,
};

struct Shell {
    init: Pid,
    /// Readable once the shell has ended.
    outcome: File,
    terminal: File,
    /// Input that the terminal has not accepted yet.
    input: Vec<u8>,
}

/// The descriptors that are ready.
struct Ready {
    host: bool,
    terminal: bool,
    outcome: bool,
}

/// Runs the shell until it ends, or until the host closes the connection.
pub(crate) fn run(host: &mut Host, build: &EndedBuild, term: &str, size: WindowSize) -> Result<(), SessionError> {
    match Shell::start(build, term, size) {
        Ok(mut shell) => shell.relay(host)?,
        Err(error) => host.send(&FromGuest::Output(format!("{}\r\n", error.detail()).as_bytes()))?,
    }
    host.send(&FromGuest::ShellEnded)?;
    // The host may have sent more input meanwhile. It closes the connection when it receives the message.
    while host.receive().is_ok() {}
    Ok(())
}

impl Shell {
    fn start(build: &EndedBuild, term: &str, size: WindowSize) -> Result<Self, SetupError> {
        let command = Command::shell(&build.specification, &build.root, term)?;
        let (terminal, shell_side) =
            sys::open_terminal(&build.root.ptmx).context(Step::Start, || "open a pseudo-terminal")?;
        sys::resize_terminal(&terminal, size).context(Step::Start, || "set the terminal's size")?;
        fchown(&shell_side, Some(Uid::from_raw(BUILD_UID)), Some(Gid::from_raw(BUILD_GID)))
            .context(Step::Start, || "give the terminal to the build's user")?;
        let (init, outcome) = command::start_on_terminal(shell_side, &command, &build.cgroup)?;
        Ok(Self { init, outcome, terminal, input: Vec::new() })
    }

    /// Copies between the host and the terminal until the shell has ended.
    fn relay(&mut self, host: &mut Host) -> Result<(), SessionError> {
        let mut buffer = vec![0; MAX_DATA_BYTES];
        loop {
            let ready = self.wait(host)?;
            if ready.host {
                self.receive(host)?;
            }
            if !self.input.is_empty() {
                self.write_input();
            }
            if ready.outcome || (ready.terminal && self.send_output(host, &mut buffer)?.is_none()) {
                break;
            }
        }
        // Kills everything that the shell left running.
        kill(self.init, Signal::SIGKILL).context(Step::Start, || "kill the shell's init")?;
        sys::wait(Some(self.init)).context(Step::Start, || "wait for the shell's init")?;
        while self.send_output(host, &mut buffer)?.is_some_and(|length| length > 0) {}
        Ok(())
    }

    fn wait(&self, host: &Host) -> Result<Ready, SessionError> {
        let (from_host, terminal) = if self.input.is_empty() {
            (PollFlags::POLLIN, PollFlags::POLLIN)
        } else {
            (PollFlags::empty(), PollFlags::POLLIN | PollFlags::POLLOUT)
        };
        let mut polled = [
            PollFd::new(host.as_fd(), from_host),
            PollFd::new(self.terminal.as_fd(), terminal),
            PollFd::new(self.outcome.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error).context(Step::Start, || "wait for the shell").map_err(SessionError::from),
        }
        let [host, terminal, outcome] = polled.map(|fd| fd.any().unwrap_or(true));
        Ok(Ready { host, terminal, outcome })
    }

    fn receive(&mut self, host: &Host) -> Result<(), SessionError> {
        match host.receive()? {
            FromHost::Input(bytes) => self.input.extend_from_slice(&bytes),
            // This fails only when the shell has ended.
            FromHost::Resize(size) => drop(sys::resize_terminal(&self.terminal, size)),
            FromHost::Stop => {}
            _ => return Err(SessionError::Unexpected { expected: "input for the shell" }),
        }
        Ok(())
    }

    /// Writes as much input as the terminal accepts now.
    fn write_input(&mut self) {
        match self.terminal.write(&self.input) {
            Ok(length) => drop(self.input.drain(..length)),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            // No process reads from the terminal any more.
            Err(_) => self.input.clear(),
        }
    }

    /// Sends the output that is there now, and returns its length; `None` when no process has the terminal open.
    fn send_output(&mut self, host: &mut Host, buffer: &mut [u8]) -> Result<Option<usize>, SessionError> {
        match self.terminal.read(buffer) {
            Ok(0) => Ok(None),
            Ok(length) => {
                host.send(&FromGuest::Output(&buffer[..length]))?;
                Ok(Some(length))
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(Some(0)),
            Err(_) => Ok(None),
        }
    }
}
