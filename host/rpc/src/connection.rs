//! A connection from when it is accepted.
//!
//! ```text
//!   accepted ─ TLS, if any ─▶ the client's first bytes of HTTP/2 ─▶ idle ◀──▶ requests in progress
//!      └──────── Timeouts::opening ────────┴────────▶ closed ◀────────┘ Timeouts::idle
//! ```
//!
//! It is also closed when another one gets its place. When the server drains, `Timeouts::draining` replaces longer timeouts.

use std::{
    io::{self, ErrorKind},
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, ready},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep_until},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{
    Extensions,
    transport::server::{Connected, TlsConnectInfo},
};

use crate::{Client, places::Place};

/// Bytes of HTTP/2 that every client sends at once.
const PREFACE_BYTES: usize = 24;

/// How long a connection may do nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timeouts {
    /// From when it is accepted until its client has sent the first bytes of HTTP/2, behind TLS if there is any.
    pub(crate) opening: Duration,
    /// Without a request in progress.
    pub(crate) idle: Duration,
    /// The same while the server drains. Its last answer must be on its way by then.
    pub(crate) draining: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { opening: Duration::from_secs(10), idle: Duration::from_secs(5 * 60), draining: Duration::from_secs(1) }
    }
}

/// Whether requests of a connection are in progress.
#[derive(Debug, Clone)]
pub(crate) struct Activity(Arc<Mutex<Requests>>);

#[derive(Debug)]
struct Requests {
    in_progress: usize,
    /// When there was one last.
    last: Instant,
}

impl Activity {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(Requests { in_progress: 0, last: Instant::now() })))
    }

    /// A request that is in progress until this is dropped.
    pub(crate) fn begin(&self) -> InProgress {
        self.0.lock().in_progress += 1;
        InProgress(self.clone())
    }

    /// Since when no request has been in progress, if none is.
    pub(crate) fn idle_since(&self) -> Option<Instant> {
        let requests = self.0.lock();
        (requests.in_progress == 0).then_some(requests.last)
    }
}

/// A request in progress.
#[derive(Debug)]
pub(crate) struct InProgress(Activity);

impl Drop for InProgress {
    fn drop(&mut self) {
        let mut requests = self.0.0.lock();
        requests.in_progress -= 1;
        requests.last = Instant::now();
    }
}

/// What every request of a connection comes with.
#[derive(Debug, Clone)]
pub(crate) struct ConnectionInfo {
    /// As far as the connection shows it without TLS.
    pub(crate) client: Client,
    pub(crate) activity: Activity,
    /// From the end of the handshake until the connection ends.
    place: Weak<Place>,
}

impl ConnectionInfo {
    /// That of the connection whose requests have these extensions.
    pub(crate) fn of(extensions: &Extensions) -> Option<&Self> {
        let tls = || extensions.get::<TlsConnectInfo<Self>>().map(TlsConnectInfo::get_ref);
        extensions.get().or_else(tls)
    }

    /// Counts the connection among those of the client that it has shown.
    pub(crate) fn is_of(&self, client: &Client) {
        if let Some(place) = self.place.upgrade() {
            place.belongs_to(client);
        }
    }
}

/// Called when the handshake is over, to count the connection among the open ones.
pub(crate) type Open = Box<dyn Fn(&Activity) -> Option<Place> + Send + Sync>;

/// A connection that counts until it is closed, and is closed if it does nothing.
pub(crate) struct Limited<C> {
    connection: C,
    info: ConnectionInfo,
    open: Open,
    stage: Mutex<Stage>,
    timeouts: Timeouts,
    /// Until then the server doesn't drain.
    drain: Option<Cancelled>,
    accepted: Instant,
    /// Bytes received since the handshake, up to [`PREFACE_BYTES`].
    received: usize,
    /// Goes off at the end of a timeout, or before it.
    timer: Pin<Box<Sleep>>,
}

type Cancelled = Pin<Box<WaitForCancellationFutureOwned>>;

enum Stage {
    Handshake { _place: Place, lost: Cancelled },
    Open { _place: Arc<Place>, lost: Cancelled },
    Refused,
}

