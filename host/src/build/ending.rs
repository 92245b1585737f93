//! How a build ends: between its session, which talks to the guest, and whoever ends the build before the session does.

use std::{
    io,
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use cofferdam_protocol::{
    FromHost,
    frame::{FrameError, FrameReader, FrameWriter, MAX_FROM_GUEST_BYTES, MAX_FROM_HOST_BYTES},
};
use tokio_util::sync::CancellationToken;

/// Reads what the guest sends.
pub(super) type Reader<'s> = FrameReader<io::BufReader<&'s UnixStream>>;

/// What the two share.
#[derive(Default)]
pub(super) struct Ending {
    decided: AtomicBool,
    line: OnceLock<Line>,
}

/// The connection to the guest.
pub(super) struct Line {
    stream: UnixStream,
    writer: Mutex<FrameWriter<UnixStream>>,
    over: CancellationToken,
}

/// Hangs up when it is dropped, so that no session outlives its build for want of a client.
pub(super) struct HangUp(pub(super) Arc<Ending>);

impl Drop for HangUp {
    fn drop(&mut self) {
        self.0.hang_up();
    }
}

impl Ending {
    /// Decides how the build ends, unless that is decided already, which is what this returns. Who comes first decides:
    /// the session, when all outputs have come, to store them, or when the build has failed; or whoever ends the build.
    pub(super) fn decide(&self) -> bool {
        self.decided.swap(true, Ordering::AcqRel)
    }

    /// The guest has connected.
    pub(super) fn connect(&self, stream: UnixStream) -> io::Result<()> {
        let writer = FrameWriter::new(stream.try_clone()?, MAX_FROM_HOST_BYTES);
        let line = Line { stream, writer: Mutex::new(writer), over: CancellationToken::new() };
        self.line.set(line).map_err(|_| io::ErrorKind::AlreadyExists.into())
    }

    pub(super) fn line(&self) -> Option<&Line> {
        self.line.get()
    }

    /// Has the guest end its command. What the session then hears is how that ended.
    pub(super) fn stop(self: &Arc<Self>) {
        let this = Arc::clone(self);
        // The guest may be slow to read, or may never do it; then its connection ends, and this with it.
        tokio::task::spawn_blocking(move || this.line().map(|line| line.say(&FromHost::Stop)));
    }

    /// Ends the conversation, whatever the session waits for.
    pub(super) fn hang_up(&self) {
        if let Some(line) = self.line() {
            line.hang_up();
        }
    }
}

impl Line {
    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub(super) fn reader(&self) -> Reader<'_> {
        let buffered = io::BufReader::with_capacity(4 * MAX_FROM_GUEST_BYTES, &self.stream);
        FrameReader::new(buffered, MAX_FROM_GUEST_BYTES)
    }

    /// Says one message, whole.
    pub(super) fn say(&self, message: &FromHost) -> Result<(), FrameError> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner).write(message)
    }

    /// Ends the conversation.
    pub(super) fn hang_up(&self) {
        self.over.cancel();
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Cancelled when somebody has hung up.
    pub(super) fn over(&self) -> &CancellationToken {
        &self.over
    }
}
