//! Connections from when they are accepted.
//!
//! ```text
//!   accepted ─ TLS handshake, if any ─▶ open ─▶ closed
//!        └─ too many of the client's ─▶ closed ◀─┘
//! ```

use std::{
    convert::Infallible,
    io,
    pin::Pin,
    sync::{Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
};
use tokio_util::sync::CancellationToken;
use tonic::{
    service::Routes,
    transport::{Certificate, Identity, Server, ServerTlsConfig, server::Connected},
};

use super::{
    ServeError, limited_server,
    share::{Client, Shares, Turn},
};

/// Connections that one listener has open; more wait in its queue.
const MAX_CONNECTIONS: usize = 512;

/// Of which one client has so many at most, and others are closed: more than it may have builds waiting by default, and
/// each may come over a connection of its own.
const CLIENT_CONNECTIONS: usize = 320;

/// Connections that are at their handshake, beside those that are open; more wait in the listener's queue.
const MAX_HANDSHAKES: usize = 256;

/// Of which one client has half at most, and others are closed.
const CLIENT_HANDSHAKES: usize = MAX_HANDSHAKES / 2;

/// How long a client may take for the TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

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

/// How connections are made private.
#[derive(Debug, Clone)]
pub struct Tls {
    /// Who this host is.
    pub identity: Identity,
    /// Who vouches for clients; with it, no other client is let in.
    pub client_ca: Option<Certificate>,
}

impl Listener {
    /// Serves until `shutdown`, and then until all connections are closed.
    pub(super) async fn serve(self, routes: Routes, shutdown: CancellationToken) -> Result<(), ServeError> {
        let (name, limits) = (self.to_string(), Limits::default());
        match self {
            Self::Tcp(listener) => run(limited_server(), routes, listener, limits, shutdown).await,
            Self::Tls(listener, Tls { identity, client_ca }) => {
                let tls = ServerTlsConfig::new().identity(identity).timeout(HANDSHAKE_TIMEOUT);
                let tls = match client_ca {
                    Some(authority) => tls.client_ca_root(authority),
                    None => tls,
                };
                match limited_server().tls_config(tls) {
                    Ok(server) => run(server, routes, listener, limits, shutdown).await,
                    Err(error) => Err(error),
                }
            }
            Self::Unix(listener) => run(limited_server(), routes, listener, limits, shutdown).await,
        }
        .map_err(|source| ServeError::Listener { listener: name, source })
    }
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
    open: Shares<Client>,
    handshakes: Shares<Client>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            open: Shares::new(MAX_CONNECTIONS, CLIENT_CONNECTIONS),
            handshakes: Shares::new(MAX_HANDSHAKES, CLIENT_HANDSHAKES),
        }
    }
}

async fn run(
    mut server: Server,
    routes: Routes,
    listener: impl Accept,
    limits: Limits,
    shutdown: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let incoming = incoming(listener, limits);
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
        let (connection, _) = self.accept().await?;
        let user = connection.peer_cred()?.uid();
        Ok((connection, Client::User(user)))
    }
}

/// Accepts connections as long as there are not too many.
fn incoming<L: Accept>(listener: L, limits: Limits) -> BoxStream<'static, Result<Limited<L::Connection>, Infallible>> {
    stream::unfold((listener, limits), |(listener, limits)| async {
        loop {
            limits.open.wait().await.ok()?;
            limits.handshakes.wait().await.ok()?;
            let (connection, client) = match listener.accept_one().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!("can't accept a connection: {error}");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                    continue;
                }
            };
            if let Ok(turn) = limits.handshakes.try_take(client, 1) {
                let stage = Mutex::new(Stage::Handshake { _turn: turn });
                let limited = Limited { connection, client, open: limits.open.clone(), stage };
                return Some((Ok(limited), (listener, limits)));
            }
            tracing::debug!("closed a connection of {client:?}: too many are at their handshakes");
        }
    })
    .boxed()
}

/// A connection that counts until it is closed.
struct Limited<C> {
    connection: C,
    client: Client,
    open: Shares<Client>,
    stage: Mutex<Stage>,
}

enum Stage {
    Handshake { _turn: Turn },
    Open { _turn: Turn },
    Refused,
}

