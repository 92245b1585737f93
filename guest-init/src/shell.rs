//! A shell for somebody who looks around in a failed build: in the build's place, on a terminal of its own.
//!
//! ```text
//!   host ◀── Output ── guest-init ◀───── pseudo-terminal ◀──▶ shell
//!        ── Input ───▶ at most one ─────▶
//! ```
//!
//! Whoever is slow holds the others back, and nothing piles up: the host is not heard while the terminal takes no more,
//! and the terminal is not read while the host takes no more.

use std::{
    fs::File,
    io::{ErrorKind, Read as _, Write as _},
    os::fd::AsFd as _,
};

use cofferdam_protocol::{FromGuest, FromHost, Step, WindowSize, frame::MAX_DATA_BYTES};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::{Signal, kill},
    unistd::{Gid, Pid, Uid, fchown},
};

use crate::{
    BUILD_GID, BUILD_UID,
    command::{self, Command},
    error::{Context as _, SessionError, SetupError},
    session::{Host, Ran},
    sys,
};

struct Shell {
    init: Pid,
    /// Says when the shell has ended.
    words: File,
    terminal: File,
    /// What the terminal has not taken yet.
    input: Vec<u8>,
}

/// Who is ready.
struct Ready {
    host: bool,
    terminal: bool,
    word: bool,
}

/// Runs the shell until it ends, or the host hangs up.
pub(crate) fn run(host: &mut Host, ran: &Ran, term: &str, size: WindowSize) -> Result<(), SessionError> {
    match Shell::start(ran, term, size) {
        Ok(mut shell) => shell.connect(host)?,
        Err(error) => host.say(&FromGuest::Output(format!("{}\r\n", error.detail()).as_bytes()))?,
    }
    host.say(&FromGuest::ShellEnded)?;
    // The host hangs up when it has that; until then it may still send what nobody reads any more.
    while host.hear().is_ok() {}
    Ok(())
}

impl Shell {
    fn start(ran: &Ran, term: &str, size: WindowSize) -> Result<Self, SetupError> {
        let command = Command::shell(&ran.specification, &ran.root.processes, term)?;
        let (terminal, shells) =
            sys::open_terminal(&ran.root.terminals).context(Step::Start, || "make a pseudo-terminal")?;
        sys::resize_terminal(&terminal, size).context(Step::Start, || "set the terminal's size")?;
        fchown(&shells, Some(Uid::from_raw(BUILD_UID)), Some(Gid::from_raw(BUILD_GID)))
            .context(Step::Start, || "give the terminal to the build's user")?;
        let (init, words) = command::start_on(shells, &command, &ran.cgroup)?;
        Ok(Self { init, words, terminal, input: Vec::new() })
    }

    fn connect(&mut self, host: &mut Host) -> Result<(), SessionError> {
        let mut buffer = vec![0; MAX_DATA_BYTES];
        loop {
            let ready = self.wait(host)?;
            if ready.host {
                self.hear(host)?;
            }
            if !self.input.is_empty() {
                self.feed();
            }
            if ready.word || (ready.terminal && self.show(host, &mut buffer)?.is_none()) {
                break;
            }
        }
        // Whatever it left behind ends with it.
        kill(self.init, Signal::SIGKILL).context(Step::Start, || "kill the shell's init")?;
        sys::wait(Some(self.init)).context(Step::Start, || "wait for the shell's init")?;
        while self.show(host, &mut buffer)?.is_some_and(|length| length > 0) {}
        Ok(())
    }

    fn wait(&self, host: &Host) -> Result<Ready, SessionError> {
        let is_fed = self.input.is_empty();
        let from_host = if is_fed { PollFlags::POLLIN } else { PollFlags::empty() };
        let terminal = if is_fed { PollFlags::POLLIN } else { PollFlags::POLLIN | PollFlags::POLLOUT };
        let mut polled = [
            PollFd::new(host.as_fd(), from_host),
            PollFd::new(self.terminal.as_fd(), terminal),
            PollFd::new(self.words.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error).context(Step::Start, || "wait for the shell").map_err(SessionError::from),
        }
        let [host, terminal, word] = polled.map(|fd| fd.any().unwrap_or(true));
        Ok(Ready { host, terminal, word })
    }

    fn hear(&mut self, host: &Host) -> Result<(), SessionError> {
        match host.hear()? {
            FromHost::Input(bytes) => self.input.extend_from_slice(&bytes),
            // A terminal that can't be told has no shell any more.
            FromHost::Resize(size) => drop(sys::resize_terminal(&self.terminal, size)),
            FromHost::Stop => {}
            _ => return Err(SessionError::Unexpected { expected: "input for the shell" }),
        }
        Ok(())
    }

    /// Gives the terminal what it takes now.
    fn feed(&mut self) {
        match self.terminal.write(&self.input) {
            Ok(length) => drop(self.input.drain(..length)),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            // Nobody is left to read it.
            Err(_) => self.input.clear(),
        }
    }

    /// Sends what the terminal shows now; gives how many bytes that is, unless the terminal has nobody on it any more.
    fn show(&mut self, host: &mut Host, buffer: &mut [u8]) -> Result<Option<usize>, SessionError> {
        match self.terminal.read(buffer) {
            Ok(0) => Ok(None),
            Ok(length) => {
                host.say(&FromGuest::Output(&buffer[..length]))?;
                Ok(Some(length))
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(Some(0)),
            Err(_) => Ok(None),
        }
    }
}
