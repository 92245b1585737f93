//! Which connections are accepted.
//!
//! ```text
//!   accepted ─ TLS handshake, if any ─▶ open ─▶ closed
//!        └──── no place, or lost it ────┴────────▲
//! ```
//!
//! [`Places`] says which connections get one. A client over TLS counts by its address until its first request.

use std::{convert::Infallible, io, net::SocketAddr, time::Duration};

use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Request,
    service::{Interceptor, InterceptorLayer, Routes},
    transport::{Certificate, Identity, Server, ServerTlsConfig, server::Connected},
};

use crate::{
    Client, Clients, ServeError,
    children::{is_child, log_refusal},
    connection::{Activity, Limited, Open, Timeouts},
    pages::{MAX_CONNECTION_PAGES, Pages},
    places::Places,
    serve::limited_server,
};

/// Most open connections of a listener.
const MAX_CONNECTIONS: usize = 512;

/// Most open connections of one client. It exceeds the default number of waiting builds of one client, since
/// each may have its own connection.
const CLIENT_CONNECTIONS: usize = 320;

/// Open connections of a Unix socket that only operators get, beside [`MAX_CONNECTIONS`].
const RESERVED_CONNECTIONS: usize = 16;

/// Most connections at their handshake, in addition to the open ones.
const MAX_HANDSHAKES: usize = 1024;

/// Most connections of one client at their handshake.
const CLIENT_HANDSHAKES: usize = 128;

/// After an error that is not of one connection (no more descriptors, say).
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Where clients connect.
#[derive(Debug)]
pub enum Listener {
    /// Over TCP, in clear.
    Tcp(TcpListener),
    /// Over TCP with TLS.
    Tls(TcpListener, Tls),
    /// Over a Unix socket.
    Unix(UnixListener),
}

/// How connections are encrypted.
#[derive(Debug, Clone)]
pub struct Tls {
    /// Who this host is.
    pub identity: Identity,
    /// The CA that signs the certificates of clients. With it, no other client is let in.
    pub client_ca: Option<Certificate>,
}

impl Listener {
    /// Refuses a listener over TCP as [`forbid_anonymous_tcp`] does its address.
    ///
    /// # Errors
    ///
    /// See [`AnonymousTcp`].
    pub fn forbid_anonymous_tcp(&self) -> Result<(), AnonymousTcp> {
        let (listener, tls) = match self {
            Self::Tcp(listener) => (listener, None),
            Self::Tls(listener, tls) => (listener, Some(tls)),
            Self::Unix(_) => return Ok(()),
        };
        match listener.local_addr() {
            Ok(addr) => forbid_anonymous_tcp(addr, tls),
            Err(_) => Err(AnonymousTcp(self.to_string())),
        }
    }

    /// Serves `clients` until `shutdown`, and then until all connections are closed.
    pub(crate) async fn serve(
        self,
        routes: Routes,
        clients: Clients,
        shutdown: CancellationToken,
    ) -> Result<(), ServeError> {
        let admitted = clients.clone();
        let admit = move |request: Request<()>| {
            admitted.admit(&Client::of(&request)?)?;
            Ok(request)
        };
        let server = Served { server: limited_server(), routes, is_certificate_optional: false };
        self.run(server, clients, admit, shutdown).await
    }

    /// Serves pages to browsers, by HTTP/1.1 or HTTP/2, until this is dropped. Over TLS a certificate of `client_ca` is asked for,
    /// but not required. Whom they let in is up to `pages`.
    ///
    /// # Errors
    ///
    /// See [`ServeError`].
    pub async fn serve_pages(self, pages: Pages) -> Result<(), ServeError> {
        let server = limited_server().accept_http1(true).max_concurrent_streams(MAX_CONNECTION_PAGES);
        let server = Served { server, routes: pages.into_routes(), is_certificate_optional: true };
        self.run(server, Clients::default(), Ok, CancellationToken::new()).await
    }

    async fn run(
        self,
        Served { mut server, routes, is_certificate_optional }: Served,
        clients: Clients,
        admit: impl Interceptor + Clone + Send + Sync + 'static,
        shutdown: CancellationToken,
    ) -> Result<(), ServeError> {
        let (name, limits) = (self.to_string(), Limits::default());
        let failed = |source| ServeError::Listener { listener: name.clone(), source };
        if let Self::Tls(_, Tls { identity, client_ca }) = &self {
            let tls = ServerTlsConfig::new().identity(identity.clone()).client_auth_optional(is_certificate_optional);
            let tls = match client_ca {
                Some(authority) => tls.client_ca_root(authority.clone()),
                None => tls,
            };
            server = server.tls_config(tls).map_err(failed)?;
        }
        match self {
            Self::Tcp(listener) | Self::Tls(listener, _) => {
                run(server, routes, listener, clients, limits, admit, shutdown).await
            }
            Self::Unix(listener) => run(server, routes, listener, clients, limits, admit, shutdown).await,
        }
        .map_err(failed)
    }
}

/// What a listener serves.
struct Served {
    server: Server,
    routes: Routes,
    is_certificate_optional: bool,
}

/// A TCP listener that anyone who reaches it may use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("anyone who reaches {0} could use it: no client has to prove who it is")]
pub struct AnonymousTcp(String);

