use std::{
    env,
    error::Error as _,
    ffi::OsString,
    fs, io,
    str::FromStr as _,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use cofferdam_rpc::STREAM_WINDOW_BYTES;
use tokio::time::timeout;
use tonic::{
    Code, Status,
    body::Body,
    codegen::{Service, http},
    transport::{self, Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use super::super::{CHUNK_BYTES, MAX_BLOB_BYTES, Package, chain};
use crate::{
    AddrError,
    runtime::{enter, spawn},
};

/// Limit for making a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// Limit for a peer's silence when it is its turn.
const IDLE_TIMEOUT: Duration = Duration::from_secs(120);

/// Interval and timeout of the HTTP/2 pings that find out whether a peer is gone while a request waits for it.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// Flow control is left to the windows of the streams; the connection's window never limits them.
const CONNECTION_WINDOW_BYTES: u32 = i32::MAX as u32;

/// Largest frame that a peer may send. A message of a blob fits into one, so that it comes with few reads.
const MAX_FRAME_BYTES: u32 = CHUNK_BYTES as u32 + 1024;

/// Characters of a peer's message that are passed on.
const MAX_QUOTED_CHARS: usize = 1000;

/// Environment variable with the path of the client certificate (PEM) for peers over TLS.
pub const CERTIFICATE_VARIABLE: &str = "COFFERDAM_TLS_CERTIFICATE";

/// Environment variable with the path of its key (PEM).
pub const KEY_VARIABLE: &str = "COFFERDAM_TLS_KEY";

/// How to reach a peer.
#[derive(Debug, Clone)]
pub struct PeerOptions {
    /// CA certificates (PEM) that are trusted in addition to those of the system, which are in OpenSSL's default place or in
    /// `SSL_CERT_FILE`.
    pub authority: Option<Vec<u8>>,
    /// Client certificate for peers over TLS. The default are the files that [`CERTIFICATE_VARIABLE`] and [`KEY_VARIABLE`]
    /// name.
    pub identity: Option<Identity>,
    /// Limit for making a connection.
    pub connect_timeout: Duration,
    /// Limit for the peer's silence when it is its turn.
    pub idle_timeout: Duration,
    /// Largest blob that is accepted, in bytes.
    pub max_blob_bytes: u64,
}

impl Default for PeerOptions {
    fn default() -> Self {
        Self {
            authority: None,
            identity: None,
            connect_timeout: CONNECT_TIMEOUT,
            idle_timeout: IDLE_TIMEOUT,
            max_blob_bytes: MAX_BLOB_BYTES,
        }
    }
}

/// A server of blobs and directories. The connection is made when it is first needed, and again after it broke.
#[derive(Debug, Clone)]
pub struct Peer {
    addr: Arc<str>,
    channel: Channel,
    pub(super) idle_timeout: Duration,
    pub(super) max_blob_bytes: u64,
}

impl Peer {
    /// The peer at `grpc+http://host:port`, `grpc+https://host:port` or `grpc+unix:///socket`. With `?wait-connect=1` it
    /// must be reachable at once.
    ///
    /// # Errors
    ///
    /// Names the part of the address that is wrong, or why the peer can't be reached.
    pub fn from_addr(addr: &str, options: &PeerOptions) -> Result<Self, AddrError> {
        let target = Target::parse(addr)?;
        let open = |source| AddrError::Open { addr: addr.to_owned(), source };
        let identity = match target.scheme {
            Scheme::Https => options.identity.clone().map_or_else(identity_of_environment, |given| Ok(Some(given))),
            Scheme::Http | Scheme::Unix => Ok(None),
        };
        let endpoint =
            target.endpoint(options, identity.map_err(open)?).map_err(|error| open(io::Error::other(chain(&error))))?;
        let channel = if target.wait_connect {
            let connecting =
                spawn(async move { endpoint.connect().await.map_err(|error| io::Error::other(chain(&error))) });
            futures::executor::block_on(connecting).map_err(open)?
        } else {
            let _inside = enter().map_err(open)?;
            endpoint.connect_lazy()
        };
        let PeerOptions { idle_timeout, max_blob_bytes, .. } = *options;
        Ok(Self { addr: addr.into(), channel, idle_timeout, max_blob_bytes })
    }

    /// Whether this is well-formed as the address of a peer.
    pub(crate) fn is_addr(addr: &str) -> bool {
        Target::parse(addr).is_ok()
    }

    /// The connection, for other services.
    pub fn raw_channel(&self) -> Channel {
        self.channel.clone()
    }

    pub(super) fn channel(&self, package: Package) -> Readdressed {
        Readdressed { channel: self.channel.clone(), package }
    }

    /// Waits for the peer's answer, with a limit.
    pub(super) async fn answer<T>(&self, asked: impl Future<Output = Result<T, Status>>) -> io::Result<T> {
        match timeout(self.idle_timeout, asked).await {
            Ok(answered) => answered.map_err(|status| self.refused(&status)),
            Err(_) => Err(self.silent()),
        }
    }

    /// The package under which the peer has a service. `asked` is a request under snix's name, and gives the error if there
    /// is one: `NotFound` shows that the service is there.
    pub(super) async fn package_by(&self, asked: impl Future<Output = Option<Status>>) -> io::Result<Package> {
        match self.answer(async { Ok(asked.await) }).await? {
            Some(status) if status.code() == Code::Unimplemented => Ok(Package::Tvix),
            Some(status) if status.code() != Code::NotFound => Err(self.refused(&status)),
            _ => Ok(Package::Snix),
        }
    }

    /// The error for a status: with the peer's address and message.
    pub(super) fn refused(&self, status: &Status) -> io::Error {
        let kind = match status.code() {
            Code::NotFound => io::ErrorKind::NotFound,
            Code::InvalidArgument | Code::OutOfRange | Code::FailedPrecondition => io::ErrorKind::InvalidInput,
            Code::DataLoss => io::ErrorKind::InvalidData,
            Code::DeadlineExceeded => io::ErrorKind::TimedOut,
            Code::PermissionDenied | Code::Unauthenticated => io::ErrorKind::PermissionDenied,
            Code::Unavailable => io::ErrorKind::NotConnected,
            Code::Unimplemented => io::ErrorKind::Unsupported,
            _ => io::ErrorKind::Other,
        };
        let cause = status.source().map(|cause| format!(": {}", chain(cause))).unwrap_or_default();
        // The message may contain anything.
        let words = format!("{}{cause}", status.message());
        let words: String = words.chars().take(MAX_QUOTED_CHARS).flat_map(escape_control).collect();
        let text = format!("{}: {}: {words}", self.addr, status.code().description());
        io::Error::new(kind, PeerError { addr: Arc::clone(&self.addr), text, status: status.clone() })
    }

    /// The error for a wrong answer.
    pub(super) fn wrong(&self, what: impl std::fmt::Display) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, format!("{}: {what}", self.addr))
    }

    /// The error for a peer that was silent for too long.
    pub(super) fn silent(&self) -> io::Error {
        let message = format!("{}: the peer has been silent for {:?}", self.addr, self.idle_timeout);
        io::Error::new(io::ErrorKind::TimedOut, message)
    }
}

/// A refusal by a peer, or the reason why it can't be reached: what an [`io::Error`] of a store over gRPC wraps.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct PeerError {
    addr: Arc<str>,
    text: String,
    status: Status,
}

