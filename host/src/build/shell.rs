//! A shell in the guest of a failed build, connected to a client's terminal.
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

use super::{
    error::{BuildError, ExecutorError},
    exchange::{Exchange, frame, next, out_of_place},
    line::Reader,
    terminal::{Terminal, TerminalInput},
};

/// Longest name of a kind of terminal, in bytes.
const MAX_KIND_BYTES: usize = 64;

impl Exchange<'_> {
    /// Connects a shell in the guest with a terminal, until one of them ends or the build is interrupted.
    pub(super) fn run_shell(&self, terminal: Terminal, reader: &mut Reader<'_>) -> Result<(), BuildError> {
        let Terminal { kind, size, input, output } = terminal;
        let term = if is_plain(&kind) { kind } else { String::new() };
        self.line.say(&FromHost::Shell { term, size }).map_err(frame)?;
        thread::scope(|scope| {
            let started =
                thread::Builder::new().name("shell".to_owned()).spawn_scoped(scope, || self.pass_input(input));
            started.map_err(|error| BuildError::Executor(ExecutorError::Thread(error)))?;
            let passed = self.pass_output(&output, reader);
            // Wakes and ends the other thread.
            self.ending.hang_up();
            passed
        })
    }

    fn pass_input(&self, mut input: mpsc::Receiver<TerminalInput>) {
        let mut next = || self.handle.block_on(self.ending.unless_over(input.recv())).flatten();
        while let Some(input) = next() {
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
        self.ending.hang_up();
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
