//! Connections at a rate: ends, resets and backpressure come through the relay.

use std::io::{self, ErrorKind, Read, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::super::socket::reset_with_last_copy;
use super::super::wire::{Answer, Request};
use super::tests::Played;
use crate::network::{Limits, Refusal};

/// Bytes that take longer than a second at [`RATE`].
const MUCH: usize = 6 << 20;
const RATE: u64 = 4 << 20;

/// More than all buffers on the way hold.
const ALL: usize = 64 << 20;

const FAST: Limits = Limits { rate: 1 << 40, ..LIMITS };
const SLOW: Limits = Limits { rate: RATE, ..LIMITS };
const LIMITS: Limits = Limits {
    connections: 9,
    client_connections: 9,
    opens: 9,
    queries: 9,
    received_bytes: u64::MAX,
    sent_bytes: u64::MAX,
    rate: Limits::UNLIMITED_RATE,
};

/// A device, its end of the connection 1, and the server's.
async fn connected(limits: Limits) -> (Played, UnixStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to: SocketAddr = listener.local_addr().unwrap();
    let played = Played::with(&format!("127.0.0.1/32:{}", to.port()), limits);
    played.ask(&Request::Connect { id: 1, to });
    let (Answer::Connected { id: 1 }, Some(socket)) = played.answer().await else { panic!("no connection") };
    let device = UnixStream::from(socket);
    device.peer_addr().expect("it is no TCP socket");
    (played, device, listener.accept().unwrap().0)
}

/// Bytes of which each tells where it is.
fn some(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at ^ (at >> 8) ^ (at >> 16)) as u8).collect()
}

fn close(played: &Played, device: UnixStream, reset: bool) {
    drop(device);
    played.ask(&Request::Close { id: 1, reset });
}

async fn counts(mut played: Played) -> (u64, u64) {
    while played.record.lock().is_empty() {
        tokio::task::yield_now().await;
    }
    drop(played.device);
    played.server.finish().await;
    let record = played.record.lock();
    (record[0].sent, record[0].received)
}

/// All that is read until the end.
fn rest(mut from: impl Read) -> Vec<u8> {
    let mut all = Vec::new();
    from.read_to_end(&mut all).unwrap();
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn either_side_may_end_first_and_what_it_said_arrives_whole() {
    let (played, mut device, mut server) = connected(SLOW).await;
    device.set_nonblocking(false).unwrap();
    device.write_all(b"hello").unwrap();
    device.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rest(&server), b"hello");
    let download = std::thread::spawn(move || server.write_all(&some(MUCH)));
    assert!(rest(&device) == some(MUCH), "other bytes arrive");
    download.join().unwrap().unwrap();
    close(&played, device, false);
    // The end counts as a byte.
    assert_eq!(counts(played).await, (5, MUCH as u64 + 1));

    let (played, mut device, server) = connected(SLOW).await;
    device.set_nonblocking(false).unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rest(&device), b"");
    let upload = std::thread::spawn(move || rest(server));
    device.write_all(&some(MUCH)).unwrap();
    device.shutdown(Shutdown::Write).unwrap();
    // The relay still has some of it, and so have the sockets.
    close(&played, device, false);
    assert!(upload.join().unwrap() == some(MUCH), "other bytes arrive");
    let (sent, received) = counts(played).await;
    assert!([MUCH as u64, MUCH as u64 + 1].contains(&sent) && received == 1, "{sent} {received}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_servers_reset_reaches_the_device_and_is_no_end() {
    let (played, mut device, server) = connected(FAST).await;
    reset_with_last_copy(&server);
    drop(server);
    assert_eq!(played.answer().await.0, Answer::Refused { id: 1, why: Refusal::Refused });
    assert_eq!(device.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    close(&played, device, true);
    counts(played).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_devices_reset_reaches_the_server_and_is_no_end() {
    for server_ends_first in [false, true] {
        let (played, mut device, mut server) = connected(FAST).await;
        device.set_nonblocking(false).unwrap();
        device.write_all(b"half").unwrap();
        server.read_exact(&mut [0; 4]).unwrap();
        if server_ends_first {
            server.shutdown(Shutdown::Write).unwrap();
            assert_eq!(device.read(&mut [0]).unwrap(), 0);
        }
        close(&played, device, true);
        assert_eq!(server.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset, "{server_ends_first}");
        counts(played).await;
    }
}

/// Writes until no more is taken.
fn fill<S: AsFd>(mut to: S, mut write: impl FnMut(&mut S, &[u8]) -> io::Result<usize>) -> usize {
    let (all, patience) = (some(ALL), Timespec { tv_sec: 0, tv_nsec: 300_000_000 });
    let mut written = 0;
    while written < ALL {
        match write(&mut to, &all[written..]) {
            Ok(more) => written += more,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        let mut polled = [PollFd::new(&to, PollFlags::OUT)];
        if poll(&mut polled, Some(&patience)).unwrap() == 0 {
            break;
        }
    }
    written
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_read_is_not_sent_more() {
    let (played, device, mut server) = connected(FAST).await;
    let written = fill(&device, |device, bytes| (*device).write(bytes));
    assert!(written < ALL, "all of it is taken");
    let mut read = vec![0; written];
    server.read_exact(&mut read).unwrap();
    assert!(read == some(written), "other bytes arrive");
    close(&played, device, true);

    let (played, mut device, server) = connected(FAST).await;
    server.set_nonblocking(true).unwrap();
    let written = fill(&server, |server, bytes| (*server).write(bytes));
    assert!(written < ALL, "all of it is taken");
    let mut read = vec![0; written];
    device.set_nonblocking(false).unwrap();
    device.read_exact(&mut read).unwrap();
    assert!(read == some(written), "other bytes arrive");
    close(&played, device, true);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_on_bytes_ends_a_relay_with_a_reset() {
    let (played, mut device, server) = connected(Limits { sent_bytes: 10, ..FAST }).await;
    device.write_all(&[7; 100]).unwrap();
    assert_eq!(rest(server), [7; 100]);
    assert_eq!(played.answer().await.0, Answer::Refused { id: 1, why: Refusal::Denied });
    close(&played, device, true);
    while played.record.lock().is_empty() {
        tokio::task::yield_now().await;
    }
    let denied = played.record.lock()[0].to_string();
    assert!(denied.ends_with("(more bytes than [network] received or sent allows)"), "{denied}");
}
