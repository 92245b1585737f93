//! The vsock connection to the host.

use std::{
    io::{self, BufWriter, Write as _},
    os::fd::{AsFd, BorrowedFd},
    thread::sleep,
    time::{Duration, Instant},
};

use cofferdam_protocol::{
    FromGuest, FromHost, HOST_CID, PORT, SetupFailure, Step,
    frame::{FrameError, FrameReader, FrameWriter, MAX_FROM_GUEST_BYTES, MAX_FROM_HOST_BYTES},
};
use vsock::VsockStream;

use crate::{boot, console, error::truncate_detail};

/// After this time without a connection, the console says so.
const CONNECT_WARNING: Duration = Duration::from_secs(10);

/// How long to wait for the host's answer once the build has ended. The host ends the machine long before.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(600);

/// The connection.
pub(crate) struct Host {
    stream: VsockStream,
    writer: FrameWriter<VsockStream>,
}

impl Host {
    /// Connects to the host, trying until it accepts. The vsock device may not exist yet.
    ///
    /// There is no deadline here, because only the host knows how busy it is. It ends a machine that takes too long.
    pub(crate) fn connect() -> io::Result<Self> {
        let start = Instant::now();
        let mut warned = false;
        loop {
            match VsockStream::connect_with_cid_port(HOST_CID, PORT) {
                Ok(stream) => {
                    let writer = FrameWriter::new(stream.try_clone()?, MAX_FROM_GUEST_BYTES);
                    return Ok(Self { stream, writer });
                }
                Err(error) => {
                    if start.elapsed() > CONNECT_WARNING && !warned {
                        warned = true;
                        console::log(&format!("the host does not accept the connection ({error}); still trying"));
                    }
                    sleep(Duration::from_millis(10));
                }
            }
        }
    }

    /// From now on, a panic is reported to the host before the machine powers off.
    pub(crate) fn report_panics(&self) -> io::Result<()> {
        let stream = self.stream.try_clone()?;
        std::panic::set_hook(Box::new(move |panic| {
            console::log(&panic.to_string());
            let detail = truncate_detail(format!("guest-init panicked: {panic}"));
            let message = FromGuest::SetupFailed(SetupFailure { step: Step::Start, detail: &detail });
            let _ = FrameWriter::new(&stream, MAX_FROM_GUEST_BYTES).write(&message);
            let _ = receive_answer(&stream);
            boot::power_off()
        }));
        Ok(())
    }

    /// Sends one message.
    pub(crate) fn send(&mut self, message: &FromGuest<'_>) -> Result<(), FrameError> {
        self.writer.write(message)
    }

    /// Sends many messages. Small frames share one write, which is never larger than the largest frame.
    pub(crate) fn send_batch(
        &self,
        send: impl FnOnce(&mut FrameWriter<&mut BufWriter<&VsockStream>>) -> Result<(), FrameError>,
    ) -> Result<(), FrameError> {
        let mut batch = BufWriter::with_capacity(MAX_FROM_GUEST_BYTES, &self.stream);
        send(&mut FrameWriter::new(&mut batch, MAX_FROM_GUEST_BYTES))?;
        batch.flush().map_err(FrameError::Io)
    }

    /// Waits for the host's next message. The reader's buffer is freed right away: the build needs the memory.
    pub(crate) fn receive(&self) -> Result<FromHost, FrameError> {
        FrameReader::new(&self.stream, MAX_FROM_HOST_BYTES).read()
    }

    /// Waits for the host's answer to the end of the build, at most [`ANSWER_TIMEOUT`].
    pub(crate) fn receive_answer(&self) -> Result<FromHost, FrameError> {
        receive_answer(&self.stream)
    }
}

impl AsFd for Host {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn receive_answer(stream: &VsockStream) -> Result<FromHost, FrameError> {
    let _ = stream.set_read_timeout(Some(ANSWER_TIMEOUT));
    FrameReader::new(stream, MAX_FROM_HOST_BYTES).read()
}
