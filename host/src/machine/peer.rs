//! Which process is at the other end of a Unix socket.
//!
//! A path doesn't say who listens there or who connects to it: any process that may open the directory can do both. The
//! kernel knows. It notes a process when it connects, or listens, and a number means one process for as long as our child
//! of that number isn't reaped.

use std::{fmt, io, os::fd::AsFd, time::Duration};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use tokio::net::{UnixListener, UnixStream};

/// How many strangers of one listener are logged. Of more, only their number is.
const MAX_LOGGED: u64 = 8;

/// After so many strangers the listener rests, so that a flood of them doesn't take a whole processor. A full queue of
/// 4,096 connections is empty after some 70 ms all the same.
const STRANGERS_AT_A_TIME: u64 = 64;

/// How long it rests.
const REST: Duration = Duration::from_millis(1);

/// The process that connected, or that listened.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Peer {
    pub(super) pid: u32,
    uid: u32,
}

impl Peer {
    /// The one at the other end of a stream.
    ///
    /// # Errors
    ///
    /// It is no Unix socket, or is not connected.
    pub(super) fn of(stream: impl AsFd) -> io::Result<Self> {
        let credentials = getsockopt(&stream, PeerCredentials)?;
        // A process that this PID namespace doesn't see has the number 0, and so is none of our children.
        Ok(Self { pid: credentials.pid().cast_unsigned(), uid: credentials.uid() })
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} of user {}", self.pid, self.uid)
    }
}

/// Waits for a connection of our child `pid`, and closes those of all other processes. The child must have been started
/// before `listener`, and not be reaped: otherwise a process that had the same number before would pass for it.
///
/// # Errors
///
/// No connection can be accepted.
pub(super) async fn accept_from(listener: &UnixListener, pid: u32) -> io::Result<UnixStream> {
    let mut strangers = Strangers { expected: pid, count: 0 };
    loop {
        let (stream, _) = listener.accept().await?;
        let peer = Peer::of(&stream)?;
        if peer.pid == pid {
            return Ok(stream);
        }
        drop(stream);
        strangers.turn_away(&peer);
        if strangers.count.is_multiple_of(STRANGERS_AT_A_TIME) {
            tokio::time::sleep(REST).await;
        }
    }
}

/// The processes that one listener has turned away.
struct Strangers {
    expected: u32,
    count: u64,
}

impl Strangers {
    fn turn_away(&mut self, peer: &Peer) {
        self.count += 1;
        if self.count <= MAX_LOGGED {
            tracing::warn!(
                pid = peer.pid,
                uid = peer.uid,
                "closed a connection to a machine's socket: only process {} may use it",
                self.expected
            );
        }
    }
}

impl Drop for Strangers {
    fn drop(&mut self) {
        if self.count > MAX_LOGGED {
            tracing::warn!(
                connections = self.count,
                "closed connections to a machine's socket: only process {} may use it",
                self.expected
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{self, Command};

    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn a_stream_tells_who_connected_and_who_listens() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let (connected, accepted) = tokio::join!(UnixStream::connect(&path), listener.accept());
        let this = Peer { pid: process::id(), uid: nix::unistd::geteuid().as_raw() };
        assert_eq!(Peer::of(connected.unwrap()).unwrap(), this);
        assert_eq!(Peer::of(accepted.unwrap().0).unwrap(), this);
        assert_eq!(this.to_string(), format!("process {} of user {}", this.pid, this.uid));
        assert!(Peer::of(std::io::stdin()).is_err());
    }

    #[tokio::test]
    async fn only_the_expected_process_is_let_in() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let mut other = Command::new("/bin/sleep").arg("1000").spawn().unwrap();
        let listener = UnixListener::bind(&path).unwrap();

        // More than are logged one by one, and than are turned away without a rest.
        let strangers = async {
            for _ in 0..2 * STRANGERS_AT_A_TIME {
                let mut stream = UnixStream::connect(&path).await.unwrap();
                assert_eq!(stream.read(&mut [0]).await.unwrap(), 0, "it is closed");
            }
        };
        tokio::select! {
            () = strangers => {}
            accepted = accept_from(&listener, other.id()) => panic!("{accepted:?} is not of process {}", other.id()),
        }
        other.kill().unwrap();
        other.wait().unwrap();

        let (connected, accepted) = tokio::join!(UnixStream::connect(&path), accept_from(&listener, process::id()));
        let (mut connected, accepted) = (connected.unwrap(), accepted.unwrap());
        accepted.try_write(b"x").unwrap();
        assert_eq!(connected.read_u8().await.unwrap(), b'x');
    }
}
