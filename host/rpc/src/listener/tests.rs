use std::{
    os::unix::{fs::PermissionsExt as _, net as unix},
    path::Path,
    thread,
};

use futures::poll;
use nix::libc;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedKey, IsCa, Issuer, KeyPair, SanType, generate_simple_self_signed,
};
use tokio::{io::AsyncReadExt as _, net::TcpSocket, task::JoinHandle, time::timeout};
use tonic::{
    Status,
    service::RoutesBuilder,
    transport::{ClientTlsConfig, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::*;
use crate::{Guarded, MemoryBudget, Takes, guard};

/// Longer than any test takes.
const LONG: Duration = Duration::from_secs(60);

/// A connection from the address 127.0.0.`from`.
async fn connect(from: u8, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(([127, 0, 0, from], 0).into()).unwrap();
    socket.connect(to).await.unwrap()
}

fn client(from: u8) -> Client {
    Client::at([127, 0, 0, from].into())
}

#[tokio::test]
async fn one_client_leaves_connections_to_others() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let limits = Limits { open: Places::new(3, 2), handshakes: Places::new(3, 2), ..Limits::default() };
    let mut accepted = incoming(listener, Clients::default(), limits.clone(), CancellationToken::new());
    let mut next = async || timeout(LONG, accepted.next()).await.unwrap().unwrap().unwrap();
    let mut connected = async |from| {
        let connection = connect(from, addr).await;
        (connection, next().await)
    };
    let ends = async |connection: &mut Limited<TcpStream>| {
        assert_eq!(connection.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::QuotaExceeded);
    };

    // At their handshakes.
    let (_one, mut one) = connected(1).await;
    let (_two, two) = connected(1).await;
    let (_three, three) = connected(1).await;
    let (_other, other) = connected(2).await;
    assert_eq!(other.connect_info().client, client(2));
    ends(&mut one).await;
    assert_eq!([1, 2].map(|from| limits.handshakes.count(&client(from))), [2, 0]);

    // After them.
    drop(other);
    let (_four, four) = connected(1).await;
    let mut open = [three, four];
    for connection in &open {
        connection.connect_info();
    }
    drop(two);
    let (_five, five) = connected(1).await;
    five.connect_info();
    ends(&mut open[0]).await;
    assert!(poll!(Box::pin(open[1].read(&mut [0]))).is_pending());
    assert_eq!([&limits.open, &limits.handshakes].map(|places| places.count(&client(1))), [2, 0]);
}

#[tokio::test]
async fn a_connection_is_open_from_the_end_of_its_handshake() {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let identity = Identity::from_pem(cert.pem(), signing_key.serialize_pem());
    let server = limited_server().tls_config(ServerTlsConfig::new().identity(identity)).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let limits = Limits { open: Places::new(1, 1), handshakes: Places::new(2, 1), ..Limits::default() };
    let mut routes = RoutesBuilder::default();
    routes.add_service(tonic_health::server::health_reporter().1);
    let never = CancellationToken::new();
    let serving = tokio::spawn(run(server, routes.routes(), listener, Clients::default(), limits.clone(), Ok, never));

    let _stranger = connect(2, addr).await;
    timeout(LONG, async {
        while limits.handshakes.count(&client(2)) == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    assert_eq!(limits.open.count(&client(2)), 0);

    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(cert.pem()));
    let endpoint = Endpoint::from_shared(format!("https://localhost:{}", addr.port())).unwrap();
    let channel = endpoint.tls_config(tls).unwrap().connect().await.unwrap();
    HealthClient::new(channel).check(HealthCheckRequest::default()).await.unwrap();
    assert_eq!([&limits.open, &limits.handshakes].map(|places| places.count(&client(1))), [1, 0]);
    serving.abort();
}

/// An authority for clients' certificates.
fn client_authority() -> (Certificate, Issuer<'static, KeyPair>) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let certificate = Certificate::from_pem(params.self_signed(&key).unwrap().pem());
    (certificate, Issuer::new(params, key))
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_at_one_address_have_their_own_connections() {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let identity = Identity::from_pem(cert.pem(), signing_key.serialize_pem());
    let (authority, issuer) = client_authority();
    let server =
        limited_server().tls_config(ServerTlsConfig::new().identity(identity).client_ca_root(authority)).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let guard = guard::Limits {
        memory: MemoryBudget::new(1 << 20),
        takes: |_| Takes::Message(1 << 10),
        arrival_timeout: LONG,
        status: Status::from,
    };
    let mut routes = RoutesBuilder::default();
    routes.add_service(Guarded::new(tonic_health::server::health_reporter().1, guard));
    let limits = Limits { open: Places::new(5, 2), ..Limits::default() };
    let never = CancellationToken::new();
    let serving = tokio::spawn(run(server, routes.routes(), listener, Clients::default(), limits.clone(), Ok, never));

    let ask = async |name: &str| {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = vec![SanType::URI(name.try_into().unwrap())];
        let key = KeyPair::generate().unwrap();
        let identity = Identity::from_pem(params.signed_by(&key, &issuer).unwrap().pem(), key.serialize_pem());
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(cert.pem())).identity(identity);
        let endpoint = Endpoint::from_shared(format!("https://localhost:{}", addr.port())).unwrap();
        let mut health = HealthClient::new(endpoint.tls_config(tls).unwrap().connect().await.unwrap());
        health.check(HealthCheckRequest::default()).await.unwrap();
        health
    };
    let open = |name: &str| limits.open.count(&format!("uri:{name}").parse().unwrap());
    let _first = ask("spiffe://a").await;
    let _second = ask("spiffe://a").await;
    let mut other = ask("spiffe://b").await;
    assert_eq!((open("spiffe://a"), open("spiffe://b"), limits.open.count(&client(1))), (2, 1, 0));

    let _third = ask("spiffe://a").await;
    assert_eq!((open("spiffe://a"), open("spiffe://b")), (2, 1), "it has replaced one of its own");
    until(|| limits.open.count(&client(1)) == 0).await;
    other.check(HealthCheckRequest::default()).await.unwrap();
    serving.abort();
}

/// So many connections of a user, each with HTTP/2's first bytes and empty settings.
fn silent(path: &Path, user: u32, connections: usize) -> Vec<unix::UnixStream> {
    let path = path.to_owned();
    let connect = move || {
        // SAFETY: it changes the user of this thread alone, which ends soon, and takes no pointer.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, -1, user, -1) };
        assert_eq!(changed, 0, "{}", io::Error::last_os_error());
        let connect = |_| {
            let mut connection = unix::UnixStream::connect(&path).unwrap();
            // It may have been closed already.
            let _ = io::Write::write_all(&mut connection, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0");
            connection
        };
        (0..connections).map(connect).collect()
    };
    thread::spawn(connect).join().unwrap()
}

/// Whether a new connection of a user is answered.
async fn is_served(path: &Path, user: u32) -> bool {
    let connection = silent(path, user, 1).remove(0);
    connection.set_nonblocking(true).unwrap();
    let mut connection = UnixStream::from_std(connection).unwrap();
    let read = timeout(LONG, connection.read(&mut [0])).await.unwrap();
    matches!(read, Ok(1..))
}

/// A listener with these limits, for all users.
fn serve(path: &Path, limits: Limits, drain: &CancellationToken) -> JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666)).unwrap();
    let mut routes = RoutesBuilder::default();
    routes.add_service(tonic_health::server::health_reporter().1);
    // Nothing but the limits ends a connection.
    let server = limited_server().http2_keepalive_interval(None);
    let running = run(server, routes.routes(), listener, Clients::default(), limits, Ok, drain.clone());
    tokio::spawn(async move { running.await.unwrap() })
}

fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

async fn until(is_so: impl Fn() -> bool) {
    let wait = async {
        while !is_so() {
            tokio::task::yield_now().await;
        }
    };
    timeout(LONG, wait).await.unwrap();
}

/// In places that are full of silent connections of others, `each` of so many users.
async fn gets_in(user: u32, others: u32, each: usize, reserved: usize) -> bool {
    let (directory, never) = (directory(), CancellationToken::new());
    let path = directory.path().join("socket");
    let timeouts = Timeouts { opening: LONG, idle: LONG, draining: LONG };
    let total = others as usize * each;
    let (open, reserved) = (Places::new(total, each), Places::new(reserved, reserved));
    let serving = serve(&path, Limits { open: open.clone(), reserved, timeouts, ..Limits::default() }, &never);
    let _held: Vec<_> = (1001..).take(others as usize).map(|other| silent(&path, other, each)).collect();
    until(|| (1001..).take(others as usize).map(|other| open.count(&Client::User(other))).sum::<usize>() == total)
        .await;
    let is_served = is_served(&path, user).await;
    serving.abort();
    is_served
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_gets_in_where_others_have_taken_all_connections_unless_they_have_one_each() {
    assert!(gets_in(2000, 2, 256, 0).await);
    assert!(!gets_in(2000, 8, 1, 0).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_gets_in_where_others_have_one_connection_each() {
    for (reserved, expected) in [(RESERVED_CONNECTIONS, true), (0, false)] {
        assert_eq!(gets_in(0, 8, 1, reserved).await, expected, "{reserved} reserved");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_ends_though_a_client_is_silent_for_ever() {
    let (directory, drain) = (directory(), CancellationToken::new());
    let path = directory.path().join("socket");
    let timeouts = Timeouts { opening: LONG, idle: 1000 * LONG, ..Timeouts::default() };
    let limits = Limits { timeouts, ..Limits::default() };
    let serving = serve(&path, limits.clone(), &drain);
    let silent = silent(&path, 1001, 1);
    until(|| limits.open.count(&Client::User(1001)) == 1).await;
    drain.cancel();
    timeout(LONG, serving).await.unwrap().unwrap();
    drop(silent);
}

#[tokio::test(start_paused = true)]
async fn silent_connections_are_closed_and_forgotten() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let limits = Limits::default();
    let mut routes = RoutesBuilder::default();
    routes.add_service(tonic_health::server::health_reporter().1);
    let never = CancellationToken::new();
    let serving =
        tokio::spawn(run(limited_server(), routes.routes(), listener, Clients::default(), limits.clone(), Ok, never));
    let mut without_a_word = connect(1, addr).await;
    let polite = Endpoint::from_shared(format!("http://{addr}")).unwrap().connect().await.unwrap();
    let mut polite = HealthClient::new(polite);
    polite.check(HealthCheckRequest::default()).await.unwrap();
    without_a_word.read_to_end(&mut Vec::new()).await.unwrap();
    assert_eq!(limits.open.count(&client(1)), 1, "the other one answers pings");
    let start = tokio::time::Instant::now();
    while limits.open.count(&client(1)) > 0 {
        assert!(start.elapsed() < 2 * limits.timeouts.idle);
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    polite.check(HealthCheckRequest::default()).await.unwrap();
    serving.abort();
}

#[test]
fn only_loopback_addresses_take_clients_that_prove_nothing() {
    let identity = Identity::from_pem("certificate", "key");
    let without_clients = Tls { identity, client_ca: None };
    let with_clients = Tls { client_ca: Some(Certificate::from_pem("ca")), ..without_clients.clone() };
    for (addr, is_loopback) in [
        ("127.0.0.1:1", true),
        ("127.9.9.9:1", true),
        ("[::1]:1", true),
        ("[::ffff:127.0.0.1]:1", true),
        ("0.0.0.0:1", false),
        ("[::]:1", false),
        ("10.0.0.1:1", false),
        ("[::ffff:10.0.0.1]:1", false),
    ] {
        let addr = addr.parse().unwrap();
        for tls in [None, Some(&without_clients)] {
            assert_eq!(forbid_anonymous_tcp(addr, tls).is_ok(), is_loopback, "{addr}");
        }
        forbid_anonymous_tcp(addr, Some(&with_clients)).unwrap();
    }
}

#[tokio::test]
async fn anonymous_tcp_is_allowed_only_on_loopback() {
    let bind = async |addr| Listener::Tcp(TcpListener::bind(addr).await.unwrap());
    bind("127.0.0.1:0").await.forbid_anonymous_tcp().unwrap();
    bind("0.0.0.0:0").await.forbid_anonymous_tcp().unwrap_err();
    let dir = tempfile::tempdir().unwrap();
    let socket = UnixListener::bind(dir.path().join("socket")).unwrap();
    Listener::Unix(socket).forbid_anonymous_tcp().unwrap();
}
