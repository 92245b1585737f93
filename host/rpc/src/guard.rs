//! The messages of a request while they arrive.
//!
//! ```text
//!   body ──5 bytes──▶ begin: is it too large? ──bytes as they come──▶ take memory ─…─▶ end ─▶ the next, if it is a stream
//! ```

use std::{
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture, stream};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use tokio::time::{Instant, timeout_at};
use tonic::{
    Code, Status,
    body::Body,
    codegen::{
        Service,
        http::{Request, Response},
    },
    server::NamedService,
};

use crate::{Client, MemoryBudget, MemoryPermit, connection::ConnectionInfo, memory::MemoryShare};

/// The bytes before a message: whether it is compressed, and its length in four bytes.
const PREFIX_BYTES: usize = 5;

/// Bytes of the largest message that only asks for something.
pub const MAX_QUESTION_BYTES: usize = 4 * 1024;

/// What a method takes.
#[derive(Debug, Clone, Copy)]
pub enum Takes {
    /// One message of at most so many bytes. Its [`MemoryPermit`] comes with the request.
    Message(usize),
    /// A stream of messages of at most so many bytes each. Each gives its memory back when it is whole.
    Stream(usize),
}

/// The limits of a service.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Memory for its messages.
    pub memory: MemoryBudget,
    /// What the method of this name takes.
    pub takes: fn(method: &str) -> Takes,
    /// How long a request may take to arrive; of a stream, its first message.
    pub arrival_timeout: Duration,
    /// The status of a request that is refused.
    pub status: fn(Refusal) -> Status,
}

/// Why a request is refused while it arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A message is too large.
    #[error("the message is too large: it has {bytes} bytes, and {limit} is the limit")]
    TooLarge {
        /// Its bytes.
        bytes: usize,
        /// Bytes of the largest message.
        limit: usize,
    },
    /// There is no memory left for it.
    #[error("the requests of {who} together may have {limit} bytes: try again later")]
    NoMemory {
        /// Whose requests, in words.
        who: &'static str,
        /// Bytes that they may have.
        limit: usize,
    },
    /// A second message where the method takes one.
    #[error("a request of this method is one message, and more came after it")]
    NotOneMessage,
    /// It took too long.
    #[error("the request was not there after {0:?}")]
    Late(Duration),
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let code = match refusal {
            Refusal::TooLarge { .. } => Code::OutOfRange,
            Refusal::NoMemory { .. } => Code::ResourceExhausted,
            Refusal::NotOneMessage => Code::InvalidArgument,
            Refusal::Late(_) => Code::DeadlineExceeded,
        };
        Self::new(code, refusal.to_string())
    }
}

/// A service whose requests are limited while they arrive.
#[derive(Debug, Clone)]
pub struct Guarded<S> {
    service: S,
    limits: Limits,
}

impl<S> Guarded<S> {
    /// A service with these limits.
    pub fn new(service: S, limits: Limits) -> Self {
        Self { service, limits }
    }
}

impl<S: NamedService> NamedService for Guarded<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Guarded<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Future: Send + 'static> + NamedService,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let connection = ConnectionInfo::of(request.extensions());
        let client = Client::from_connection(request.extensions());
        if let (Some(connection), Ok(client)) = (connection, &client) {
            connection.is_of(client);
        }
        // To watch the health of services is nothing that keeps a connection.
        let in_progress = connection.filter(|_| !S::NAME.starts_with("grpc.")).map(|info| info.activity.begin());
        let method = request.uri().path().rsplit('/').next().unwrap_or_default();
        let takes = (self.limits.takes)(method);
        let share = client.map(|client| self.limits.memory.of(&client));
        let permit = MemoryPermit::default();
        if let Takes::Message(_) = takes {
            request.extensions_mut().insert(permit.clone());
        }
        let limits = self.limits.clone();
        let answered = self.service.call(request.map(|body| {
            let arriving = Arriving::new(body, limits, takes, share, permit);
            Body::new(StreamBody::new(stream::try_unfold(arriving, async |mut arriving| {
                Ok::<_, Status>(arriving.frame().await?.map(|frame| (frame, arriving)))
            })))
        }));
        async {
            // Until the answer's end.
            let until_then = move |frame| {
                let _in_progress = &in_progress;
                frame
            };
            Ok(answered.await?.map(|body| Body::new(body.map_frame(until_then))))
        }
        .boxed()
    }
}

/// The body of a request.
struct Arriving {
    body: Body,
    limits: Limits,
    takes: Takes,
    /// Its client's, if that is known.
    share: Result<MemoryShare, Status>,
    /// Of the message that arrives.
    permit: MemoryPermit,
    /// Counted from the first time that the request is waited for.
    deadline: Option<Instant>,
    /// Of the message that arrives, as far as it has come.
    prefix: Vec<u8>,
    /// Bytes of it that are still to come, if its prefix has.
    left: usize,
    has_first: bool,
}

