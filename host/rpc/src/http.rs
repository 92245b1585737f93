//! Plain HTTP/1.1 for clients that only ask: no request has a body.
//!
//! ```text
//!   accepted ─ a place ─▶ head of a request ─▶ answer ─▶ next head … ─▶ closed
//!        └── none ──┴──── too slow ─────┴─────────┴────────────────────────▲
//! ```
//!
//! Each address has a share of the connections, as [`Places`] says. A head has a limited size and must arrive in time. A client
//! must take its answers at [`HttpOptions::least_rate`], with some slack for pauses.

use std::{
    convert::Infallible,
    io::{self, ErrorKind},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::{
    Request, Response,
    body::{Body, Frame, Incoming, SizeHint},
    http::request::Parts,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpListener,
    task::JoinSet,
    time::{Instant, Sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{
    Client,
    connection::{Activity, InProgress},
    places::{Place, Places},
};

/// Most bytes of a request's head.
const MAX_HEAD_BYTES: usize = 16 * 1024;

/// Most lines of it.
const MAX_HEADERS: usize = 64;

/// After an error that is not of one connection (no more descriptors, say).
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// The body of an answer. An error cuts the connection.
pub type HttpBody = UnsyncBoxBody<Bytes, io::Error>;

/// Limits of a server.
#[derive(Debug, Clone, Copy)]
pub struct HttpOptions {
    /// Most open connections.
    pub connections: usize,
    /// Most of them from one address.
    pub address_connections: usize,
    /// How long the head of a request may take, from when the connection is accepted or the last answer has ended.
    pub head_timeout: Duration,
    /// Bytes a second that a client must take.
    pub least_rate: u32,
    /// How long a client may take nothing, once. Taking bytes faster than at the least rate restores it.
    pub slack: Duration,
}

impl Default for HttpOptions {
    fn default() -> Self {
        Self {
            connections: 512,
            address_connections: 320,
            head_timeout: Duration::from_secs(30),
            least_rate: 16 * 1024,
            slack: Duration::from_secs(60),
        }
    }
}

/// Answers requests with `answer` until `shutdown`, and then those in progress. Dropping the future cuts them. `answer` gets the
/// client by its address, and the head of the request.
pub async fn serve_http<A, F>(listener: TcpListener, options: HttpOptions, answer: A, shutdown: CancellationToken)
where
    A: Fn(Client, Parts) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<HttpBody>> + Send + 'static,
{
    let places = Places::new(options.connections, options.address_connections);
    let mut open = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = open.join_next() => continue,
            () = shutdown.cancelled() => break,
        };
        let (connection, addr) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!("can't accept a connection: {error}");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let (client, activity) = (Client::at(addr.ip()), Activity::new());
        let Some(place) = places.take(&client, &activity) else {
            tracing::debug!("closed a connection of {client}: there are too many");
            continue;
        };
        let connection = Taken::new(connection, options);
        open.spawn(converse(connection, options, (client, activity, place), answer.clone(), shutdown.clone()));
    }
    while open.join_next().await.is_some() {}
}

async fn converse<C, A, F>(
    connection: Taken<C>,
    options: HttpOptions,
    (client, activity, place): (Client, Activity, Place),
    answer: A,
    shutdown: CancellationToken,
) where
    C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    A: Fn(Client, Parts) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<HttpBody>> + Send + 'static,
{
    let service = service_fn(|request: Request<Incoming>| {
        let in_progress = activity.begin();
        let (head, _) = request.into_parts();
        let answered = answer(client.clone(), head);
        async move { Ok::<_, Infallible>(answered.await.map(|body| Counted { body, _in_progress: in_progress })) }
    });
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(options.head_timeout);
    server.max_buf_size(MAX_HEAD_BYTES).max_headers(MAX_HEADERS);
    let mut served = std::pin::pin!(server.serve_connection(TokioIo::new(connection), service));
    let ended = tokio::select! {
        ended = &mut served => ended,
        () = place.lost().cancelled() => return,
        () = shutdown.cancelled() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error = &error as &dyn std::error::Error, "a connection of {client} ended");
    }
}

/// A body whose request is in progress until it has been sent.
struct Counted {
    body: HttpBody,
    _in_progress: InProgress,
}

impl Body for Counted {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A connection that fails when its client takes bytes too slowly.
struct Taken<C> {
    connection: C,
    options: HttpOptions,
    /// How long the client may still take nothing.
    slack: Duration,
    /// Since when it has taken nothing of what it was offered.
    waiting_since: Option<Instant>,
    timer: Pin<Box<Sleep>>,
}

impl<C> Taken<C> {
    fn new(connection: C, options: HttpOptions) -> Self {
        let timer = Box::pin(sleep_until(Instant::now()));
        Self { connection, options, slack: options.slack, waiting_since: None, timer }
    }

    /// Judges an attempt to write.
    fn judge(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match written {
            Poll::Ready(Ok(bytes)) => {
                let waited = self.waiting_since.take().map_or(Duration::ZERO, |since| since.elapsed());
                let earned = Duration::from_secs(bytes as u64) / self.options.least_rate.max(1);
                self.slack = (self.slack.saturating_sub(waited) + earned).min(self.options.slack);
                written
            }
            Poll::Pending => {
                let since = *self.waiting_since.get_or_insert_with(Instant::now);
                self.timer.as_mut().reset(since + self.slack);
                match self.timer.as_mut().poll(cx) {
                    Poll::Ready(()) => Poll::Ready(Err(ErrorKind::TimedOut.into())),
                    Poll::Pending => Poll::Pending,
                }
            }
            Poll::Ready(Err(_)) => written,
        }
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for Taken<C> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_read(cx, buf)
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for Taken<C> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.connection).poll_write(cx, bytes);
        self.judge(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.connection).poll_write_vectored(cx, slices);
        self.judge(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.connection.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use futures::stream;
    use http_body_util::{BodyExt as _, Full, StreamBody};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _, duplex},
        net::{TcpSocket, TcpStream},
        time::timeout,
    };

