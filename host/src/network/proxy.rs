//! A proxy that makes builds' connections, by CONNECT.

use std::fmt;
use std::io::{self, ErrorKind};
use std::str::FromStr;
use std::time::Duration;

use data_encoding::BASE64;
use percent_encoding::percent_decode_str;
use serde::{Deserialize, Deserializer, de};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long a proxy may take by default.
const PATIENCE: Duration = Duration::from_secs(30);

/// Most bytes of its answer, before those of the connection.
const MAX_ANSWER_BYTES: usize = 8 * 1024;

/// Most headers of it.
const MAX_HEADERS: usize = 64;

/// Where it is, and what proves that builds of this host may use it.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    host: String,
    port: u16,
    /// A user and a password, encoded.
    credentials: Option<String>,
    /// How long it may take to accept a connection, and to answer.
    patience: Duration,
}

/// Why the proxy makes no connection. None of them tells the credentials.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProxyError {
    #[error("the upstream proxy can't be reached: {0}")]
    Unreachable(io::Error),
    #[error("the upstream proxy didn't answer in time")]
    Silent,
    #[error("the upstream proxy closed the connection without an answer")]
    Closed,
    #[error("the upstream proxy didn't answer in HTTP, or at too great a length")]
    Garbage,
    #[error("the upstream proxy answered with status {0}")]
    Refused(u16),
}

impl Proxy {
    /// Connects to `NAME:PORT` or `ADDRESS:PORT`.
    pub(super) async fn connect(&self, to: &str) -> Result<TcpStream, ProxyError> {
        let connected = timeout(self.patience, TcpStream::connect((self.host.as_str(), self.port))).await;
        let connected = connected.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()));
        let mut stream = connected.map_err(ProxyError::Unreachable)?;
        timeout(self.patience, self.ask(&mut stream, to)).await.unwrap_or(Err(ProxyError::Silent))?;
        Ok(stream)
    }

    async fn ask(&self, stream: &mut TcpStream, to: &str) -> Result<(), ProxyError> {
        let credentials = self.credentials.as_ref();
        let credentials = credentials.map(|known| format!("Proxy-Authorization: Basic {known}\r\n"));
        let request = format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n{}\r\n", credentials.unwrap_or_default());
        stream.write_all(request.as_bytes()).await.map_err(|_| ProxyError::Closed)?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") && !answer.ends_with(b"\n\n") {
            if answer.len() >= MAX_ANSWER_BYTES {
                return Err(ProxyError::Garbage);
            }
            // One by one: what follows the answer is the connection's.
            match stream.read_u8().await {
                Ok(byte) => answer.push(byte),
                Err(_) => return Err(ProxyError::Closed),
            }
        }
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut response = httparse::Response::new(&mut headers);
        match (response.parse(&answer), response.code) {
            (Ok(httparse::Status::Complete(_)), Some(200..=299)) => Ok(()),
            (Ok(httparse::Status::Complete(_)), Some(code)) => Err(ProxyError::Refused(code)),
            _ => Err(ProxyError::Garbage),
        }
    }
}

impl FromStr for Proxy {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str = "must be http://HOST:PORT or http://USER:PASSWORD@HOST:PORT";
        let rest = text.strip_prefix("http://").ok_or(FORM)?;
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (credentials, place) = match rest.rsplit_once('@') {
            Some((credentials, place)) => (Some(credentials), place),
            None => (None, rest),
        };
        let (host, port) = place.rsplit_once(':').ok_or(FORM)?;
        let port = port.parse().ok().filter(|port| *port != 0).ok_or(FORM)?;
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host = bracketed.unwrap_or(host);
        let is_ipv6 = host.parse::<std::net::Ipv6Addr>().is_ok();
        let is_name =
            !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
        if is_ipv6 != bracketed.is_some() || !(is_ipv6 || is_name) {
            return Err(FORM);
        }
        let encoded = |credentials: &str| {
            let (user, password) = credentials.split_once(':').ok_or(FORM)?;
            let decoded: Vec<u8> = percent_decode_str(user).chain([b':']).chain(percent_decode_str(password)).collect();
            Ok::<_, &str>(BASE64.encode(&decoded))
        };
        let credentials = credentials.map(encoded).transpose()?;
        Ok(Self { host: host.to_owned(), port, credentials, patience: PATIENCE })
    }
}

