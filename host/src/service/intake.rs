//! What requests may take of this host's memory, from their first byte to the end of their builds.
//!
//! ```text
//!   body ──5 bytes──▶ length, refused if too large
//!     └───bytes as they come, paid for out of one budget──▶ EncodedRequest ─▶ Order ─▶ Flight
//!                                     Paid ─────────────────────────────────────▲ given back with the last of them
//! ```

use std::{
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::stream;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};
use tonic::{
    Status,
    body::Body,
    codegen::{Service, http::Request},
    server::NamedService,
};

use super::status::status;
use crate::{failure::Failure, request::check_encoded_bytes};

/// What all requests together may take.
const BUDGET_BYTES: usize = 1 << 30;

/// In what unit it is paid.
const UNIT_BYTES: usize = 1024;

/// How long the first message of a request may be on its way.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(600);

/// The bytes before a message: whether it is compressed, and its length in four bytes.
const PREFIX_BYTES: usize = 5;

/// What a request has paid for its memory, until the last copy is dropped.
#[derive(Debug, Clone, Default)]
pub struct Paid(Arc<Mutex<Option<OwnedSemaphorePermit>>>);

impl Paid {
    /// What the request has paid that this came with.
    pub(super) fn of<T>(request: &tonic::Request<T>) -> Self {
        request.extensions().get::<Self>().cloned().unwrap_or_default()
    }

    fn add(&self, permit: OwnedSemaphorePermit) {
        let mut paid = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *paid {
            Some(paid) => paid.merge(permit),
            none => *none = Some(permit),
        }
    }
}

/// The budget of all services.
#[derive(Debug, Clone)]
pub(super) struct Intake(Arc<Semaphore>);

impl Intake {
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(BUDGET_BYTES / UNIT_BYTES)))
    }

    /// A service whose requests pay out of this budget. The first message of each may have `around` bytes beside what a
    /// `BuildRequest` may have.
    pub(super) fn guard<S>(&self, service: S, around: usize) -> Guarded<S> {
        Guarded { service, budget: self.0.clone(), around }
    }
}

/// A service whose requests pay for their memory.
#[derive(Debug, Clone)]
pub(super) struct Guarded<S> {
    service: S,
    budget: Arc<Semaphore>,
    around: usize,
}

impl<S: NamedService> NamedService for Guarded<S> {
    const NAME: &'static str = S::NAME;
}

impl<S: Service<Request<Body>>> Service<Request<Body>> for Guarded<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> S::Future {
        let paid = Paid::default();
        request.extensions_mut().insert(paid.clone());
        let (budget, around) = (self.budget.clone(), self.around);
        self.service.call(request.map(|body| {
            let deadline = Instant::now() + ARRIVAL_TIMEOUT;
            let arriving =
                Arriving { body, budget, paid, unpaid: 0, around, deadline, message: Message::Prefix(vec![]) };
            Body::new(StreamBody::new(stream::try_unfold(arriving, async |mut arriving| {
                Ok::<_, Status>(arriving.frame().await?.map(|frame| (frame, arriving)))
            })))
        }))
    }
}

/// The body of a request.
struct Arriving {
    body: Body,
    budget: Arc<Semaphore>,
    paid: Paid,
    /// Less than a unit.
    unpaid: usize,
    around: usize,
    deadline: Instant,
    message: Message,
}

/// How much has come of the first message. Those after it are small, and are taken one at a time.
enum Message {
    Prefix(Vec<u8>),
    Left(usize),
    Whole,
}

impl Arriving {
    async fn frame(&mut self) -> Result<Option<Frame<Bytes>>, Status> {
        let frame = match self.message {
            Message::Whole => self.body.frame().await,
            _ => timeout_at(self.deadline, self.body.frame()).await.map_err(|_| late())?,
        };
        let frame = frame.transpose()?;
        if let Some(data) = frame.as_ref().and_then(Frame::data_ref) {
            self.take(data)?;
        }
        Ok(frame)
    }

    fn take(&mut self, mut data: &[u8]) -> Result<(), Status> {
        if let Message::Prefix(prefix) = &mut self.message {
            let (more, rest) = data.split_at(data.len().min(PREFIX_BYTES - prefix.len()));
            prefix.extend_from_slice(more);
            let &[_compressed, a, b, c, d] = &prefix[..] else { return Ok(()) };
            let length = u32::from_be_bytes([a, b, c, d]) as usize;
            check_encoded_bytes(length.saturating_sub(self.around))
                .map_err(|error| status(&error.into(), None, b""))?;
            self.message = Message::Left(length);
            data = rest;
        }
        if let Message::Left(left) = &mut self.message {
            let taken = data.len().min(*left);
            *left -= taken;
            if *left == 0 {
                self.message = Message::Whole;
            }
            self.pay(taken)?;
        }
        Ok(())
    }

