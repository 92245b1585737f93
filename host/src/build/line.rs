//! The connection to the guest, which the session's threads share.

use std::{io, net::Shutdown, os::unix::net::UnixStream, time::Duration};

use cofferdam_protocol::{
    FromHost,
    frame::{FrameError, FrameReader, FrameWriter, MAX_FROM_GUEST_BYTES, MAX_FROM_HOST_BYTES},
};
use parking_lot::Mutex;

/// Reads the guest's messages.
pub(super) type Reader<'s> = FrameReader<io::BufReader<&'s UnixStream>>;

/// The connection to the guest.
pub(super) struct Line {
    stream: UnixStream,
    writer: Mutex<FrameWriter<UnixStream>>,
}

impl Line {
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        let writer = Mutex::new(FrameWriter::new(stream.try_clone()?, MAX_FROM_HOST_BYTES));
        Ok(Self { stream, writer })
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub(super) fn reader(&self) -> Reader<'_> {
        let buffered = io::BufReader::with_capacity(4 * MAX_FROM_GUEST_BYTES, &self.stream);
        FrameReader::new(buffered, MAX_FROM_GUEST_BYTES)
    }

    /// Bounds how long each wait for the guest takes.
    pub(super) fn limit_waits(&self, limit: Option<Duration>) -> Result<(), FrameError> {
        let limited = self.stream.set_read_timeout(limit).and_then(|()| self.stream.set_write_timeout(limit));
        limited.map_err(FrameError::Io)
    }

    /// Sends one message, whole.
    pub(super) fn say(&self, message: &FromHost) -> Result<(), FrameError> {
        self.writer.lock().write(message)
    }

    /// Closes both directions, which ends every wait for the guest.
    pub(super) fn hang_up(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}