impl<C: Connected> Connected for Limited<C> {
    type ConnectInfo = C::ConnectInfo;

    /// tonic asks for it once: when the handshake is over.
    fn connect_info(&self) -> C::ConnectInfo {
        let stage = match self.open.try_take(self.client, 1) {
            Ok(turn) => Stage::Open { _turn: turn },
            Err(_) => {
                tracing::debug!("closed a connection of {:?}: too many are open", self.client);
                Stage::Refused
            }
        };
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner) = stage;
        self.connection.connect_info()
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for Limited<C> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if matches!(self.stage.get_mut().unwrap_or_else(PoisonError::into_inner), Stage::Refused) {
            return Poll::Ready(Err(io::ErrorKind::QuotaExceeded.into()));
        }
        Pin::new(&mut self.connection).poll_read(cx, buffer)
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for Limited<C> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.connection.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use rcgen::{CertifiedKey, generate_simple_self_signed};
    use tokio::{io::AsyncReadExt as _, net::TcpSocket, time::timeout};
    use tonic::service::RoutesBuilder;

    use super::*;
    use crate::{
        B3Digest, BlobService as _, Store,
        grpc::{GrpcBlobService, Peer, PeerOptions, ServeOptions, add_services},
    };

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

    async fn is_closed(connection: &mut TcpStream) {
        let read = timeout(LONG, connection.read(&mut [0])).await.unwrap();
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    }

    #[tokio::test]
    async fn one_client_leaves_connections_to_others() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let limits = Limits { open: Shares::new(3, 2), handshakes: Shares::new(3, 2) };
        let mut accepted = incoming(listener, limits.clone());
        let mut next = async || timeout(LONG, accepted.next()).await.unwrap().unwrap().unwrap();

        // At their handshakes.
        let (_one, _two) = (connect(1, addr).await, connect(1, addr).await);
        let (one, mut two) = (next().await, next().await);
        let (mut third, _other) = (connect(1, addr).await, connect(2, addr).await);
        let other = next().await;
        assert_eq!(other.client, client(2));
        is_closed(&mut third).await;

        // After them.
        drop(other);
        one.connect_info();
        two.connect_info();
        let mut third = {
            let _third = connect(1, addr).await;
            next().await
        };
        third.connect_info();
        assert_eq!(third.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::QuotaExceeded);
        drop(third);
        drop(one);
        let _fourth = connect(1, addr).await;
        let fourth = next().await;
        fourth.connect_info();
        assert!(matches!(*fourth.stage.lock().unwrap(), Stage::Open { .. }));
        assert!(matches!(two.stage.get_mut().unwrap(), Stage::Open { .. }));
        assert!(limits.handshakes.try_take(client(1), 2).is_ok());
    }

    #[tokio::test]
    async fn a_connection_is_open_from_the_end_of_its_handshake() {
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let identity = Identity::from_pem(cert.pem(), signing_key.serialize_pem());
        let server = limited_server().tls_config(ServerTlsConfig::new().identity(identity)).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let limits = Limits { open: Shares::new(1, 1), handshakes: Shares::new(2, 1) };
        let mut routes = RoutesBuilder::default();
        let shutdown = CancellationToken::new();
        add_services(&mut routes, &Store::memory(), &ServeOptions::default(), shutdown.clone());
        let serving = tokio::spawn(run(server, routes.routes(), listener, limits.clone(), shutdown));

        let _stranger = connect(2, addr).await;
        timeout(LONG, async {
            while limits.handshakes.try_take(client(2), 1).is_ok() {
                tokio::task::yield_now().await;
            }
        })
        .await
        .unwrap();
        assert!(limits.open.try_take(client(2), 1).is_ok());

        let options = PeerOptions { authority: Some(cert.pem().into()), ..PeerOptions::default() };
        let addr = format!("grpc+https://localhost:{}", addr.port());
        let blobs = GrpcBlobService::new(Peer::from_addr(&addr, &options).unwrap());
        assert!(!blobs.has(&B3Digest::of(b"never put")).await.unwrap());
        assert!(limits.open.try_take(client(2), 1).is_err());
        assert!(limits.handshakes.try_take(client(1), 1).is_ok());
        serving.abort();
    }
}
