//! Which server a build asks for, by the first bytes of its connection: TLS's ClientHello, or an HTTP request.

use std::collections::BTreeSet;

use rustls::server::Acceptor;

use super::policy::Denial;

/// Most bytes before the server's name is known.
const MAX_BYTES: usize = 32 * 1024;

/// Most headers of an HTTP request.
const MAX_HEADERS: usize = 128;

/// What the beginning of a connection says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// Nothing yet.
    Nothing,
    /// The server's name.
    Name(String),
    /// No name, and none is wanted.
    NoName,
}

/// The beginning of a connection.
pub(super) struct Check {
    names: Option<BTreeSet<String>>,
    /// Reads TLS; else it is HTTP.
    acceptor: Option<Acceptor>,
    received: Vec<u8>,
    /// So many bytes are parsed next if no blank line comes before: bytes that come one by one would be parsed again for each.
    parsed_next: usize,
}

impl Check {
    /// Wants one of these names, by TLS or HTTP. Without names, it takes any or none.
    pub(super) fn new(tls: bool, names: Option<BTreeSet<String>>) -> Self {
        Self { names, acceptor: tls.then(Acceptor::default), received: Vec::new(), parsed_next: 0 }
    }

    /// Whether it wants a name.
    pub(super) fn may_deny(&self) -> bool {
        self.names.is_some()
    }

    /// All bytes that it was given, to be passed on.
    pub(super) fn into_received(self) -> Vec<u8> {
        self.received
    }

    /// Takes the next bytes; none if there will be no more.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Result<Heard, Denial> {
        match (self.name(bytes), &self.names) {
            (Ok(None), _) => Ok(Heard::Nothing),
            (Ok(Some(name)), Some(names)) if !names.contains(&name) => Err(Denial::OtherServer),
            (Ok(Some(name)), _) => Ok(Heard::Name(name)),
            (Err(_), None) => Ok(Heard::NoName),
            (Err(denial), Some(_)) => Err(denial),
        }
    }

    fn name(&mut self, bytes: &[u8]) -> Result<Option<String>, Denial> {
        self.received.extend_from_slice(bytes);
        if bytes.is_empty() || self.received.len() > MAX_BYTES {
            return Err(Denial::NoServerName);
        }
        let is_due = self.received.len() >= self.parsed_next || self.has_blank_line(bytes.len());
        match &mut self.acceptor {
            Some(acceptor) => tls_name(acceptor, bytes),
            None if !is_due => Ok(None),
            None => {
                self.parsed_next = 2 * self.received.len();
                http_name(&self.received)
            }
        }
    }
}

impl Check {
    /// Whether headers may end in the last so many bytes.
    fn has_blank_line(&self, last: usize) -> bool {
        let beginning = self.received.len().saturating_sub(last + 2);
        let ending = &self.received[beginning..];
        ending.windows(2).any(|bytes| bytes == b"\n\n") || ending.windows(3).any(|bytes| bytes == b"\n\r\n")
    }
}

fn tls_name(acceptor: &mut Acceptor, mut bytes: &[u8]) -> Result<Option<String>, Denial> {
    while !bytes.is_empty() {
        acceptor.read_tls(&mut bytes).map_err(|_| Denial::NoServerName)?;
        // It is of no use after an error, and after its success.
        let accepted = acceptor.accept().map_err(|_| Denial::NoServerName)?;
        if let Some(accepted) = accepted {
            let hello = accepted.client_hello();
            let name = hello.server_name().ok_or(Denial::NoServerName)?;
            return Ok(Some(name.to_ascii_lowercase()));
        }
    }
    Ok(None)
}

fn http_name(received: &[u8]) -> Result<Option<String>, Denial> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    if request.parse(received).map_err(|_| Denial::NoServerName)?.is_partial() {
        return Ok(None);
    }
    let target = request.path.unwrap_or_default();
    let mut hosts = request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case("host"));
    let (Some(host), None) = (hosts.next(), hosts.next()) else { return Err(Denial::NoServerName) };
    let host = server(std::str::from_utf8(host.value).map_err(|_| Denial::NoServerName)?);
    // A target with a server of its own counts for servers instead of the header.
    let own = match (target.starts_with(['/', '*']), target.split_once("://")) {
        (true, _) => None,
        (false, Some((_, rest))) => rest.split(['/', '?', '#']).next(),
        (false, None) => return Err(Denial::NoServerName),
    };
    match own {
        Some(own) if server(own) != host => Err(Denial::OtherServer),
        _ => Ok(Some(host)),
    }
}

