use std::{fmt, net::IpAddr};

use serde::{Deserialize, Serialize};
use tonic::{
    Extensions, Request, Status,
    transport::server::{TcpConnectInfo, TlsConnectInfo, UdsConnectInfo},
};

/// A client, as its connection identifies it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Client {
    /// A user of this host, over a Unix socket.
    User(u32),
    /// The holder of a certificate's key, over TLS: the certificate's BLAKE3 in hexadecimal.
    Certificate(String),
    /// Anyone at an address, over TCP.
    Address(IpAddr),
}

impl Client {
    /// The client that sent a request.
    ///
    /// # Errors
    ///
    /// The connection doesn't show who it is.
    pub fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        Self::from_connection(request.extensions())
    }

    /// The client at the other end of the connection that these extensions of a request describe.
    pub(crate) fn from_connection(connection: &Extensions) -> Result<Self, Status> {
        let tls = connection.get::<TlsConnectInfo<TcpConnectInfo>>();
        let user =
            connection.get::<UdsConnectInfo>().and_then(|info| info.peer_cred).map(|cred| Self::User(cred.uid()));
        let certificate = || Some(Self::Certificate(blake3::hash(tls?.peer_certs()?.first()?).to_hex().to_string()));
        let address = || {
            let addr =
                tls.map(TlsConnectInfo::get_ref).or_else(|| connection.get::<TcpConnectInfo>())?.remote_addr()?;
            Some(Self::at(addr.ip()))
        };
        let client = user.or_else(certificate).or_else(address);
        client.ok_or_else(|| Status::unauthenticated("this connection does not identify its client"))
    }

    /// Anyone at this address.
    pub(crate) fn at(address: IpAddr) -> Self {
        Self::Address(address.to_canonical())
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(uid) => write!(f, "user:{uid}"),
            Self::Certificate(digest) => write!(f, "certificate:{digest}"),
            Self::Address(address) => write!(f, "address:{address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_shows_nothing_is_no_client() {
        assert_eq!(Client::of(&Request::new(())).unwrap_err().code(), tonic::Code::Unauthenticated);
    }

    #[test]
    fn an_address_is_the_same_in_either_notation() {
        assert_eq!(Client::at("::ffff:10.0.0.1".parse().unwrap()), Client::Address([10, 0, 0, 1].into()));
    }
}
