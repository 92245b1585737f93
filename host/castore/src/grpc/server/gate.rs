//! The messages of a request, told to a gate while they arrive.
//!
//! ```text
//!   body ──5 bytes──▶ begin ──bytes as they come──▶ arrive ─…─▶ end ─▶ the next, if the request is a stream
//! ```

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::stream;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use tokio::time::{Instant, timeout_at};
use tonic::{
    Code, Status,
    body::Body,
    codegen::{Service, http::Request},
    server::NamedService,
};

/// The bytes before a message: whether it is compressed, and its length in four bytes.
const PREFIX_BYTES: usize = 5;

/// What decides about the messages of one request. What it refuses ends the request.
pub trait Gate: Send + 'static {
    /// Whether more than one message may come.
    fn is_stream(&self) -> bool;

    /// A message of so many bytes is announced.
    ///
    /// # Errors
    ///
    /// It may not come.
    fn begin(&mut self, bytes: usize) -> Result<(), Status>;

    /// So many more bytes of it have come.
    ///
    /// # Errors
    ///
    /// There is no room for them.
    fn arrive(&mut self, bytes: usize) -> Result<(), Status>;

    /// It is whole.
    fn end(&mut self);
}

/// Makes a request's gate.
type Gates = dyn Fn(&mut Request<Body>) -> Box<dyn Gate> + Send + Sync;

/// A service behind gates.
#[derive(Clone)]
pub struct Gated<S> {
    service: S,
    gates: Arc<Gates>,
    patience: Duration,
}

impl<S> Gated<S> {
    /// A service each of whose requests gets a gate of its own. A request must be there `patience` after it is waited for;
    /// of one that is a stream, the first message.
    pub fn new<G: Gate>(
        service: S,
        gate: impl Fn(&mut Request<Body>) -> G + Send + Sync + 'static,
        patience: Duration,
    ) -> Self {
        Self { service, gates: Arc::new(move |request| Box::new(gate(request))), patience }
    }
}

impl<S: NamedService> NamedService for Gated<S> {
    const NAME: &'static str = S::NAME;
}

impl<S: Service<Request<Body>>> Service<Request<Body>> for Gated<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> S::Future {
        let (gate, patience) = ((self.gates)(&mut request), self.patience);
        self.service.call(request.map(|body| {
            Body::new(StreamBody::new(stream::try_unfold(Arriving::new(body, gate, patience), async |mut arriving| {
                Ok::<_, Status>(arriving.frame().await?.map(|frame| (frame, arriving)))
            })))
        }))
    }
}

/// The body of a request.
struct Arriving {
    body: Body,
    gate: Box<dyn Gate>,
    patience: Duration,
    /// From when it is waited for.
    deadline: Option<Instant>,
    /// Of the message that arrives, as far as it has come.
    prefix: Vec<u8>,
    /// Bytes of it that are still to come, if its prefix has.
    left: usize,
    has_first: bool,
}

impl Arriving {
    fn new(body: Body, gate: Box<dyn Gate>, patience: Duration) -> Self {
        Self { body, gate, patience, deadline: None, prefix: Vec::new(), left: 0, has_first: false }
    }

    async fn frame(&mut self) -> Result<Option<Frame<Bytes>>, Status> {
        let frame = if self.has_first && self.gate.is_stream() {
            self.body.frame().await
        } else {
            let deadline = *self.deadline.get_or_insert_with(|| Instant::now() + self.patience);
            timeout_at(deadline, self.body.frame()).await.map_err(|_| late(self.patience))?
        };
        let frame = frame.transpose().map_err(broken_off)?;
        if let Some(data) = frame.as_ref().and_then(Frame::data_ref) {
            self.take(data)?;
        }
        Ok(frame)
    }

    fn take(&mut self, mut data: &[u8]) -> Result<(), Status> {
        while !data.is_empty() {
            if self.has_first && !self.gate.is_stream() {
                return Err(Status::invalid_argument(
                    "a request of this method is one message, and more came after it",
                ));
            }
            if self.prefix.len() < PREFIX_BYTES {
                let (more, rest) = data.split_at(data.len().min(PREFIX_BYTES - self.prefix.len()));
                self.prefix.extend_from_slice(more);
                data = rest;
                let &[_compressed, a, b, c, d] = &self.prefix[..] else { return Ok(()) };
                self.left = u32::from_be_bytes([a, b, c, d]) as usize;
                self.gate.begin(self.left)?;
            }
            let (more, rest) = data.split_at(data.len().min(self.left));
            data = rest;
            self.left -= more.len();
            if !more.is_empty() {
                self.gate.arrive(more.len())?;
            }
            if self.left == 0 {
                self.gate.end();
                self.has_first = true;
                self.prefix.clear();
            }
        }
        Ok(())
    }
}

