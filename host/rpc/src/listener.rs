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
mod tests;
