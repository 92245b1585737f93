//! The HTTP API of cloud-hypervisor, over a Unix socket.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::task::JoinHandle;

use crate::machine::jail::escape;

use super::error::VmmError;

/// The name of cloud-hypervisor in messages.
pub(super) const NAME: &str = "cloud-hypervisor";

/// Longest answer that is accepted, in bytes.
const MAX_ANSWER_BYTES: usize = 64 * 1024;

/// Time limit for a change. The slowest is booting where KVM itself is emulated.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// One connection to the API, closed on drop.
#[derive(Debug)]
pub(super) struct Api {
    sender: SendRequest<Full<Bytes>>,
    connection: JoinHandle<()>,
}

impl Api {
    pub(super) async fn connect(stream: UnixStream) -> Result<Self, VmmError> {
        let api_error = |source| VmmError::Api { program: NAME, call: "the first request", source };
        stream.set_nonblocking(true).map_err(api_error)?;
        let stream = tokio::net::UnixStream::from_std(stream).map_err(api_error)?;
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| api_error(io::Error::other(error)))?;
        // Its error reaches the request that waits for the answer.
        let connection = tokio::spawn(async move { drop(connection.await) });
        Ok(Self { sender, connection })
    }

    /// Asks a question that needs no work, within `limit`.
    pub(super) async fn get<T: DeserializeOwned>(
        &mut self,
        call: &'static str,
        limit: Duration,
    ) -> Result<T, VmmError> {
        let said = self.call(Method::GET, call, Bytes::new(), limit).await?;
        serde_json::from_slice(&said).map_err(|error| VmmError::Api { program: NAME, call, source: error.into() })
    }

    pub(super) async fn put(&mut self, call: &'static str, body: Option<&serde_json::Value>) -> Result<(), VmmError> {
        let body = body.map(|body| Bytes::from(body.to_string())).unwrap_or_default();
        self.call(Method::PUT, call, body, ANSWER_TIMEOUT).await.map(drop)
    }

    async fn call(
        &mut self,
        method: Method,
        call: &'static str,
        body: Bytes,
        limit: Duration,
    ) -> Result<Bytes, VmmError> {
        let answer = tokio::time::timeout(limit, self.exchange(method, call, body)).await;
        let silent = |_| VmmError::Silent { program: NAME, call, limit };
        let (status, said) = answer.map_err(silent)?.map_err(|source| VmmError::Api { program: NAME, call, source })?;
        if status.is_success() {
            return Ok(said);
        }
        // The answer is a list of messages, each the cause of the one before.
        let chain = serde_json::from_slice(&said).map(|messages: Vec<String>| Bytes::from(messages.join(": ")));
        let said = escape(&chain.unwrap_or(said));
        Err(VmmError::Refused { program: NAME, call, status: status.as_u16(), said })
    }

    async fn exchange(&mut self, method: Method, call: &str, body: Bytes) -> io::Result<(StatusCode, Bytes)> {
        let request = Request::builder()
            .method(method)
            .uri(format!("/api/v1/{call}"))
            .header("Host", "localhost")
            .header("Content-Type", "application/json")
            .body(Full::new(body))
            .map_err(io::Error::other)?;
        // After an answer it takes a moment until the next request can be sent.
        self.sender.ready().await.map_err(io::Error::other)?;
        let response = self.sender.send_request(request).await.map_err(io::Error::other)?;
        let status = response.status();
        let said = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await.map_err(io::Error::other)?;
        Ok((status, said.to_bytes()))
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::thread;

    use super::*;

    /// Answers one request with `answer`; the thread returns the request's head.
    async fn ask(answer: Vec<u8>) -> (Result<(), VmmError>, String) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            let mut request = vec![];
            while !request.ends_with(b"}") {
                let mut buffer = [0; 1024];
                let length = theirs.read(&mut buffer).unwrap();
                request.extend(&buffer[..length]);
            }
            // The client hangs up on an answer that is too long.
            let _ = theirs.write_all(&answer);
            String::from_utf8(request).unwrap()
        });
        let mut api = Api::connect(ours).await.unwrap();
        let outcome = api.put("vm.create", Some(&serde_json::json!({ "a": 1 }))).await;
        drop(api);
        (outcome, server.join().unwrap())
    }

    #[tokio::test]
    async fn a_call_is_made_and_granted() {
        let (outcome, request) = ask(b"HTTP/1.1 204 No Content\r\n\r\n".to_vec()).await;
        outcome.unwrap();
        assert!(request.starts_with("PUT /api/v1/vm.create HTTP/1.1\r\n"), "{request}");
        assert!(request.ends_with("\r\n\r\n{\"a\":1}"), "{request}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn calls_follow_each_other_without_delay() {
        const CALLS: usize = 200;
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            for _ in 0..CALLS {
                let mut request = vec![];
                while !request.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    theirs.read_exact(&mut byte).unwrap();
                    request.extend(byte);
                }
                theirs.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").unwrap();
            }
        });
        let mut api = Api::connect(ours).await.unwrap();
        for _ in 0..CALLS {
            let _: serde_json::Value = api.get("vmm.ping", ANSWER_TIMEOUT).await.unwrap();
        }
        server.join().unwrap();
    }

    #[tokio::test]
    async fn a_refusal_carries_its_words_escaped() {
        for (words, expected) in [
            ("[\"Error from API\",\"no \\u001b[2J\"]", "Error from API: no \\u{1b}[2J"),
            ("not a list\x07", "not a list\\u{7}"),
        ] {
            let answer = format!("HTTP/1.1 500 Oh\r\nContent-Length: {}\r\n\r\n{words}", words.len());
            let (outcome, _) = ask(answer.into_bytes()).await;
            let error = outcome.unwrap_err().to_string();
            assert_eq!(error, format!("cloud-hypervisor refused vm.create (HTTP status 500): {expected}"));
        }
    }

    #[tokio::test]
    async fn an_endless_or_broken_answer_is_an_error() {
        let mut endless = b"HTTP/1.1 500 Oh\r\nContent-Length: 89999999\r\n\r\n".to_vec();
        endless.resize(endless.len() + 2 * MAX_ANSWER_BYTES, b'x');
        for answer in [endless, b"HTTP/1.1 500".to_vec(), b"nonsense\r\n\r\n".to_vec(), vec![]] {
            let (outcome, _) = ask(answer).await;
            assert!(matches!(outcome, Err(VmmError::Api { call: "vm.create", .. })));
        }
    }
}