impl PeerError {
    /// The peer's address.
    pub fn addr(&self) -> &str {
        &self.addr
    }

    /// The status of the request.
    pub fn status(&self) -> &Status {
        &self.status
    }
}

/// The client certificate that the environment names, if both variables are set.
fn identity_of_environment() -> io::Result<Option<Identity>> {
    let file = |variable| env::var_os(variable).filter(|path| !path.is_empty());
    let (Some(certificate), Some(key)) = (file(CERTIFICATE_VARIABLE), file(KEY_VARIABLE)) else { return Ok(None) };
    let read = |path: OsString| {
        fs::read(&path).map_err(|error| io::Error::new(error.kind(), format!("can't read {path:?}: {error}")))
    };
    Ok(Some(Identity::from_pem(read(certificate)?, read(key)?)))
}

fn escape_control(c: char) -> Vec<char> {
    if c.is_control() { c.escape_default().collect() } else { vec![c] }
}

/// The channel, with requests addressed to the services of a package.
#[derive(Debug, Clone)]
pub(super) struct Readdressed {
    channel: Channel,
    package: Package,
}

impl Service<http::Request<Body>> for Readdressed {
    type Response = http::Response<Body>;
    type Error = transport::Error;
    type Future = <Channel as Service<http::Request<Body>>>::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.channel.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        Package::Snix.readdress(&mut request, self.package);
        self.channel.call(request)
    }
}

