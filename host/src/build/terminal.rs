use bytes::Bytes;
use cofferdam_protocol::WindowSize;
use tokio::sync::mpsc;

/// A client's terminal, lent to the shell of a failed build. The shell's output is untrusted, and may contain any control
/// sequence.
#[derive(Debug)]
pub(crate) struct Terminal {
    /// Its kind, for `TERM`. Ignored unless it is short and plain.
    pub kind: String,
    /// Its initial size.
    pub size: WindowSize,
    /// The user's input. Closing it ends the shell.
    pub input: mpsc::Receiver<TerminalInput>,
    /// The shell's output, in pieces of at most 28 KiB. Closing it ends the shell. The shell's end drops it.
    pub output: mpsc::Sender<Bytes>,
}

/// Input from a client's terminal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TerminalInput {
    /// Typed bytes.
    Bytes(Bytes),
    /// A new size.
    Resize(WindowSize),
}
