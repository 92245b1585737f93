use bytes::Bytes;
use cofferdam_protocol::WindowSize;
use tokio::sync::mpsc;

/// A client's terminal, lent to the shell of a failed build. What comes from the shell was written by an untrusted
/// build, and may be anything that controls a terminal.
#[derive(Debug)]
pub(crate) struct Terminal {
    /// Its kind, for `TERM`; left out unless it is short and plain.
    pub kind: String,
    /// Its size at first.
    pub size: WindowSize,
    /// What is typed. Its end ends the shell.
    pub input: mpsc::Receiver<TerminalInput>,
    /// What to show, at most 28 KiB in one piece. Closing it ends the shell; the shell's end drops it.
    pub output: mpsc::Sender<Bytes>,
}

/// What comes from a client's terminal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TerminalInput {
    /// Somebody has typed.
    Bytes(Bytes),
    /// The size has changed.
    Resize(WindowSize),
}
