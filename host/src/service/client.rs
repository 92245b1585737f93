use std::{fmt, net::IpAddr};

use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use tonic::{
    Extensions, Request, Status,
    transport::server::{TcpConnectInfo, TlsConnectInfo, UdsConnectInfo},
};

/// Who asks: by what the connection proves and not by anything that is said over it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Client {
    /// A user of this host, over a Unix socket.
    User(u32),
    /// Whoever has the key of a certificate, over TLS: the certificate's BLAKE3 in hexadecimal.
    Certificate(String),
    /// Whoever is at an address, over TCP.
    Address(IpAddr),
}

impl Client {
    /// The client of a request.
    ///
    /// # Errors
    ///
    /// The connection proves nothing.
    pub(crate) fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        Self::at(request.extensions()).ok_or_else(Self::unknown)
    }

    /// What a connection is told that proves nothing.
    pub(crate) fn unknown() -> Status {
        Status::unauthenticated("this connection does not tell who is at its other end")
    }

    /// The client at the other end of a connection, as far as what is known of it proves one.
    pub(crate) fn at(known: &Extensions) -> Option<Self> {
        let tls = known.get::<TlsConnectInfo<TcpConnectInfo>>();
        let user = known.get::<UdsConnectInfo>().and_then(|info| info.peer_cred).map(|cred| Self::User(cred.uid()));
        let certificate = || Some(Self::Certificate(blake3::hash(tls?.peer_certs()?.first()?).to_hex().to_string()));
        let address = || {
            let addr = tls.map(TlsConnectInfo::get_ref).or_else(|| known.get::<TcpConnectInfo>())?.remote_addr()?;
            Some(Self::Address(addr.ip().to_canonical()))
        };
        user.or_else(certificate).or_else(address)
    }

    /// Whether it may know of what `owner` has built.
    pub fn sees(&self, owner: &Self) -> bool {
        self == owner || self.is_operator()
    }

    /// Root, and whoever runs the daemon.
    pub fn is_operator(&self) -> bool {
        matches!(self, Self::User(uid) if *uid == 0 || *uid == geteuid().as_raw())
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
    fn clients_see_their_own_and_operators_everything() {
        let [one, other] = [Client::Address([127, 0, 0, 1].into()), Client::Address([127, 0, 0, 2].into())];
        assert!(one.sees(&one) && !one.sees(&other));
        assert!(Client::User(0).sees(&other) && Client::User(geteuid().as_raw()).sees(&one));
        assert!(!Client::User(u32::MAX - 1).sees(&Client::User(0)));
        assert!(Client::of(&Request::new(())).is_err());
    }
}
