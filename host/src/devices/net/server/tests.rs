//! A device that asks as it should, or doesn't.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::AsRawFd as _;

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};
use parking_lot::Mutex;

use super::super::wire::{receive_answer, send_request};
use super::*;
use crate::network::{Connection, Grant, Limits, Policy, Resolvers, Rules, Verdict};

type Record = Arc<Mutex<Vec<Connection>>>;

fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

/// A build's broker with a rule for this address, and what it puts on record.
fn broker(rule: &str, limits: Limits) -> (Broker, Record) {
    let rules = Rules { allow_addresses: vec![rule.parse().unwrap()], ..Rules::default() };
    let policy = Policy { limits, ..Policy::new(rules, Resolvers::new(Vec::new())) };
    let record = Record::default();
    let kept = Arc::clone(&record);
    (Broker::new(Grant::new(policy), Arc::new(move |connection| kept.lock().push(connection))), record)
}

/// A device's end of a connection, its server, and what is on record.
pub(super) struct Played {
    pub(super) device: OwnedFd,
    pub(super) server: Server,
    pub(super) record: Record,
}

impl Played {
    /// With a rule for this address.
    pub(super) fn new(rule: &str) -> Self {
        Self::with(rule, Limits::default())
    }

    /// With a rule for this address, and limits.
    pub(super) fn with(rule: &str, limits: Limits) -> Self {
        let (ours, device) = pair();
        let (broker, record) = broker(rule, limits);
        let (server, unbound) = Server::start(ours).unwrap();
        unbound.bind(broker);
        Self { device, server, record }
    }

    pub(super) fn ask(&self, request: &Request) {
        send_request(self.device.as_fd(), request).unwrap();
    }

    pub(super) async fn answer(&self) -> (Answer, Option<OwnedFd>) {
        loop {
            match receive_answer(self.device.as_fd()) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => tokio::task::yield_now().await,
                answer => return answer.unwrap().unwrap(),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_made_passed_and_recorded() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let mut played = Played::new(&format!("127.0.0.1/32:{}", to.port()));
    played.ask(&Request::Connect { id: 7, to });
    let (Answer::Connected { id: 7 }, Some(socket)) = played.answer().await else { panic!("no connection") };
    let (mut server, _) = listener.accept().unwrap();
    let mut client = std::net::TcpStream::from(socket);
    client.write_all(b"hello").unwrap();
    server.read_exact(&mut [0; 5]).unwrap();
    server.write_all(b"hi").unwrap();
    client.set_nonblocking(false).unwrap();
    client.read_exact(&mut [0; 2]).unwrap();
    drop(client);
    played.ask(&Request::Close { id: 7, reset: true });
    assert_eq!(server.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    drop(played.device);
    played.server.finish().await;
    let expected = Connection { address: Some(to), sent: 5, received: 2, ..Connection::default() };
    assert_eq!(*played.record.lock(), [expected]);
}

#[tokio::test]
async fn a_connection_that_no_rule_has_is_denied_and_recorded() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let played = Played::new("127.0.0.1/32:1");
    played.ask(&Request::Connect { id: 1, to });
    assert_eq!(played.answer().await.0, Answer::Refused { id: 1, why: Refusal::Denied });
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock, "somebody has connected");
    // Nobody listens there.
    played.ask(&Request::Connect { id: 1, to: "127.0.0.1:1".parse().unwrap() });
    assert_eq!(played.answer().await.0, Answer::Refused { id: 1, why: Refusal::Refused });
    let verdicts: Vec<_> = played.record.lock().iter().map(|one| one.verdict.clone()).collect();
    let [Verdict::Denied(why), Verdict::Refused] = &verdicts[..] else { panic!("{verdicts:?}") };
    assert_eq!(why, "the address is loopback");
}

#[tokio::test]
async fn a_device_that_breaks_the_protocol_is_cut_off() {
    let garbage = Played::new("127.0.0.1/32:1");
    send(garbage.device.as_raw_fd(), &[255; 40], MsgFlags::empty()).unwrap();
    let mut server = garbage.server;
    assert!(matches!(server.failed().await, ServeError::Protocol(_)));

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let mut twice = Played::new(&format!("127.0.0.1/32:{}", to.port()));
    twice.ask(&Request::Connect { id: 1, to });
    twice.answer().await;
    twice.ask(&Request::Connect { id: 1, to });
    assert!(matches!(twice.server.failed().await, ServeError::OutOfStep(_)));

    let mut unasked = Played::new(&format!("127.0.0.1/32:{}", to.port()));
    unasked.ask(&Request::Connect { id: 1, to });
    unasked.answer().await;
    unasked.ask(&Request::Head { id: 1, bytes: vec![1].into() });
    assert!(matches!(unasked.server.failed().await, ServeError::OutOfStep(_)));
}

#[tokio::test]
async fn a_device_that_asks_before_there_is_a_build_is_cut_off() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let to = listener.local_addr().unwrap();
    let (name, family) = ("localhost".to_owned(), crate::network::Family::V4);
    let requests = [
        Request::Connect { id: 1, to },
        Request::Resolve { id: 1, name, family },
        Request::Close { id: 1, reset: true },
        Request::TurnedAway { to, others: 1 },
    ];
    for request in requests {
        let (ours, device) = pair();
        let (mut server, unbound) = Server::start(ours).unwrap();
        send_request(device.as_fd(), &request).unwrap();
        assert!(matches!(server.failed().await, ServeError::OutOfStep("it asked before there was a build")));
        let (broker, record) = broker(&format!("127.0.0.1/32:{}", to.port()), Limits::default());
        // Too late for it.
        unbound.bind(broker);
        assert!(receive_answer(device.as_fd()).unwrap().is_none(), "it got an answer to {request:?}");
        assert_eq!(*record.lock(), []);
        assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock, "somebody has connected");
    }
}

#[tokio::test]
async fn a_server_ends_with_its_device_or_without_hope_of_a_build() {
    let (ours, device) = pair();
    let (mut server, _unbound) = Server::start(ours).unwrap();
    drop(device);
    server.finish().await;
    let (ours, device) = pair();
    let (mut server, unbound) = Server::start(ours).unwrap();
    drop(unbound);
    server.finish().await;
    assert!(receive_answer(device.as_fd()).unwrap().is_none());
}