    use super::*;

    /// Longer than any test takes.
    const LONG: Duration = Duration::from_secs(60);

    /// A server that answers with the path that it is asked for, or at `/endless` with zeros.
    async fn server(options: HttpOptions) -> (SocketAddr, CancellationToken, tokio::task::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (addr, shutdown) = (listener.local_addr().unwrap(), CancellationToken::new());
        let answer = async |_: Client, head: Parts| Response::new(body(head.uri.path()));
        (addr, shutdown.clone(), tokio::spawn(serve_http(listener, options, answer, shutdown)))
    }

    fn body(path: &str) -> HttpBody {
        match path {
            "/endless" => {
                StreamBody::new(stream::repeat_with(|| Ok(Frame::data(Bytes::from_static(&[0; 4096]))))).boxed_unsync()
            }
            _ => Full::new(Bytes::from(path.to_owned())).map_err(|never| match never {}).boxed_unsync(),
        }
    }

    async fn connect(from: u8, to: SocketAddr) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 0, from], 0).into()).unwrap();
        socket.connect(to).await.unwrap()
    }

    /// Everything that comes until the connection ends.
    async fn rest(connection: &mut TcpStream) -> String {
        let mut bytes = Vec::new();
        // A connection that is cut while bytes of its client wait is reset.
        let _ = timeout(LONG, connection.read_to_end(&mut bytes)).await.expect("it ends");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    #[tokio::test]
    async fn requests_are_answered_one_after_the_other_until_the_shutdown() {
        let (addr, shutdown, serving) = server(HttpOptions::default()).await;
        let mut connection = connect(1, addr).await;
        connection.write_all(b"GET /one HTTP/1.1\r\n\r\nGET /two HTTP/1.1\r\nConnection: close\r\n\r\n").await.unwrap();
        let answers = rest(&mut connection).await;
        assert!(answers.contains("\r\n\r\n/oneHTTP/1.1 200 OK\r\n") && answers.ends_with("\r\n\r\n/two"), "{answers}");
        let mut idle = connect(1, addr).await;
        idle.write_all(b"GET /one HTTP/1.1\r\n\r\n").await.unwrap();
        let mut first = [0; 1];
        idle.read_exact(&mut first).await.unwrap();
        shutdown.cancel();
        rest(&mut idle).await;
        timeout(LONG, serving).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_head_that_is_large_or_never_ends_is_refused() {
        let (addr, ..) =
            server(HttpOptions { head_timeout: Duration::from_millis(50), ..HttpOptions::default() }).await;
        for (sent, status) in [
            (format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(MAX_HEAD_BYTES)), "HTTP/1.1 431"),
            (format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "a".repeat(MAX_HEAD_BYTES)), "HTTP/1.1 431"),
            (format!("GET / HTTP/1.1\r\n{}\r\n", "A: a\r\n".repeat(MAX_HEADERS + 1)), "HTTP/1.1 431"),
            ("GET / HTTP/1.1\r\nA".to_owned(), ""),
            (String::new(), ""),
            // Nothing follows this one.
            ("GET /one HTTP/1.1\r\n\r\n".to_owned(), "HTTP/1.1 200"),
        ] {
            let mut connection = connect(1, addr).await;
            connection.write_all(sent.as_bytes()).await.unwrap();
            let answer = rest(&mut connection).await;
            assert!(answer.starts_with(status) && (!status.is_empty() || answer.is_empty()), "{sent:.30} {answer}");
        }
    }

    #[tokio::test]
    async fn an_address_leaves_connections_to_others() {
        let (addr, ..) = server(HttpOptions { connections: 3, address_connections: 2, ..HttpOptions::default() }).await;
        let mut asked = Vec::new();
        for from in [1, 1, 1, 2] {
            let mut connection = connect(from, addr).await;
            connection.write_all(b"GET /one HTTP/1.1\r\n\r\n").await.unwrap();
            let mut first = [0; 1];
            connection.read_exact(&mut first).await.unwrap();
            asked.push(connection);
        }
        // The first one was idle for the longest time.
        assert!(rest(&mut asked[0]).await.ends_with("/one"));
        for connection in &mut asked[1..] {
            connection.write_all(b"GET /two HTTP/1.1\r\nConnection: close\r\n\r\n").await.unwrap();
            assert!(rest(connection).await.ends_with("/two"));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_too_little_is_cut_off() {
        let options = HttpOptions { least_rate: 1000, slack: Duration::from_secs(60), ..HttpOptions::default() };
        // Bytes that it takes each second, and whether it is served for an hour.
        for (rate, is_served) in [(0, false), (900, false), (1100, true)] {
            let (mut client, connection) = duplex(256);
            let client_of = Client::at([127, 0, 0, 1].into());
            let activity = Activity::new();
            let place = Places::new(1, 1).take(&client_of, &activity).unwrap();
            let answer = async |_: Client, head: Parts| Response::new(body(head.uri.path()));
            let taken = Taken::new(connection, options);
            let shutdown = CancellationToken::new();
            let serving = tokio::spawn(converse(taken, options, (client_of, activity, place), answer, shutdown));
            client.write_all(b"GET /endless HTTP/1.1\r\n\r\n").await.unwrap();
            let mut bytes = vec![0; rate];
            for _ in 0..3600 {
                tokio::time::sleep(Duration::from_secs(1)).await;
                if client.read_exact(&mut bytes).await.is_err() || serving.is_finished() {
                    break;
                }
            }
            assert_eq!(!serving.is_finished(), is_served, "{rate}");
        }
    }
}