fn late(patience: Duration) -> Status {
    Status::deadline_exceeded(format!("the request was not there after {patience:?}"))
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
    use std::sync::mpsc::{Receiver, Sender, channel};

    use tokio::time::timeout;

    use super::*;

    const LARGEST: usize = 10_000;

    /// Longer than any test takes.
    const LONG: Duration = Duration::from_secs(60);

    #[derive(Debug, PartialEq)]
    enum Told {
        Begin(usize),
        Arrive(usize),
        End,
    }

    struct Telling {
        is_stream: bool,
        told: Sender<Told>,
    }

    impl Gate for Telling {
        fn is_stream(&self) -> bool {
            self.is_stream
        }

        fn begin(&mut self, bytes: usize) -> Result<(), Status> {
            self.told.send(Told::Begin(bytes)).unwrap();
            if bytes > LARGEST { Err(Status::out_of_range("large")) } else { Ok(()) }
        }

        fn arrive(&mut self, bytes: usize) -> Result<(), Status> {
            self.told.send(Told::Arrive(bytes)).unwrap();
            Ok(())
        }

        fn end(&mut self) {
            self.told.send(Told::End).unwrap();
        }
    }

    fn arriving(is_stream: bool, pieces: Vec<Result<Vec<u8>, Status>>) -> (Arriving, Receiver<Told>) {
        let frames = pieces.into_iter().map(|piece| piece.map(|piece| Frame::data(Bytes::from(piece))));
        let (told, heard) = channel();
        let body = Body::new(StreamBody::new(stream::iter(frames)));
        (Arriving::new(body, Box::new(Telling { is_stream, told }), LONG), heard)
    }

    async fn read(arriving: &mut Arriving) -> Result<Vec<u8>, Status> {
        let mut bytes = Vec::new();
        while let Some(frame) = arriving.frame().await? {
            bytes.extend_from_slice(frame.data_ref().unwrap());
        }
        Ok(bytes)
    }

    async fn refused(is_stream: bool, pieces: Vec<Result<Vec<u8>, Status>>) -> Code {
        read(&mut arriving(is_stream, pieces).0).await.unwrap_err().code()
    }

    fn message(length: usize) -> Vec<u8> {
        [&[0], &u32::try_from(length).unwrap().to_be_bytes()[..], &vec![7; length]].concat()
    }

    #[tokio::test]
    async fn messages_come_through_as_they_are_and_are_told_however_they_are_cut() {
        let lengths = [3000, 0, LARGEST, 3];
        let bytes = lengths.map(message).concat();
        for size in [1, 4, 1000, bytes.len()] {
            let (mut arriving, heard) = arriving(true, bytes.chunks(size).map(|piece| Ok(piece.to_vec())).collect());
            assert_eq!(read(&mut arriving).await.unwrap(), bytes);
            for length in lengths {
                assert_eq!(heard.recv(), Ok(Told::Begin(length)));
                let mut come = 0;
                loop {
                    match heard.recv().unwrap() {
                        Told::Arrive(bytes) => come += bytes,
                        told => break assert_eq!((told, come), (Told::End, length)),
                    }
                }
            }
        }
    }

    #[tokio::test]
    async fn what_a_gate_refuses_ends_the_request_at_its_prefix() {
        let large = vec![Ok(vec![0]), Ok(u32::MAX.to_be_bytes().to_vec()), Ok(vec![7; 10])];
        let (mut arriving, heard) = arriving(true, large);
        assert_eq!(read(&mut arriving).await.unwrap_err().code(), Code::OutOfRange);
        assert_eq!(heard.try_iter().collect::<Vec<_>>(), [Told::Begin(u32::MAX as usize)]);
        let second = [message(1), message(LARGEST + 1)].concat();
        assert_eq!(refused(true, vec![Ok(second)]).await, Code::OutOfRange);
    }

    #[tokio::test]
    async fn after_a_request_that_is_no_stream_comes_nothing() {
        for pieces in [vec![message(9), vec![0]], vec![[message(0), vec![0]].concat()]] {
            assert_eq!(refused(false, pieces.into_iter().map(Ok).collect()).await, Code::InvalidArgument);
        }
    }

    #[tokio::test]
    async fn a_request_that_is_broken_off_does_not_end() {
        let pieces = vec![Ok(message(9)), Err(Status::cancelled("gone"))];
        assert_eq!(refused(true, pieces).await, Code::Aborted);
    }

    #[tokio::test]
    async fn a_request_that_does_not_come_is_given_up_and_a_stream_may_take_its_time() {
        let hanging = |first: Vec<u8>, is_stream| {
            let first = stream::iter([Ok::<_, Status>(Frame::data(Bytes::from(first)))]);
            let body = Body::new(StreamBody::new(futures::StreamExt::chain(first, stream::pending())));
            let (arriving, heard) = arriving(is_stream, vec![]);
            (Arriving { body, patience: Duration::ZERO, ..arriving }, heard)
        };
        let half = message(9)[..7].to_vec();
        for (first, is_stream) in [(half.clone(), false), (message(9), false), (half, true)] {
            let (mut arriving, _heard) = hanging(first, is_stream);
            let refused = timeout(LONG, read(&mut arriving)).await.unwrap().unwrap_err();
            assert_eq!(refused.code(), Code::DeadlineExceeded, "{refused}");
        }
        let (mut begun, _heard) = hanging(message(9), true);
        begun.frame().await.unwrap();
        assert!(futures::poll!(Box::pin(begun.frame())).is_pending());
    }
}
