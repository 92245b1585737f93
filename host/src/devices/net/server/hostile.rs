//! Devices that have been taken over by their guests.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};

use super::super::wire::{Answer, Request, send_request};
use super::tests::Played;
use crate::network::{Family, Limits, Verdict};

fn listen() -> (TcpListener, SocketAddr, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    (listener, to, format!("127.0.0.1/32:{}", to.port()))
}

/// The device's and the server's end of a connection with the id 1.
async fn connect(played: &Played, listener: &TcpListener, to: SocketAddr) -> (TcpStream, TcpStream) {
    played.ask(&Request::Connect { id: 1, to });
    let (Answer::Connected { id: 1 }, Some(socket)) = played.answer().await else { panic!("no connection") };
    (socket.into(), listener.accept().unwrap().0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_the_device_keeps_is_of_no_use_after_the_end_on_record() {
    for reset in [false, true] {
        let (listener, to, rule) = listen();
        let played = Played::new(&rule);
        let (mut kept, mut server) = connect(&played, &listener, to).await;
        played.ask(&Request::Close { id: 1, reset });
        while played.record.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        let _ = server.write_all(b"late");
        let heard = kept.read(&mut [0; 4]);
        assert!(matches!(heard, Ok(0) | Err(_)), "the device has heard more: {heard:?}");
        if !reset {
            let said = kept.write(b"late");
            assert!(said.is_err(), "the device has said more: {said:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_closed_before_it_is_made_is_on_record() {
    let (listener, to, rule) = listen();
    let mut played = Played::new(&rule);
    for id in 0..50 {
        played.ask(&Request::Connect { id, to });
        played.ask(&Request::Close { id, reset: true });
    }
    drop(played.device);
    played.server.finish().await;
    // The kernel has accepted what the listener hasn't yet.
    listener.set_nonblocking(true).unwrap();
    let seen = std::iter::from_fn(|| listener.accept().ok()).count();
    let record = played.record.lock();
    assert!(seen <= record.len(), "the server has seen {seen}: {record:?}");
    let are_right = record.iter().all(|one| matches!(one.verdict, Verdict::Abandoned | Verdict::Allowed));
    assert!(are_right && record.iter().all(|one| one.address == Some(to)), "{record:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_hold_for_devices_that_never_stop_asking_or_take_no_answers() {
    let (listener, to, rule) = listen();
    for request in
        [Request::Close { id: 2, reset: false }, Request::Resolve { id: 2, name: String::new(), family: Family::V4 }]
    {
        let played = Played::with(&rule, Limits { sent_bytes: 10, ..Limits::default() });
        let (mut client, mut server) = connect(&played, &listener, to).await;
        client.write_all(&[7; 100]).unwrap();
        let device: OwnedFd = played.device.try_clone().unwrap();
        let asks = std::thread::spawn(move || {
            loop {
                match send_request(device.as_fd(), &request) {
                    Err(error) if error.kind() != ErrorKind::WouldBlock => break,
                    _ => {}
                }
            }
        });
        server.read_exact(&mut [0; 100]).unwrap();
        assert!(matches!(server.read(&mut [0]), Ok(0) | Err(_)), "there is more");
        drop(played);
        asks.join().unwrap();
    }
}

#[tokio::test]
async fn what_is_no_name_is_on_record_in_short() {
    let (_listener, _, rule) = listen();
    let played = Played::new(&rule);
    played.ask(&Request::Resolve { id: 1, name: "\u{1}".repeat(10_000), family: Family::V4 });
    played.answer().await;
    let record = played.record.lock();
    assert!(record[0].name.as_ref().unwrap().len() < 300, "{record:?}");
}