impl Arriving {
    fn new(body: Body, limits: Limits, takes: Takes, share: Result<MemoryShare, Status>, permit: MemoryPermit) -> Self {
        let (deadline, prefix, left, has_first) = (None, Vec::new(), 0, false);
        Self { body, limits, takes, share, permit, deadline, prefix, left, has_first }
    }

    async fn frame(&mut self) -> Result<Option<Frame<Bytes>>, Status> {
        let timeout = self.limits.arrival_timeout;
        let frame = if self.has_first && self.is_stream() {
            self.body.frame().await
        } else {
            let deadline = *self.deadline.get_or_insert_with(|| Instant::now() + timeout);
            let frame = timeout_at(deadline, self.body.frame()).await;
            frame.map_err(|_| self.refused(Refusal::Late(timeout)))?
        };
        let frame = frame.transpose().map_err(broken_off)?;
        if let Some(data) = frame.as_ref().and_then(Frame::data_ref) {
            self.take(data)?;
        }
        Ok(frame)
    }

    fn take(&mut self, mut data: &[u8]) -> Result<(), Status> {
        while !data.is_empty() {
            if self.has_first && !self.is_stream() {
                return Err(self.refused(Refusal::NotOneMessage));
            }
            if self.prefix.len() < PREFIX_BYTES {
                let (more, rest) = data.split_at(data.len().min(PREFIX_BYTES - self.prefix.len()));
                self.prefix.extend_from_slice(more);
                data = rest;
                let &[_compressed, a, b, c, d] = &self.prefix[..] else { return Ok(()) };
                self.begin(u32::from_be_bytes([a, b, c, d]) as usize)?;
            }
            let (more, rest) = data.split_at(data.len().min(self.left));
            data = rest;
            self.left -= more.len();
            if !more.is_empty() {
                let share = self.share.as_ref().map_err(Status::clone)?;
                self.permit.extend(share, more.len()).map_err(|refusal| self.refused(refusal))?;
            }
            if self.left == 0 {
                self.end();
            }
        }
        Ok(())
    }

    /// A message of so many bytes is announced.
    fn begin(&mut self, bytes: usize) -> Result<(), Status> {
        let (Takes::Message(limit) | Takes::Stream(limit)) = self.takes;
        if bytes > limit {
            return Err(self.refused(Refusal::TooLarge { bytes, limit }));
        }
        self.left = bytes;
        Ok(())
    }

    /// A message is whole.
    fn end(&mut self) {
        self.has_first = true;
        self.prefix.clear();
        if self.is_stream() {
            self.permit = MemoryPermit::default();
        }
    }

    fn is_stream(&self) -> bool {
        matches!(self.takes, Takes::Stream(_))
    }

    fn refused(&self, refusal: Refusal) -> Status {
        (self.limits.status)(refusal)
    }
}

