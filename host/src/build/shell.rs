//! An interactive command, or a shell in the guest of a failed build, connected to a client's terminal.
//!
//! ```text
//!   guest ── Output ──▶ session ───────────▶ Terminal::output ──▶ client
//!         ◀── Input ─── thread "shell" ◀──── Terminal::input ◀───
//! ```
//!
//! In both directions a slow reader holds the writer back. Nothing is buffered beyond one message and the channels.

use std::thread;

use bytes::Bytes;
use cofferdam_protocol::{FromGuest, FromHost, MAX_INPUT_BYTES};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{
    error::{BuildError, ExecutorError},
    exchange::{Exchange, frame, is_disconnect, next, out_of_place},
    line::Reader,
    terminal::{Terminal, TerminalInput},
};

/// Longest name of a kind of terminal, in bytes.
const MAX_KIND_BYTES: usize = 64;

impl Exchange<'_> {
    /// Connects a shell in the guest with a terminal, until one of them ends or the build is interrupted.
    pub(super) fn run_shell(&self, terminal: Terminal, reader: &mut Reader<'_>) -> Result<(), BuildError> {
        let Terminal { kind, size, input, output } = terminal;
        let term = plain(kind);
        // Whoever sits at the terminal may think for long.
        self.line.limit_waits(None).map_err(frame)?;
        self.line.say(&FromHost::Shell { term, size }).map_err(frame)?;
        let ended = CancellationToken::new();
        thread::scope(|scope| {
            let started =
                thread::Builder::new().name("shell".to_owned()).spawn_scoped(scope, || self.pass_input(input, &ended));
            started.map_err(|error| BuildError::Executor(ExecutorError::Thread(error)))?;
            let passed = self.pass_output(&output, reader);
            // Wakes and ends the other thread.
            self.ending.hang_up();
            passed
        })
    }

    /// Does what follows the command's start while the client's input goes to its terminal. When the client goes away before
    /// the command's end, the build is interrupted.
    pub(super) fn interact<T>(
        &self,
        input: mpsc::Receiver<TerminalInput>,
        screen: Screen,
        follow: impl FnOnce(Screen) -> Result<T, BuildError>,
    ) -> Result<T, BuildError> {
        let ended = screen.ended.clone();
        thread::scope(|scope| {
            let passing = thread::Builder::new()
                .name("terminal".to_owned())
                .spawn_scoped(scope, || self.pass_input(input, &ended))
                .map_err(|error| BuildError::Executor(ExecutorError::Thread(error)))?;
            let followed = follow(screen);
            if ended.is_cancelled() {
                // The other thread ends, too: the guest reads what is left of the input after its outputs.
                return followed;
            }
            self.ending.hang_up();
            let is_gone = passing.join().unwrap_or(false);
            followed.map_err(|error| match is_gone && is_disconnect(&error) {
                true => BuildError::Executor(ExecutorError::Interrupted),
                false => error,
            })
        })
    }

    /// Shows output of an interactive command. Waits while the client reads nothing.
    pub(super) fn show(&self, screen: &Screen, bytes: &[u8]) -> Result<(), BuildError> {
        let sent = screen.output.send(Bytes::copy_from_slice(bytes));
        match self.handle.block_on(self.ending.unless_over(sent)) {
            Some(Ok(())) => Ok(()),
            _ => Err(BuildError::Executor(ExecutorError::Interrupted)),
        }
    }

    /// Passes input on until the terminal's work has ended, or one of both sides has gone. Returns whether the client has.
    fn pass_input(&self, mut input: mpsc::Receiver<TerminalInput>, ended: &CancellationToken) -> bool {
        let next = |input: &mut mpsc::Receiver<TerminalInput>| {
            let input = ended.run_until_cancelled(input.recv());
            self.handle.block_on(self.ending.unless_over(input)).flatten().flatten()
        };
        while let Some(input) = next(&mut input) {
            let said = match input {
                TerminalInput::Resize(size) => self.line.say(&FromHost::Resize(size)),
                TerminalInput::Bytes(bytes) => {
                    let mut pieces = bytes.chunks(MAX_INPUT_BYTES).map(|piece| FromHost::Input(piece.to_vec().into()));
                    pieces.try_for_each(|piece| self.line.say(&piece))
                }
            };
            if said.is_err() {
                break;
            }
        }
        let is_gone = input.is_closed();
        if !ended.is_cancelled() {
            self.ending.hang_up();
        }
        is_gone
    }

    fn pass_output(&self, output: &mpsc::Sender<Bytes>, reader: &mut Reader<'_>) -> Result<(), BuildError> {
        loop {
            match next(reader)? {
                FromGuest::Output(bytes) => {
                    let sent = output.send(Bytes::copy_from_slice(bytes));
                    let sent = self.handle.block_on(self.ending.unless_over(sent));
                    if !matches!(sent, Some(Ok(()))) {
                        return Ok(());
                    }
                }
                FromGuest::ShellEnded => return Ok(()),
                other => return Err(out_of_place(&other, "while a shell ran")),
            }
        }
    }
}

/// The screen of an interactive command.
pub(super) struct Screen {
    output: mpsc::Sender<Bytes>,
    /// Cancelled before the client learns that the command has ended.
    ended: CancellationToken,
}

impl Screen {
    pub(super) fn new(output: mpsc::Sender<Bytes>) -> Self {
        Self { output, ended: CancellationToken::new() }
    }

    /// Returns the terminal to the client.
    pub(super) fn close(self) {
        self.ended.cancel();
    }
}

/// The kind of a terminal as guests are told.
pub(super) fn plain(kind: String) -> String {
    if is_plain(&kind) { kind } else { String::new() }
}

fn is_plain(kind: &str) -> bool {
    kind.len() <= MAX_KIND_BYTES && kind.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._+".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_terminals_are_short_and_plain() {
        assert!(is_plain("xterm-256color") && is_plain("") && is_plain(&"x".repeat(MAX_KIND_BYTES)));
        for kind in ["x y", "x\0", "x=y", "\u{1b}[2J", &"x".repeat(MAX_KIND_BYTES + 1)] {
            assert!(!is_plain(kind), "{kind:?}");
        }
    }
}