fn cancelled(token: &CancellationToken) -> Cancelled {
    Box::pin(token.clone().cancelled_owned())
}

impl<C> Limited<C> {
    /// A connection that has just been accepted, with its place among those at their handshakes.
    pub(crate) fn new(
        connection: C,
        (client, activity): (Client, Activity),
        handshake: Place,
        open: Open,
        timeouts: Timeouts,
        drain: &CancellationToken,
    ) -> Self {
        let (info, accepted) = (ConnectionInfo { client, activity, place: Weak::new() }, Instant::now());
        let lost = cancelled(handshake.lost());
        let stage = Mutex::new(Stage::Handshake { _place: handshake, lost });
        let timer = Box::pin(sleep_until(accepted + timeouts.opening));
        let drain = Some(cancelled(drain));
        Self { connection, info, open, stage, timeouts, drain, accepted, received: 0, timer }
    }

    /// An error if the connection must end now. The task is woken when it must.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let is_lost = match self.stage.get_mut() {
            Stage::Handshake { lost, .. } | Stage::Open { lost, .. } => lost.as_mut().poll(cx).is_ready(),
            Stage::Refused => true,
        };
        if is_lost {
            *self.stage.get_mut() = Stage::Refused;
            return Err(ErrorKind::QuotaExceeded.into());
        }
        if self.drain.as_mut().is_some_and(|drain| drain.as_mut().poll(cx).is_ready()) {
            self.drain = None;
            let Timeouts { opening, idle, draining } = self.timeouts;
            self.timeouts = Timeouts { opening: opening.min(draining), idle: idle.min(draining), draining };
            self.timer.as_mut().reset(Instant::now());
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            let end = match self.received < PREFACE_BYTES {
                true => self.accepted + self.timeouts.opening,
                false => self.info.activity.idle_since().unwrap_or_else(Instant::now) + self.timeouts.idle,
            };
            if end <= Instant::now() {
                tracing::debug!("closed a connection of {}: it did nothing", self.info.client);
                return Err(ErrorKind::TimedOut.into());
            }
            self.timer.as_mut().reset(end);
        }
        Ok(())
    }

    fn has_received(&mut self, bytes: usize) {
        if matches!(self.stage.get_mut(), Stage::Open { .. }) {
            self.received = (self.received + bytes).min(PREFACE_BYTES);
        }
    }
}

impl<C: Connected> Connected for Limited<C> {
    type ConnectInfo = ConnectionInfo;