/// To tonic, a stream that its client has cancelled is at its end: half a blob would become one.
fn broken_off(status: Status) -> Status {
    match status.code() {
        Code::Cancelled => Status::aborted("the client has broken the request off"),
        _ => status,
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    const LARGEST: usize = 10_000;

    /// Longer than any test takes.
    const LONG: Duration = Duration::from_secs(60);

    const CLIENT: Client = Client::User(1);

    const STREAM: Takes = Takes::Stream(LARGEST);

    const ONE: Takes = Takes::Message(LARGEST);

    /// Frames of a body.
    type Pieces = Vec<Result<Vec<u8>, Status>>;

    fn limits(memory: &MemoryBudget) -> Limits {
        Limits { memory: memory.clone(), takes: |_| ONE, arrival_timeout: LONG, status: Status::from }
    }

    fn arriving_from(memory: &MemoryBudget, takes: Takes, pieces: Pieces) -> Arriving {
        let frames = pieces.into_iter().map(|piece| piece.map(|piece| Frame::data(Bytes::from(piece))));
        let body = Body::new(StreamBody::new(stream::iter(frames)));
        Arriving::new(body, limits(memory), takes, Ok(memory.of(&CLIENT)), MemoryPermit::default())
    }

    fn arriving(takes: Takes, pieces: Pieces) -> Arriving {
        arriving_from(&MemoryBudget::default(), takes, pieces)
    }

    async fn read(arriving: &mut Arriving) -> Result<Vec<u8>, Status> {
        let mut bytes = Vec::new();
        while let Some(frame) = arriving.frame().await? {
            bytes.extend_from_slice(frame.data_ref().unwrap());
        }
        Ok(bytes)
    }

    async fn refused(takes: Takes, pieces: Pieces) -> Code {
        read(&mut arriving(takes, pieces)).await.unwrap_err().code()
    }

    fn message(length: usize) -> Vec<u8> {
        [&[0], &u32::try_from(length).unwrap().to_be_bytes()[..], &vec![7; length]].concat()
    }

    /// Whether the client has just this much left of its share.
    fn has_left(memory: &MemoryBudget, bytes: usize) -> bool {
        let share = memory.of(&CLIENT);
        let take = |bytes| MemoryPermit::default().extend(&share, bytes);
        take(bytes).is_ok() && take(bytes + 1).is_err()
    }

    #[tokio::test]
    async fn messages_come_through_as_they_are_however_they_are_cut() {
        let bytes = [3000, 0, LARGEST, 3].map(message).concat();
        for size in [1, 4, 1000, bytes.len()] {
            let mut arriving = arriving(STREAM, bytes.chunks(size).map(|piece| Ok(piece.to_vec())).collect());
            assert_eq!(read(&mut arriving).await.unwrap(), bytes);
        }
    }

    #[tokio::test]
    async fn a_large_message_is_refused_at_its_prefix() {
        let memory = MemoryBudget::new(100);
        let large = vec![Ok(vec![0]), Ok(u32::MAX.to_be_bytes().to_vec()), Ok(vec![7; 10])];
        let mut arriving = arriving_from(&memory, STREAM, large);
        assert_eq!(read(&mut arriving).await.unwrap_err().code(), Code::OutOfRange);
        assert!(has_left(&memory, 50));
        let second = [message(1), message(LARGEST + 1)].concat();
        assert_eq!(refused(STREAM, vec![Ok(second)]).await, Code::OutOfRange);
    }

    #[tokio::test]
    async fn after_a_request_that_is_no_stream_comes_nothing() {
        for pieces in [vec![message(9), vec![0]], vec![[message(0), vec![0]].concat()]] {
            assert_eq!(refused(ONE, pieces.into_iter().map(Ok).collect()).await, Code::InvalidArgument);
        }
    }

    #[tokio::test]
    async fn a_message_of_a_stream_has_memory_until_it_is_whole() {
        let memory = MemoryBudget::new(40);
        let half = message(15)[..PREFIX_BYTES + 12].to_vec();
        let mut arriving = arriving_from(&memory, STREAM, vec![Ok(message(18)), Ok(half), Ok(vec![7; 3])]);
        arriving.frame().await.unwrap();
        assert!(has_left(&memory, 20));
        arriving.frame().await.unwrap();
        assert!(has_left(&memory, 8));
        arriving.frame().await.unwrap();
        assert!(has_left(&memory, 20));
    }

    #[tokio::test]
    async fn a_request_of_one_message_has_memory_as_long_as_it_is_kept() {
        let memory = MemoryBudget::new(40);
        let mut arriving = arriving_from(&memory, ONE, vec![Ok(message(18))]);
        read(&mut arriving).await.unwrap();
        let kept = arriving.permit.clone();
        drop(arriving);
        assert!(has_left(&memory, 2));
        let refused = read(&mut arriving_from(&memory, ONE, vec![Ok(message(3))])).await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
        drop(kept);
        read(&mut arriving_from(&memory, ONE, vec![Ok(message(3))])).await.unwrap();
    }

    #[tokio::test]
    async fn a_client_that_is_unknown_has_no_memory() {
        let unknown = Client::from_connection(&tonic::Extensions::new()).unwrap_err();
        let mut arriving = Arriving { share: Err(unknown), ..arriving(ONE, vec![Ok(message(1))]) };
        assert_eq!(read(&mut arriving).await.unwrap_err().code(), Code::Unauthenticated);
    }

    #[tokio::test]
    async fn a_service_words_its_own_refusals() {
        let mut arriving = arriving(ONE, vec![Ok(message(LARGEST + 1))]);
        arriving.limits.status = |refusal| Status::failed_precondition(format!("{refusal:?}"));
        let refused = read(&mut arriving).await.unwrap_err();
        assert_eq!(refused.message(), "TooLarge { bytes: 10001, limit: 10000 }");
    }

    #[tokio::test]
    async fn a_request_that_is_broken_off_does_not_end() {
        let pieces = vec![Ok(message(9)), Err(Status::cancelled("gone"))];
        assert_eq!(refused(STREAM, pieces).await, Code::Aborted);
    }

    #[tokio::test]
    async fn a_request_must_arrive_in_time_but_a_stream_may_pause() {
        let hanging = |first: Vec<u8>, takes| {
            let first = stream::iter([Ok::<_, Status>(Frame::data(Bytes::from(first)))]);
            let body = Body::new(StreamBody::new(futures::StreamExt::chain(first, stream::pending())));
            let mut arriving = Arriving { body, ..arriving(takes, vec![]) };
            arriving.limits.arrival_timeout = Duration::ZERO;
            arriving
        };
        let half = message(9)[..7].to_vec();
        for (first, takes) in [(half.clone(), ONE), (message(9), ONE), (half, STREAM)] {
            let mut arriving = hanging(first, takes);
            let refused = timeout(LONG, read(&mut arriving)).await.unwrap().unwrap_err();
            assert_eq!(refused.code(), Code::DeadlineExceeded, "{refused}");
        }
        let mut begun = hanging(message(9), STREAM);
        begun.frame().await.unwrap();
        assert!(futures::poll!(Box::pin(begun.frame())).is_pending());
    }
}
