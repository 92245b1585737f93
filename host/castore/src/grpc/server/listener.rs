use std::{
    convert::Infallible,
    io,
    pin::Pin,
    sync::Arc,
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
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_util::sync::CancellationToken;
use tonic::{
    service::Routes,
    transport::{Certificate, Identity, Server, ServerTlsConfig, server::Connected},
};

use super::{ServeError, limited_server};

/// Connections that one listener has open; more wait in its queue.
const MAX_CONNECTIONS: usize = 512;

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
        let name = self.to_string();
        match self {
            Self::Tcp(listener) => run(limited_server(), routes, listener, shutdown).await,
            Self::Tls(listener, Tls { identity, client_ca }) => {
                let tls = ServerTlsConfig::new().identity(identity).timeout(HANDSHAKE_TIMEOUT);
                let tls = match client_ca {
                    Some(authority) => tls.client_ca_root(authority),
                    None => tls,
                };
                match limited_server().tls_config(tls) {
                    Ok(server) => run(server, routes, listener, shutdown).await,
                    Err(error) => Err(error),
                }
            }
            Self::Unix(listener) => run(limited_server(), routes, listener, shutdown).await,
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

async fn run(
    mut server: Server,
    routes: Routes,
    listener: impl Accept,
    shutdown: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let incoming = incoming(listener);
    server.add_routes(routes).serve_with_incoming_shutdown(incoming, shutdown.cancelled_owned()).await
}

trait Accept: Send + Sync + 'static {
    type Connection: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static;

    fn accept_one(&self) -> impl Future<Output = io::Result<Self::Connection>> + Send;
}

impl Accept for TcpListener {
    type Connection = TcpStream;

    async fn accept_one(&self) -> io::Result<TcpStream> {
        let (connection, _) = self.accept().await?;
        connection.set_nodelay(true)?;
        Ok(connection)
    }
}

impl Accept for UnixListener {
    type Connection = UnixStream;

    async fn accept_one(&self) -> io::Result<UnixStream> {
        Ok(self.accept().await?.0)
    }
}

/// Accepts connections as long as there are not too many.
fn incoming<L: Accept>(listener: L) -> BoxStream<'static, Result<Limited<L::Connection>, Infallible>> {
    let turns = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    stream::unfold((listener, turns), |(listener, turns)| async {
        let turn = turns.clone().acquire_owned().await.ok()?;
        let connection = loop {
            match listener.accept_one().await {
                Ok(connection) => break connection,
                Err(_) => tokio::time::sleep(ACCEPT_RETRY).await,
            }
        };
        Some((Ok(Limited { connection, _turn: turn }), (listener, turns)))
    })
    .boxed()
}

/// A connection that counts until it is closed.
struct Limited<C> {
    connection: C,
    _turn: OwnedSemaphorePermit,
}

impl<C: Connected> Connected for Limited<C> {
    type ConnectInfo = C::ConnectInfo;

    fn connect_info(&self) -> C::ConnectInfo {
        self.connection.connect_info()
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for Limited<C> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
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