/// Refuses an address that other hosts can reach if its clients don't have to prove who they are: without TLS, or with TLS
/// that doesn't ask for a client's certificate. Loopback addresses are always accepted.
///
/// # Errors
///
/// See [`AnonymousTcp`].
pub fn forbid_anonymous_tcp(addr: SocketAddr, tls: Option<&Tls>) -> Result<(), AnonymousTcp> {
    let is_authenticated = tls.is_some_and(|tls| tls.client_ca.is_some());
    if is_authenticated || addr.ip().to_canonical().is_loopback() {
        return Ok(());
    }
    Err(AnonymousTcp(addr.to_string()))
}

impl std::fmt::Display for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(listener) | Self::Tls(listener, _) => match listener.local_addr() {
                Ok(addr) => write!(f, "{addr}"),
                Err(error) => write!(f, "a TCP socket ({error})"),
            },
            Self::Unix(listener) => match listener.local_addr() {
                Ok(addr) => write!(f, "{addr:?}"),
                Err(error) => write!(f, "a Unix socket ({error})"),
            },
        }
    }
}

/// The connections of one listener.
#[derive(Debug, Clone)]
struct Limits {
    open: Places,
    /// The operators' own.
    reserved: Places,
    handshakes: Places,
    timeouts: Timeouts,
}

impl Limits {
    /// What finds a place for a client's connection.
    fn opens(&self, clients: &Clients, client: &Client) -> Open {
        let reserved = clients.is_operator(client).then(|| self.reserved.clone());
        let (open, client) = (self.open.clone(), client.clone());
        Box::new(move |activity| open.take(&client, activity).or_else(|| reserved.as_ref()?.take(&client, activity)))
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            open: Places::new(MAX_CONNECTIONS, CLIENT_CONNECTIONS),
            reserved: Places::new(RESERVED_CONNECTIONS, RESERVED_CONNECTIONS),
            handshakes: Places::new(MAX_HANDSHAKES, CLIENT_HANDSHAKES),
            timeouts: Timeouts::default(),
        }
    }
}

async fn run(
    server: Server,
    routes: Routes,
    listener: impl Accept,
    clients: Clients,
    limits: Limits,
    admit: impl Interceptor + Clone + Send + Sync + 'static,
    shutdown: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let incoming = incoming(listener, clients, limits, shutdown.clone());
    let mut server = server.layer(InterceptorLayer::new(admit));
    server.add_routes(routes).serve_with_incoming_shutdown(incoming, shutdown.cancelled_owned()).await
}

trait Accept: Send + Sync + 'static {
    type Connection: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static;

    fn accept_one(&self) -> impl Future<Output = io::Result<(Self::Connection, Client)>> + Send;
}

impl Accept for TcpListener {
    type Connection = TcpStream;

    async fn accept_one(&self) -> io::Result<(TcpStream, Client)> {
        let (connection, addr) = self.accept().await?;
        connection.set_nodelay(true)?;
        Ok((connection, Client::at(addr.ip())))
    }
}

impl Accept for UnixListener {
    type Connection = UnixStream;

    async fn accept_one(&self) -> io::Result<(UnixStream, Client)> {
        loop {
            let (connection, _) = self.accept().await?;
            let peer = connection.peer_cred()?;
            match peer.pid() {
                Some(pid) if is_child(pid) => log_refusal(pid),
                _ => return Ok((connection, Client::User(peer.uid()))),
            }
        }
    }
}

/// Accepts connections that get a place. They end soon after `drain`.
fn incoming<L: Accept>(
    listener: L,
    clients: Clients,
    limits: Limits,
    drain: CancellationToken,
) -> BoxStream<'static, Result<Limited<L::Connection>, Infallible>> {
    stream::unfold((listener, clients, limits, drain), |(listener, clients, limits, drain)| async {
        loop {
            let (connection, client) = match listener.accept_one().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!("can't accept a connection: {error}");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                    continue;
                }
            };
            let activity = Activity::new();
            let Some(handshake) = limits.handshakes.take(&client, &activity) else {
                tracing::debug!("closed a connection of {client}: too many are at their handshakes");
                continue;
            };
            let open = limits.opens(&clients, &client);
            let limited = Limited::new(connection, (client, activity), handshake, open, limits.timeouts, &drain);
            return Some((Ok(limited), (listener, clients, limits, drain)));
        }
    })
    .boxed()
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::{fs::PermissionsExt as _, net as unix},
        path::Path,
        thread,
    };

    use futures::poll;
    use nix::libc;
    use rcgen::{CertifiedKey, generate_simple_self_signed};
    use tokio::{io::AsyncReadExt as _, net::TcpSocket, task::JoinHandle, time::timeout};
    use tonic::{
        service::RoutesBuilder,
        transport::{ClientTlsConfig, Endpoint},
    };
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

    use super::*;

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
        let serving =
            tokio::spawn(run(server, routes.routes(), listener, Clients::default(), limits.clone(), Ok, never));

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
        let serving = tokio::spawn(run(
            limited_server(),
            routes.routes(),
            listener,
            Clients::default(),
            limits.clone(),
            Ok,
            never,
        ));
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
}