/// The parts of an address.
struct Target<'a> {
    scheme: Scheme,
    /// Host and port, or the path of a socket.
    place: &'a str,
    wait_connect: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Scheme {
    Http,
    Https,
    Unix,
}

impl<'a> Target<'a> {
    fn parse(addr: &'a str) -> Result<Self, AddrError> {
        let wrong =
            |part, value: &str, rule| AddrError::Part { addr: addr.to_owned(), part, value: value.to_owned(), rule };
        let Some((scheme, rest)) = addr.split_once("://") else {
            let known = "grpc+http://, grpc+https:// or grpc+unix:///";
            return Err(AddrError::NoScheme { addr: addr.to_owned(), known });
        };
        let scheme = match scheme {
            "grpc+http" => Scheme::Http,
            "grpc+https" => Scheme::Https,
            "grpc+unix" => Scheme::Unix,
            _ => return Err(wrong("scheme", scheme, "is not grpc+http, grpc+https or grpc+unix")),
        };
        let (place, query) = rest.split_once('?').map_or((rest, None), |(place, query)| (place, Some(query)));
        let wait_connect = match query {
            None | Some("wait-connect=0") => false,
            Some("wait-connect=1") => true,
            Some(query) => return Err(wrong("query", query, "is neither wait-connect=0 nor wait-connect=1")),
        };
        if scheme == Scheme::Unix {
            if !place.starts_with('/') {
                return Err(wrong("path", place, "does not start with a slash: write grpc+unix:///absolute/socket"));
            }
            return Ok(Self { scheme, place, wait_connect });
        }
        let (place, path) = place.split_once('/').unwrap_or((place, ""));
        if !path.is_empty() {
            return Err(wrong("path", path, "does not belong there: nothing follows the host and the port"));
        }
        let is_host_port = |authority: http::uri::Authority| {
            let host = authority.host();
            !host.is_empty() && (authority.port_u16().is_some() || authority.as_str().ends_with(host))
        };
        if !http::uri::Authority::from_str(place).is_ok_and(is_host_port) {
            return Err(wrong("host and port", place, "are not host:port, such as localhost:8000 or [::1]:8000"));
        }
        if place.contains('@') {
            return Err(wrong("host and port", place, "hold a user, but there is no login"));
        }
        Ok(Self { scheme, place, wait_connect })
    }

    fn endpoint(&self, options: &PeerOptions, identity: Option<Identity>) -> Result<Endpoint, transport::Error> {
        let scheme = match self.scheme {
            Scheme::Http => "http",
            Scheme::Https => "https",
            Scheme::Unix => "unix",
        };
        let endpoint = Endpoint::from_shared(format!("{scheme}://{}", self.place))?
            .connect_timeout(options.connect_timeout)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(MAX_FRAME_BYTES)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE);
        if self.scheme != Scheme::Https {
            return Ok(endpoint);
        }
        let tls = ClientTlsConfig::new().with_native_roots().timeout(options.connect_timeout);
        let tls = match identity {
            Some(identity) => tls.identity(identity),
            None => tls,
        };
        endpoint.tls_config(match &options.authority {
            Some(pem) => tls.ca_certificate(Certificate::from_pem(pem)),
            None => tls,
        })
    }
}