/// Its errors don't quote the value, which may hold a password.
impl<'de> Deserialize<'de> for Proxy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy").field("host", &self.host).field("port", &self.port).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// A proxy that answers so and then reads to the end. Returns what it was asked.
    fn proxy(credentials: &str, answer: &[u8]) -> (Proxy, thread::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = format!("http://{credentials}{}", listener.local_addr().unwrap()).parse().unwrap();
        let answer = answer.to_owned();
        let served = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = Vec::new();
            while !asked.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                asked.push(byte[0]);
            }
            // The client may have gone before it has heard all.
            let _ = stream.write_all(&answer);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
            String::from_utf8(asked).unwrap()
        });
        (proxy, served)
    }

    #[tokio::test]
    async fn a_proxy_is_asked_for_the_name_and_what_follows_its_answer_is_the_connections() {
        let (proxy, served) = proxy("us%40er:pass%3a@", b"HTTP/1.1 200 Fine\r\nVia: a\r\n\r\nSSH-2.0");
        let mut stream = proxy.connect("git.example:22").await.unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).await.unwrap();
        drop(stream);
        assert_eq!(said, "SSH-2.0");
        let asked = served.join().unwrap();
        let credentials = BASE64.encode(b"us@er:pass:");
        let expected = format!(
            "CONNECT git.example:22 HTTP/1.1\r\nHost: git.example:22\r\nProxy-Authorization: Basic {credentials}\r\n\r\n"
        );
        assert_eq!(asked, expected);
    }

    #[tokio::test]
    async fn a_proxy_that_refuses_or_is_none_is_told_from_others() {
        let endless = [&b"HTTP/1.1 200 Fine\r\nA: "[..], &[b'a'; 2 * MAX_ANSWER_BYTES]].concat();
        let many = [&b"HTTP/1.1 200 Fine\r\n"[..], &b"A: a\r\n".repeat(MAX_HEADERS + 1), b"\r\n"].concat();
        for (answer, expected) in [
            (&b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"[..], "answered with status 407"),
            (b"HTTP/1.0 403 No\r\n\r\n", "answered with status 403"),
            (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 2\r\n\r\nno", "answered with status 502"),
            (b"HTTP/1.1 302 Found\r\nLocation: http://evil.example\r\n\r\n", "answered with status 302"),
            (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "didn't answer in HTTP"),
            (&endless, "didn't answer in HTTP"),
            (&many, "didn't answer in HTTP"),
            (b"HTTP/1.1 200 Fi", "closed the connection without an answer"),
            (b"", "closed the connection without an answer"),
        ] {
            let (proxy, served) = proxy("user:secret@", answer);
            let error = proxy.connect("a.example:443").await.unwrap_err();
            let said = format!("{error} {error:?} {proxy:?}");
            assert!(error.to_string().contains(expected), "{error}");
            assert!(!said.contains("secret") && !said.contains(&BASE64.encode(b"user:secret")), "{said}");
            served.join().unwrap();
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy: Proxy = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        // The kernel accepts the connection, and nobody answers.
        let hasty = Proxy { patience: Duration::from_millis(10), ..proxy.clone() };
        assert!(matches!(hasty.connect("a.example:443").await, Err(ProxyError::Silent)));
        drop(listener);
        assert!(matches!(proxy.connect("a.example:443").await, Err(ProxyError::Unreachable(_))));
    }

    #[test]
    fn what_is_no_proxy_is_refused_without_its_password() {
        for text in [
            "",
            "a.example:3128",
            "https://a.example:3128",
            "http://a.example",
            "http://a.example:0",
            "http://:3128",
            "http://user:secret@",
            "http://secret@a.example:3128",
            "http://user:secret@a.example:3128/path",
            "http://user:secret@::1:3128",
            "http://user:secret@[a.example]:3128",
        ] {
            let error = text.parse::<Proxy>().unwrap_err();
            assert!(error.contains("http://HOST:PORT") && !error.contains("secret"), "{text}");
        }
        for text in ["http://a.example:3128", "http://[::1]:3128/", "http://u:p@ss:w@10.0.0.8:3128"] {
            text.parse::<Proxy>().unwrap();
        }
    }
}