    fn pay(&mut self, bytes: usize) -> Result<(), Status> {
        self.unpaid += bytes;
        let units = u32::try_from(self.unpaid / UNIT_BYTES).unwrap_or(u32::MAX);
        self.unpaid %= UNIT_BYTES;
        self.paid.add(self.budget.clone().try_acquire_many_owned(units).map_err(|_| full())?);
        Ok(())
    }
}

fn full() -> Status {
    let message = format!("the requests of all builds together may have {BUDGET_BYTES} bytes");
    let mut failure = Failure::executor("queue_full", message).advised("try again later");
    failure.fields.insert("limit".to_owned(), "request_bytes".into());
    failure.fields.insert("allowed".to_owned(), BUDGET_BYTES.into());
    status(&failure, None, b"")
}

fn late() -> Status {
    Status::deadline_exceeded(format!("the request was not there after {} s", ARRIVAL_TIMEOUT.as_secs()))
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    fn arriving(intake: &Intake, pieces: Vec<Vec<u8>>) -> Arriving {
        let frames = pieces.into_iter().map(|piece| Ok::<_, Status>(Frame::data(Bytes::from(piece))));
        Arriving {
            body: Body::new(StreamBody::new(stream::iter(frames))),
            budget: intake.0.clone(),
            paid: Paid::default(),
            unpaid: 0,
            around: 0,
            deadline: Instant::now() + ARRIVAL_TIMEOUT,
            message: Message::Prefix(vec![]),
        }
    }

    async fn read(arriving: &mut Arriving) -> Result<Vec<u8>, Status> {
        let mut bytes = Vec::new();
        while let Some(frame) = arriving.frame().await? {
            bytes.extend_from_slice(frame.data_ref().unwrap());
        }
        Ok(bytes)
    }

    fn message(length: usize) -> Vec<u8> {
        [&[0], &u32::try_from(length).unwrap().to_be_bytes()[..], &vec![7; length]].concat()
    }

    #[tokio::test]
    async fn a_message_comes_through_as_it_is_and_is_paid_for_as_long_as_anybody_has_it() {
        let intake = Intake::new();
        let all = intake.0.available_permits();
        let bytes = [message(10 * UNIT_BYTES), message(3)].concat();
        for size in [1, 4, 1000, bytes.len()] {
            let mut arriving = arriving(&intake, bytes.chunks(size).map(<[u8]>::to_vec).collect());
            assert_eq!(read(&mut arriving).await.unwrap(), bytes);
            let paid = arriving.paid.clone();
            drop(arriving);
            assert_eq!(intake.0.available_permits(), all - 10);
            drop(paid);
            assert_eq!(intake.0.available_permits(), all);
        }
    }

    #[tokio::test]
    async fn what_is_too_large_is_refused_at_its_prefix_and_what_there_is_no_room_for_as_it_comes() {
        let intake = Intake::new();
        let mut large = arriving(&intake, vec![vec![0], u32::MAX.to_be_bytes().to_vec(), vec![7; 10]]);
        let refused = read(&mut large).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        let _others = intake.0.clone().try_acquire_many_owned(u32::try_from(BUDGET_BYTES / UNIT_BYTES - 2).unwrap());
        read(&mut arriving(&intake, vec![message(2 * UNIT_BYTES)])).await.unwrap();
        let refused = read(&mut arriving(&intake, vec![message(3 * UNIT_BYTES)])).await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
        assert_eq!(intake.0.available_permits(), 2);
    }

    #[tokio::test]
    async fn a_request_that_does_not_come_is_given_up_and_a_stream_may_take_its_time() {
        let intake = Intake::new();
        let passed = Instant::now();
        let pending = |first: Vec<u8>| {
            let mut arriving = Arriving { deadline: passed, ..arriving(&intake, vec![]) };
            let first = stream::iter([Ok::<_, Status>(Frame::data(Bytes::from(first)))]);
            arriving.body = Body::new(StreamBody::new(futures::StreamExt::chain(first, stream::pending())));
            arriving
        };
        let refused = read(&mut pending(message(9)[..7].to_vec())).await.unwrap_err();
        assert_eq!(refused.code(), Code::DeadlineExceeded, "{refused}");
        let mut whole = pending(message(9));
        whole.frame().await.unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(50), whole.frame()).await.is_err());
    }
}
