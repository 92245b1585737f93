//! An interactive shell in a failed build: it runs where the command ran, on a terminal of its own.

use std::{fs::File, os::fd::AsFd as _};

use cofferdam_protocol::{FromGuest, FromHost, Step, WindowSize, frame::MAX_DATA_BYTES};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    build::EndedBuild,
    command::{self, Command},
    error::{Context as _, SessionError, SetupError},
    host::Host,
    sys,
    terminal::Terminal,
};

struct Shell {
    init: Pid,
    /// Readable once the shell has ended.
    outcome: File,
    terminal: Terminal,
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
        let terminal = Terminal::open(&build.root, size)?;
        let (init, outcome) = command::start_on_terminal(terminal.side()?, &command, &build.cgroup)?;
        Ok(Self { init, outcome, terminal })
    }

    /// Copies between the host and the terminal until the shell has ended.
    fn relay(&mut self, host: &mut Host) -> Result<(), SessionError> {
        let mut buffer = vec![0; MAX_DATA_BYTES];
        loop {
            let ready = self.wait(host)?;
            if ready.host {
                self.receive(host)?;
            }
            self.terminal.write_input();
            if ready.outcome {
                break;
            }
            if ready.terminal {
                self.terminal.send_output(host, &mut buffer)?;
            }
        }
        // Kills everything that the shell left running.
        kill(self.init, Signal::SIGKILL).context(Step::Start, || "kill the shell's init")?;
        sys::wait(Some(self.init)).context(Step::Start, || "wait for the shell's init")?;
        while self.terminal.send_output(host, &mut buffer)? > 0 {}
        Ok(())
    }

    fn wait(&self, host: &Host) -> Result<Ready, SessionError> {
        let mut polled = [
            PollFd::new(host.as_fd(), self.terminal.host_events()),
            self.terminal.poll_fd(),
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
            FromHost::Input(bytes) => self.terminal.take(&bytes),
            FromHost::Resize(size) => self.terminal.resize(size),
            FromHost::Stop => {}
            _ => return Err(SessionError::Unexpected { expected: "input for the shell" }),
        }
        Ok(())
    }
}