    /// tonic asks for it once: when the handshake is over.
    fn connect_info(&self) -> ConnectionInfo {
        let Some(place) = (self.open)(&self.info.activity).map(Arc::new) else {
            tracing::debug!("closed a connection of {}: too many are open", self.info.client);
            *self.stage.lock() = Stage::Refused;
            return self.info.clone();
        };
        let info = ConnectionInfo { place: Arc::downgrade(&place), ..self.info.clone() };
        *self.stage.lock() = Stage::Open { lost: cancelled(place.lost()), _place: place };
        info
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for Limited<C> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.connection).poll_read(cx, buffer))?;
        self.has_received(buffer.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

/// A client that takes nothing keeps a connection from being read: so the end shows here, too.
impl<C: AsyncWrite + Unpin> AsyncWrite for Limited<C> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.connection).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.connection).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.connection.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
        net::UnixStream,
    };

    use super::*;
    use crate::places::Places;

    const TIMEOUTS: Timeouts =
        Timeouts { opening: Duration::from_secs(10), idle: Duration::from_secs(100), draining: Duration::from_secs(7) };

    const USER: Client = Client::User(1);

    fn limited<C>(connection: C, drain: &CancellationToken) -> Limited<C> {
        let (places, activity) = (Places::new(2, 2), Activity::new());
        let handshake = places.take(&USER, &activity).unwrap();
        let open = move |activity: &Activity| places.take(&USER, activity);
        Limited::new(connection, (USER, activity), handshake, Box::new(open), TIMEOUTS, drain)
    }

    /// A connection at its handshake, and the client's end of it.
    fn open(drain: &CancellationToken) -> (Limited<Timed>, DuplexStream) {
        let (client, server) = duplex(64);
        (limited(Timed(server), drain), client)
    }

    /// What tonic takes for a connection.
    struct Timed(DuplexStream);

    impl Connected for Timed {
        type ConnectInfo = ();

        fn connect_info(&self) {}
    }

    impl AsyncRead for Timed {
        fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_read(cx, buffer)
        }
    }

    /// When reading ends with a timeout, in seconds from `start`.
    async fn end(limited: &mut Limited<Timed>, start: Instant) -> u64 {
        loop {
            match limited.read(&mut [0; 64]).await {
                Ok(_) => {}
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::TimedOut);
                    return start.elapsed().as_secs();
                }
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_without_its_first_bytes_ends_soon() {
        let start = Instant::now();
        let (mut limited, mut client) = open(&CancellationToken::new());
        // Part of TLS.
        client.write_all(&[0; 60]).await.unwrap();
        limited.read_exact(&mut [0; 60]).await.unwrap();
        limited.connect_info();
        client.write_all(&[0; PREFACE_BYTES - 1]).await.unwrap();
        assert_eq!(end(&mut limited, start).await, 10);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_ends_when_it_has_had_no_request_for_long() {
        let start = Instant::now();
        let (mut limited, mut client) = open(&CancellationToken::new());
        let activity = limited.connect_info().activity;
        client.write_all(&[0; PREFACE_BYTES]).await.unwrap();
        let requests = async {
            for _ in 0..3 {
                let (_one, _other) = (activity.begin(), activity.begin());
                tokio::time::sleep(Duration::from_secs(1000)).await;
                drop(_one);
                client.write_all(&[0; 9]).await.unwrap();
                tokio::time::sleep(Duration::from_secs(33)).await;
                drop(_other);
                tokio::time::sleep(Duration::from_secs(99)).await;
            }
        };
        let (end, ()) = tokio::join!(end(&mut limited, start), requests);
        assert_eq!(end, 3 * (1000 + 33 + 99) + 1);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_takes_nothing_ends_while_it_is_written_to() {
        let (_client, server) = UnixStream::pair().unwrap();
        let mut limited = limited(server, &CancellationToken::new());
        limited.received = PREFACE_BYTES;
        let error = limited.write_all(&vec![0; 16 << 20]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
    }

    #[tokio::test(start_paused = true)]
    async fn while_the_server_drains_a_connection_ends_soon_after_its_last_request() {
        let (start, drain) = (Instant::now(), CancellationToken::new());
        let (mut limited, mut client) = open(&drain);
        let activity = limited.connect_info().activity;
        client.write_all(&[0; PREFACE_BYTES]).await.unwrap();
        let requests = async {
            let request = activity.begin();
            tokio::time::sleep(Duration::from_secs(50)).await;
            drain.cancel();
            tokio::time::sleep(Duration::from_secs(1000)).await;
            drop(request);
        };
        let (end, ()) = tokio::join!(end(&mut limited, start), requests);
        assert_eq!(end, 1050 + 7);
    }

    #[tokio::test(start_paused = true)]
    async fn connections_that_are_idle_end_at_once_when_the_server_drains() {
        for bytes in [0, PREFACE_BYTES] {
            let (start, drain) = (Instant::now(), CancellationToken::new());
            let (mut limited, mut client) = open(&drain);
            limited.connect_info();
            client.write_all(&vec![0; bytes]).await.unwrap();
            let shutdown = async {
                tokio::time::sleep(Duration::from_secs(8)).await;
                drain.cancel();
            };
            let (end, ()) = tokio::join!(end(&mut limited, start), shutdown);
            assert_eq!(end, 8);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_ends_when_its_place_is_lost() {
        let (mut limited, _client) = open(&CancellationToken::new());
        let places = Places::new(1, 1);
        let first = places.take(&USER, &Activity::new()).unwrap();
        *limited.stage.get_mut() = Stage::Open { lost: cancelled(first.lost()), _place: Arc::new(first) };
        assert!(limited.read(&mut [0]).now_or_never().is_none());
        let _second = places.take(&USER, &Activity::new()).unwrap();
        let read = limited.read(&mut [0]).await;
        assert_eq!(read.unwrap_err().kind(), ErrorKind::QuotaExceeded);
    }
}
