//! One connection's bytes at the build's rate, both ways between the device's socket and the host's. There is a relay only where
//! a rate is set; else the device has the host's socket itself.
//!
//! ```text
//!   device ──▶ Unix sockets ──▶ relay ──▶ TCP      its end: shutdown, unless the device has closed its socket altogether
//!   device ◀── Unix sockets ◀── relay ◀── TCP      its end: shutdown
//!   TCP is reset: the relay ends, and the device is told
//! ```
//!
//! A device that closes its socket may mean an end or a reset. Its next message says which.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use crate::network::Rate;

/// Bytes that a relay holds, each way.
const BUFFER_BYTES: usize = 16 * 1024;

/// A connection's relay. Dropping it ends the task.
#[derive(Debug)]
pub(super) struct Relay {
    task: AbortHandle,
    stop: Option<oneshot::Sender<()>>,
    /// What is left of it.
    left: Option<UnixStream>,
}

/// The ends of a relay that is to be started.
pub(super) struct Ends {
    device: UnixStream,
    host: TcpStream,
}

/// How a relay ended.
#[derive(Debug)]
pub(super) struct Ended {
    /// Fails if the connection was reset.
    pub(super) result: io::Result<()>,
    device: UnixStream,
}

impl Ends {
    /// With the socket for the device, which doesn't block.
    pub(super) fn new(host: std::net::TcpStream) -> io::Result<(Self, OwnedFd)> {
        let (device, devices) = UnixStream::pair()?;
        Ok((Self { device, host: TcpStream::from_std(host)? }, devices.into_std()?.into()))
    }

    /// Carries bytes until both sides have said all, one is reset, or it is stopped.
    pub(super) async fn carry(mut self, rate: &Rate, stopped: oneshot::Receiver<()>) -> Ended {
        let result = tokio::select! {
            biased;
            _ = stopped => Err(ErrorKind::ConnectionAborted.into()),
            carried = carry(&mut self.device, &mut self.host, rate) => carried,
        };
        Ended { result, device: self.device }
    }
}

impl Relay {
    pub(super) fn new(task: AbortHandle, stop: oneshot::Sender<()>) -> Self {
        Self { task, stop: Some(stop), left: None }
    }

    /// Carries nothing more.
    pub(super) fn stop(&mut self) {
        self.stop = None;
    }

    /// Keeps its socket open: to the device, closing it would be the server's end.
    pub(super) fn ended(&mut self, ended: Ended) -> io::Result<()> {
        self.left = Some(ended.device);
        ended.result
    }

    pub(super) fn has_ended(&self) -> bool {
        self.left.is_some()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn carry(device: &mut UnixStream, host: &mut TcpStream, rate: &Rate) -> io::Result<()> {
    let (mut from_device, mut to_device) = device.split();
    let (mut from_host, mut to_host) = host.split();
    let up = async {
        carry_all(&mut from_device, &mut to_host, rate).await?;
        if has_hung_up(from_device.as_ref())? { Ok(()) } else { to_host.shutdown().await }
    };
    let down = async {
        carry_all(&mut from_host, &mut to_device, rate).await?;
        to_device.shutdown().await
    };
    tokio::try_join!(up, down).map(drop)
}

/// Carries what there is until its end.
async fn carry_all<R, W>(from: &mut R, to: &mut W, rate: &Rate) -> io::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        rate.take(length).await;
        to.write_all(&buffer[..length]).await?;
    }
}

/// Whether neither side says anything more, perhaps since the other has closed its socket.
fn has_hung_up(socket: impl AsFd) -> io::Result<bool> {
    let mut polled = [PollFd::new(&socket, PollFlags::empty())];
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    Ok(polled[0].revents().contains(PollFlags::HUP))
}