/// A server's name without its port. Of anything else than a port, such as a password, it stays a part, and the name is nobody's.
fn server(text: &str) -> String {
    let text = text.trim();
    let is_port = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit());
    let name = text.rsplit_once(':').filter(|(_, port)| is_port(port)).map_or(text, |(name, _)| name);
    name.trim_end_matches('.').to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::{ClientConfig, ClientConnection, RootCertStore, pki_types::ServerName};

    use super::*;

    fn names() -> BTreeSet<String> {
        BTreeSet::from(["a.example".to_owned(), "b.example".to_owned()])
    }

    /// What a TLS client says first.
    fn hello(server: &str) -> Vec<u8> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let config = config.with_root_certificates(RootCertStore::empty()).with_no_client_auth();
        let server = ServerName::try_from(server.to_owned()).unwrap();
        let mut client = ClientConnection::new(Arc::new(config), server).unwrap();
        let mut said = Vec::new();
        client.write_tls(&mut said).unwrap();
        said
    }

    #[test]
    fn tls_must_name_a_server_that_is_wanted() {
        for (server, expected) in [
            ("a.example", Ok(Heard::Name("a.example".to_owned()))),
            ("B.EXAMPLE", Ok(Heard::Name("b.example".to_owned()))),
            ("evil.example", Err(Denial::OtherServer)),
            // An address is no server name, so the client names none.
            ("93.184.215.14", Err(Denial::NoServerName)),
        ] {
            let mut check = Check::new(true, Some(names()));
            assert_eq!(check.feed(&hello(server)), expected, "{server}");
        }
    }

    #[test]
    fn bytes_are_taken_in_any_pieces_and_kept() {
        let said = hello("a.example");
        let mut check = Check::new(true, Some(names()));
        let (last, before) = said.split_last().unwrap();
        for byte in before {
            assert_eq!(check.feed(&[*byte]), Ok(Heard::Nothing));
        }
        assert_eq!(check.feed(&[*last]), Ok(Heard::Name("a.example".into())));
        assert_eq!(check.into_received(), said);
    }

    #[test]
    fn http_is_understood_in_any_pieces() {
        for (request, answer) in [
            ("GET / HTTP/1.1\r\nHost: a.example\r\n\r\n", Ok(Heard::Name("a.example".to_owned()))),
            ("GET / HTTP/1.1\nHost: a.example\n\n", Ok(Heard::Name("a.example".to_owned()))),
            ("GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", Err(Denial::OtherServer)),
        ] {
            for length in [1, 2, 3, 7] {
                let mut check = Check::new(false, Some(names()));
                let pieces: Vec<_> = request.as_bytes().chunks(length).collect();
                let (last, before) = pieces.split_last().unwrap();
                assert!(before.iter().all(|piece| check.feed(piece) == Ok(Heard::Nothing)), "{request} by {length}");
                assert_eq!(check.feed(last), answer, "{request} by {length}");
            }
        }
    }

    #[test]
    fn http_must_name_a_server_that_is_wanted() {
        let ok = Ok(Heard::Name("a.example".to_owned()));
        for (request, expected) in [
            ("GET / HTTP/1.1\r\nHost: a.example\r\n\r\n", ok.clone()),
            ("GET / HTTP/1.1\r\nAccept: */*\r\nhost: A.Example:80\r\n\r\nbody", ok.clone()),
            ("GET http://a.example/x HTTP/1.1\r\nHost: a.example\r\n\r\n", ok),
            ("GET http://evil.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n", Err(Denial::OtherServer)),
            ("GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", Err(Denial::OtherServer)),
            // A user and a password in front of another server.
            ("GET http://a.example:x@evil.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n", Err(Denial::OtherServer)),
            ("GET / HTTP/1.1\r\nHost: a.example:80@evil.example\r\n\r\n", Err(Denial::OtherServer)),
            ("GET / HTTP/1.1\r\nHost: a.example\r\nHost: evil.example\r\n\r\n", Err(Denial::NoServerName)),
            ("GET / HTTP/1.0\r\n\r\n", Err(Denial::NoServerName)),
            ("CONNECT a.example:443 HTTP/1.1\r\nHost: a.example\r\n\r\n", Err(Denial::NoServerName)),
            ("SSH-2.0-OpenSSH_9.2\r\n", Err(Denial::NoServerName)),
            ("GET / HTTP/1.1\r\nHost: a.exa", Ok(Heard::Nothing)),
        ] {
            let mut check = Check::new(false, Some(names()));
            assert_eq!(check.feed(request.as_bytes()), expected, "{request}");
        }
    }

    #[test]
    fn a_build_that_never_names_a_server_is_denied() {
        for tls in [true, false] {
            let mut check = Check::new(tls, Some(names()));
            assert_eq!(check.feed(&[]), Err(Denial::NoServerName));
            let mut check = Check::new(tls, Some(names()));
            let mut said = b"GET / HTTP/1.1\r\nA: ".to_vec();
            said.resize(MAX_BYTES, b'a');
            let _ = check.feed(&said);
            assert_eq!(check.feed(b"a"), Err(Denial::NoServerName));
        }
    }

    #[test]
    fn any_name_or_none_is_heard_where_none_is_wanted() {
        let name = Ok(Heard::Name("evil.example".to_owned()));
        let no_name = Ok(Heard::NoName);
        for (tls, said, expected) in [
            (true, &hello("evil.example")[..], name.clone()),
            (true, &hello("93.184.215.14"), no_name.clone()),
            (true, b"SSH-2.0-client\r\n", no_name.clone()),
            (true, b"", no_name.clone()),
            (false, b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", name),
            (false, b"GET / HTTP/1.0\r\n\r\n", no_name.clone()),
            (false, &[b'a'; MAX_BYTES + 1], no_name),
        ] {
            let mut check = Check::new(tls, None);
            assert_eq!(check.feed(said), expected, "{said:?}");
            assert_eq!(check.into_received(), said);
        }
    }
}
