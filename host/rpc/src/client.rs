use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
    str::FromStr,
};

use serde::{Deserialize, Serialize};
use tonic::{Extensions, Request, Status, transport::server::TlsConnectInfo};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer as _};

use crate::connection::ConnectionInfo;

/// Most bytes of the name in a certificate.
const MAX_NAME_BYTES: usize = 255;

/// Most bytes of the name of a key.
const MAX_KEY_NAME_BYTES: usize = 64;

/// A client, as its connection identifies it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Client {
    /// A user of this host, over a Unix socket.
    User(u32),
    /// The holder of a certificate, over TLS, by a subject alternative name: `uri:NAME`, `dns:NAME` or `email:NAME`. A renewed
    /// certificate with the same name is the same client.
    Certificate(String),
    /// Anyone at an address, over TCP. An IPv6 address stands for its network of 64 bits, since one host may have all of its
    /// addresses.
    Address(IpAddr),
    /// The holder of a key, for whom a user of this host speaks whom the server's configuration trusts to say so: `key:NAME`.
    Key(String),
}

impl Client {
    /// The holder of the key with this name.
    ///
    /// # Errors
    ///
    /// The rule that the name breaks.
    pub fn with_key(name: &str) -> Result<Self, String> {
        let is_good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.@".contains(&byte);
        match (1..=MAX_KEY_NAME_BYTES).contains(&name.len()) && name.bytes().all(is_good) {
            true => Ok(Self::Key(name.to_owned())),
            false => Err(format!(
                "must have 1 to {MAX_KEY_NAME_BYTES} letters, digits and characters - _ . @, not \"{}\"",
                name.escape_default()
            )),
        }
    }

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
        let certificates = connection.get::<TlsConnectInfo<ConnectionInfo>>().and_then(TlsConnectInfo::peer_certs);
        if let Some(certificate) = certificates.as_ref().and_then(|certificates| certificates.first()) {
            return Self::named_in(certificate).map_err(|rule| {
                Status::unauthenticated(format!("your certificate {rule}; ask for one with such a name"))
            });
        }
        let info = ConnectionInfo::of(connection);
        info.map(|info| info.client.clone())
            .ok_or_else(|| Status::unauthenticated("this connection does not identify its client"))
    }

    /// Anyone at this address.
    pub(crate) fn at(address: IpAddr) -> Self {
        Self::Address(match address.to_canonical() {
            IpAddr::V6(address) if !address.is_loopback() => {
                Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into()
            }
            address => address,
        })
    }

    /// The holder of a certificate in DER: its first URI, or else its first DNS name, or else its first e-mail address.
    fn named_in(certificate: &[u8]) -> Result<Self, &'static str> {
        let (_, certificate) = X509Certificate::from_der(certificate).map_err(|_| "can't be decoded")?;
        let names = certificate.subject_alternative_name().map_err(|_| "has several lists of alternative names")?;
        let (mut uri, mut dns, mut email) = (None, None, None);
        for name in names.iter().flat_map(|names| &names.value.general_names) {
            let (first, found) = match name {
                GeneralName::URI(name) => (&mut uri, format!("uri:{name}")),
                GeneralName::DNSName(name) => (&mut dns, format!("dns:{}", name.to_ascii_lowercase())),
                GeneralName::RFC822Name(name) => (&mut email, format!("email:{name}")),
                _ => continue,
            };
            first.get_or_insert(found);
        }
        let name =
            uri.or(dns).or(email).ok_or("has no subject alternative name that is a URI, DNS name or e-mail address")?;
        Self::named(&name).ok_or("has a subject alternative name that is not of 1 to 255 visible ASCII characters")
    }

    /// The holder of a certificate with this name.
    fn named(name: &str) -> Option<Self> {
        let (kind, rest) = name.split_once(':')?;
        let is_name = ["uri", "dns", "email"].contains(&kind)
            && (1..=MAX_NAME_BYTES).contains(&rest.len())
            && rest.bytes().all(|byte| byte.is_ascii_graphic());
        is_name.then(|| Self::Certificate(name.to_owned()))
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(uid) => write!(f, "user:{uid}"),
            Self::Certificate(name) => f.write_str(name),
            Self::Address(IpAddr::V6(network)) if !network.is_loopback() => write!(f, "address:{network}/64"),
            Self::Address(address) => write!(f, "address:{address}"),
            Self::Key(name) => write!(f, "key:{name}"),
        }
    }
}

