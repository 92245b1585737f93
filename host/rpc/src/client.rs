use std::{fmt, net::IpAddr, str::FromStr};

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

/// As it is displayed.
impl FromStr for Client {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let client = match text.split_once(':') {
            Some(("user", uid)) => uid.parse().ok().map(Self::User),
            Some(("certificate", digest)) => {
                blake3::Hash::from_hex(digest).ok().map(|digest| Self::Certificate(digest.to_hex().to_string()))
            }
            Some(("address", address)) => address.parse().ok().map(Self::at),
            _ => None,
        };
        client.ok_or("must be user:UID, certificate:BLAKE3 in hexadecimal, or address:IP")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_read_as_it_is_displayed_and_nothing_else_is_one() {
        let digest = "0123456789abcdef".repeat(4);
        for text in ["user:1001", "address:10.0.0.1", "address:fd12::1", &format!("certificate:{digest}")] {
            assert_eq!(text.parse::<Client>().unwrap().to_string(), text);
        }
        assert_eq!("address:::ffff:10.0.0.1".parse::<Client>().unwrap().to_string(), "address:10.0.0.1");
        for text in ["", "1001", "uid:1001", "user:alice", "user:-1", "certificate:ab", "address:a.example"] {
            assert!(text.parse::<Client>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_connection_that_shows_nothing_is_no_client() {
        assert_eq!(Client::of(&Request::new(())).unwrap_err().code(), tonic::Code::Unauthenticated);
    }

    #[test]
    fn an_address_is_the_same_in_either_notation() {
        assert_eq!(Client::at("::ffff:10.0.0.1".parse().unwrap()), Client::Address([10, 0, 0, 1].into()));
    }
}
