//! One connection's bytes, both ways between the stack's socket and the host's.
//!
//! ```text
//!   guest ──▶ stack's socket ──▶ host's socket      its end: shutdown
//!   guest ◀── stack's socket ◀── host's socket      its end: FIN
//!   either is reset: so is the other
//! ```

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use smoltcp::socket::tcp::{Socket, State};

/// A guest that has said all gets so long for each answer.
const PATIENCE: Duration = Duration::from_secs(300);

/// One connection.
#[derive(Debug)]
pub(super) struct Splice {
    stream: TcpStream,
    readable: bool,
    writable: bool,
    /// Whether the host's socket was told that the guest has said all.
    told: bool,
    /// Whether the other side has said all.
    heard: bool,
    moved: Instant,
}

/// The host's socket was reset, or is otherwise of no use.
#[derive(Debug)]
pub(super) struct Broken;

/// Whether the guest has said all.
pub(super) fn has_ended(socket: &Socket<'_>) -> bool {
    matches!(socket.state(), State::CloseWait | State::LastAck | State::Closing | State::TimeWait)
}

impl Splice {
    /// The socket must not block. Where there is a rate, it is a Unix socket, which reads, writes and shuts down as a TCP one does.
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream, readable: true, writable: true, told: false, heard: false, moved: Instant::now() }
    }

    pub(super) fn became(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        self.writable |= writable;
    }

    /// Moves as much as both sides take.
    pub(super) fn pump(&mut self, socket: &mut Socket<'_>) -> Result<(), Broken> {
        while self.writable && socket.can_recv() {
            let mut stream = &self.stream;
            let written = socket.recv(|bytes| part(stream.write(bytes)));
            match written.map_err(|_| Broken)? {
                Ok(_) => self.moved = Instant::now(),
                Err(error) => self.writable = !is_over(&error)?,
            }
        }
        if !self.told && has_ended(socket) && socket.recv_queue() == 0 {
            self.stream.shutdown(Shutdown::Write).map_err(|_| Broken)?;
            self.told = true;
        }
        while self.readable && !self.heard && socket.can_send() {
            let mut stream = &self.stream;
            let read = socket.send(|room| part(stream.read(room)));
            match read.map_err(|_| Broken)? {
                Ok(0) => {
                    self.heard = true;
                    socket.close();
                }
                Ok(_) => self.moved = Instant::now(),
                Err(error) => self.readable = !is_over(&error)?,
            }
        }
        Ok(())
    }

    /// Whether both sides have said all, and both know it.
    pub(super) fn is_complete(&self) -> bool {
        self.told && self.heard
    }

    /// When to give up a connection on which only the other side still may speak.
    pub(super) fn deadline(&self) -> Option<Instant> {
        (self.told && !self.heard).then(|| self.moved + PATIENCE)
    }
}

/// The number of bytes that were moved, and how it went.
fn part(result: io::Result<usize>) -> (usize, io::Result<usize>) {
    (*result.as_ref().unwrap_or(&0), result)
}

/// Whether nothing more can be moved for now.
fn is_over(error: &io::Error) -> Result<bool, Broken> {
    match error.kind() {
        ErrorKind::WouldBlock => Ok(true),
        ErrorKind::Interrupted => Ok(false),
        _ => Err(Broken),
    }
}