/// As it is displayed.
impl FromStr for Client {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let client = match text.split_once(':') {
            Some(("user", uid)) => uid.parse().ok().map(Self::User),
            Some(("address", address)) => address.strip_suffix("/64").unwrap_or(address).parse().ok().map(Self::at),
            Some(("key", name)) => Self::with_key(name).ok(),
            Some(("dns", name)) => Self::named(&format!("dns:{}", name.to_ascii_lowercase())),
            _ => Self::named(text),
        };
        client.ok_or(
            "must be user:UID, uri:NAME, dns:NAME or email:NAME of a certificate, address:IPV4 or address:IPV6/64, or key:NAME",
        )
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::*;

    #[test]
    fn a_client_is_read_as_it_is_displayed_and_nothing_else_is_one() {
        let clients = [
            "user:1001",
            "address:10.0.0.1",
            "address:fd12::/64",
            "address:::1",
            "uri:spiffe://a/b",
            "email:a@b.example",
            "key:alice@laptop",
        ];
        for text in clients {
            assert_eq!(text.parse::<Client>().unwrap().to_string(), text);
        }
        for (text, shown) in
            [("::ffff:10.0.0.1", "10.0.0.1"), ("fd12::1", "fd12::/64"), ("fd12:0:0:0:7::1/64", "fd12::/64")]
        {
            assert_eq!(format!("address:{text}").parse::<Client>().unwrap().to_string(), format!("address:{shown}"));
        }
        let (long, long_key) = (format!("dns:{}", "a".repeat(256)), format!("key:{}", "a".repeat(65)));
        let wrong = [
            "",
            "1001",
            "uid:1001",
            "user:alice",
            "user:-1",
            "uri:",
            "dns:a b",
            "email:ä@b",
            "ip:1",
            "address:a.example",
            "key:",
            "key:a b",
            "key:a/../b",
            &long_key,
            &long,
        ];
        for text in wrong {
            assert!(text.parse::<Client>().is_err(), "{text}");
        }
    }

    fn certificate(names: Vec<SanType>) -> Vec<u8> {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = names;
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn a_certificates_holder_is_named_by_its_first_uri_dns_name_or_email() {
        let text = |text: &str| text.try_into().unwrap();
        let email = || SanType::Rfc822Name(text("ci@a.example"));
        let dns = || SanType::DnsName(text("CI.a.example"));
        let uri = || SanType::URI(text("spiffe://a.example/ci"));
        let ip = || SanType::IpAddress([10, 0, 0, 1].into());
        for (names, expected) in [
            (vec![ip(), email(), dns(), uri(), SanType::URI(text("spiffe://other"))], "uri:spiffe://a.example/ci"),
            (vec![email(), dns(), ip()], "dns:ci.a.example"),
            (vec![ip(), email()], "email:ci@a.example"),
        ] {
            let names = || names.clone();
            // A renewed certificate has another key and serial number.
            for _ in 0..2 {
                assert_eq!(Client::named_in(&certificate(names())).unwrap().to_string(), expected);
            }
        }
        let spaced = SanType::URI(text("spiffe://a b"));
        let long = SanType::URI(text(&"a".repeat(256)));
        for (names, rule) in [
            (vec![], "has no subject alternative name that is"),
            (vec![ip()], "has no subject alternative name that is"),
            (vec![spaced], "visible ASCII"),
            (vec![long], "1 to 255"),
        ] {
            let error = Client::named_in(&certificate(names)).unwrap_err();
            assert!(error.contains(rule), "{error}");
        }
        assert_eq!(Client::named_in(b"no certificate"), Err("can't be decoded"));
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
