//! What requests may take of this host's memory, from their first byte to the end of their builds.
//!
//! ```text
//!   body ──5 bytes──▶ length, refused if too large
//!     └───bytes as they come, paid for out of one budget──▶ EncodedRequest ─▶ Order ─▶ Flight
//!                                     Paid ─────────────────────────────────────▲ given back with the last of them
//! ```

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
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

use super::{Client, status::status};
use crate::{failure::Failure, request::check_encoded_bytes};

/// What all requests together may take.
const BUDGET_BYTES: usize = 1 << 30;

/// What those of one client may take of it, so that there is room for another's.
const SHARE_BYTES: usize = BUDGET_BYTES / 2;

/// In what unit it is paid.
const UNIT_BYTES: usize = 1024;

/// How long a request may be on its way; one that is a stream, its first message.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(600);

/// The bytes before a message: whether it is compressed, and its length in four bytes.
const PREFIX_BYTES: usize = 5;

/// The only method whose request is a stream.
const STREAM: &str = "/cofferdam.v1.BuildService/Shell";

/// Most bytes of a message of a stream: a terminal is typed at.
const MAX_TYPED_BYTES: usize = 64 * 1024;

/// What a request has paid for its memory, until the last copy is dropped.
#[derive(Debug, Clone, Default)]
pub struct Paid(Arc<Mutex<Option<Payment>>>);

/// Out of the budget and out of the client's share.
type Payment = [OwnedSemaphorePermit; 2];

impl Paid {
    /// What the request has paid that this came with.
    pub(super) fn of<T>(request: &tonic::Request<T>) -> Self {
        request.extensions().get::<Self>().cloned().unwrap_or_default()
    }

    fn add(&self, payment: Payment) {
        let mut paid = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *paid {
            Some(paid) => paid.iter_mut().zip(payment).for_each(|(paid, more)| paid.merge(more)),
            none => *none = Some(payment),
        }
    }
}

/// The budget of all services.
#[derive(Debug, Clone)]
pub(super) struct Intake {
    budget: Arc<Semaphore>,
    /// Of clients that have paid something.
    shares: Arc<Mutex<HashMap<Client, Weak<Semaphore>>>>,
}

impl Intake {
    pub(super) fn new() -> Self {
        Self { budget: Arc::new(Semaphore::new(BUDGET_BYTES / UNIT_BYTES)), shares: Arc::default() }
    }

    /// A service whose requests pay out of this budget. The first message of each may have `around` bytes beside what a
    /// `BuildRequest` may have.
    pub(super) fn guard<S>(&self, service: S, around: usize) -> Guarded<S> {
        Guarded { service, intake: self.clone(), around }
    }

    /// Where a client pays.
    fn accounts(&self, client: Client) -> [Arc<Semaphore>; 2] {
        let mut shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
        let share = shares.get(&client).and_then(Weak::upgrade).unwrap_or_else(|| {
            shares.retain(|_, share| share.strong_count() > 0);
            let share = Arc::new(Semaphore::new(SHARE_BYTES / UNIT_BYTES));
            shares.insert(client, Arc::downgrade(&share));
            share
        });
        [self.budget.clone(), share]
    }
}

/// A service whose requests pay for their memory.
#[derive(Debug, Clone)]
pub(super) struct Guarded<S> {
    service: S,
    intake: Intake,
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
        let client = Client::at(request.extensions());
        let accounts = client.map(|client| self.intake.accounts(client));
        request.extensions_mut().insert(paid.clone());
        let is_stream = request.uri().path() == STREAM;
        let around = self.around;
        self.service.call(request.map(|body| {
            let arriving = Arriving { is_stream, around, ..Arriving::new(body, accounts, paid) };
            Body::new(StreamBody::new(stream::try_unfold(arriving, async |mut arriving| {
                Ok::<_, Status>(arriving.frame().await?.map(|frame| (frame, arriving)))
            })))
        }))
    }
}

/// The body of a request.
struct Arriving {
    body: Body,
    accounts: Option<[Arc<Semaphore>; 2]>,
    paid: Paid,
    /// Less than a unit.
    unpaid: usize,
    around: usize,
    is_stream: bool,
    deadline: Instant,
    /// Whether the first message is there.
    begun: bool,
    message: Message,
}

/// How much has come of a message.
enum Message {
    Prefix(Vec<u8>),
    Left(usize),
}

impl Arriving {
    fn new(body: Body, accounts: Option<[Arc<Semaphore>; 2]>, paid: Paid) -> Self {
        Self {
            body,
            accounts,
            paid,
            unpaid: 0,
            around: 0,
            is_stream: false,
            deadline: Instant::now() + ARRIVAL_TIMEOUT,
            begun: false,
            message: Message::Prefix(vec![]),
        }
    }

    async fn frame(&mut self) -> Result<Option<Frame<Bytes>>, Status> {
        let frame = if self.begun && self.is_stream {
            self.body.frame().await
        } else {
            timeout_at(self.deadline, self.body.frame()).await.map_err(|_| late())?
        };
        let frame = frame.transpose()?;
        if let Some(data) = frame.as_ref().and_then(Frame::data_ref) {
            self.take(data)?;
        }
        Ok(frame)
    }

    fn take(&mut self, mut data: &[u8]) -> Result<(), Status> {
        while !data.is_empty() {
            if self.begun && !self.is_stream {
                return Err(Status::invalid_argument(
                    "a request of this method is one message, and more came after it",
                ));
            }
            match &mut self.message {
                Message::Prefix(prefix) => {
                    let (more, rest) = data.split_at(data.len().min(PREFIX_BYTES - prefix.len()));
                    prefix.extend_from_slice(more);
                    data = rest;
                    let &[_compressed, a, b, c, d] = &prefix[..] else { continue };
                    let length = u32::from_be_bytes([a, b, c, d]) as usize;
                    self.check(length)?;
                    self.message = Message::Left(length);
                }
                Message::Left(left) => {
                    let (more, rest) = data.split_at(data.len().min(*left));
                    *left -= more.len();
                    data = rest;
                    if !self.begun {
                        self.pay(more.len())?;
                    }
                }
            }
            if matches!(self.message, Message::Left(0)) {
                self.begun = true;
                self.message = Message::Prefix(vec![]);
            }
        }
        Ok(())
    }

    fn check(&self, length: usize) -> Result<(), Status> {
        if self.begun && length > MAX_TYPED_BYTES {
            let rule = format!("a message of a stream must have at most {MAX_TYPED_BYTES} bytes (got {length})");
            return Err(Status::invalid_argument(rule));
        }
        check_encoded_bytes(length.saturating_sub(self.around)).map_err(|error| status(&error.into(), None, b""))
    }

    fn pay(&mut self, bytes: usize) -> Result<(), Status> {
        let [budget, share] = self.accounts.as_ref().ok_or_else(Client::unknown)?;
        self.unpaid += bytes;
        let units = u32::try_from(self.unpaid / UNIT_BYTES).unwrap_or(u32::MAX);
        self.unpaid %= UNIT_BYTES;
        let pay = |account: &Arc<Semaphore>, who, allowed| {
            account.clone().try_acquire_many_owned(units).map_err(|_| full(who, allowed))
        };
        self.paid.add([pay(budget, "all clients", BUDGET_BYTES)?, pay(share, "a client", SHARE_BYTES)?]);
        Ok(())
    }
}

fn full(who: &str, allowed: usize) -> Status {
    let message = format!("the requests of all builds of {who} together may have {allowed} bytes");
    let mut failure = Failure::executor("queue_full", message).advised("try again later");
    failure.fields.insert("limit".to_owned(), "request_bytes".into());
    failure.fields.insert("allowed".to_owned(), allowed.into());
    status(&failure, None, b"")
}

fn late() -> Status {
    Status::deadline_exceeded(format!("the request was not there after {} s", ARRIVAL_TIMEOUT.as_secs()))
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    const CLIENT: Client = Client::User(1);

    fn arriving(intake: &Intake, pieces: Vec<Vec<u8>>) -> Arriving {
        let frames = pieces.into_iter().map(|piece| Ok::<_, Status>(Frame::data(Bytes::from(piece))));
        let body = Body::new(StreamBody::new(stream::iter(frames)));
        Arriving::new(body, Some(intake.accounts(CLIENT)), Paid::default())
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
        let [budget, share] = intake.accounts(CLIENT);
        let free = || [budget.available_permits(), share.available_permits()];
        let all = free();
        let bytes = [message(10 * UNIT_BYTES), message(0), message(3), message(MAX_TYPED_BYTES)].concat();
        for size in [1, 4, 1000, bytes.len()] {
            let mut arriving = arriving(&intake, bytes.chunks(size).map(<[u8]>::to_vec).collect());
            arriving.is_stream = true;
            assert_eq!(read(&mut arriving).await.unwrap(), bytes);
            let paid = arriving.paid.clone();
            drop(arriving);
            assert_eq!(free(), all.map(|units| units - 10));
            drop(paid);
            assert_eq!(free(), all);
        }
    }

    #[tokio::test]
    async fn what_is_too_large_is_refused_at_its_prefix_and_what_there_is_no_room_for_as_it_comes() {
        let intake = Intake::new();
        let mut large = arriving(&intake, vec![vec![0], u32::MAX.to_be_bytes().to_vec(), vec![7; 10]]);
        let refused = read(&mut large).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        for (account, allowed) in intake.accounts(CLIENT).into_iter().zip([BUDGET_BYTES, SHARE_BYTES]) {
            let others = u32::try_from(account.available_permits() - 2).unwrap();
            let _others = account.clone().try_acquire_many_owned(others).unwrap();
            read(&mut arriving(&intake, vec![message(2 * UNIT_BYTES)])).await.unwrap();
            let refused = read(&mut arriving(&intake, vec![message(3 * UNIT_BYTES)])).await.unwrap_err();
            assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
            assert!(refused.message().contains(&allowed.to_string()), "{refused}");
            assert_eq!(account.available_permits(), 2);
        }
    }

    #[tokio::test]
    async fn after_a_request_comes_nothing_and_in_a_stream_nothing_large() {
        let intake = Intake::new();
        for pieces in [vec![message(9), vec![0]], vec![[message(0), vec![0]].concat()]] {
            let refused = read(&mut arriving(&intake, pieces)).await.unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        }
        let mut typed = arriving(&intake, vec![[message(9), message(MAX_TYPED_BYTES + 1)].concat()]);
        typed.is_stream = true;
        let refused = read(&mut typed).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }

    #[tokio::test]
    async fn a_request_that_does_not_come_is_given_up_and_a_stream_may_take_its_time() {
        let intake = Intake::new();
        let passed = Instant::now();
        let pending = |first: Vec<u8>, is_stream| {
            let first = stream::iter([Ok::<_, Status>(Frame::data(Bytes::from(first)))]);
            let body = Body::new(StreamBody::new(futures::StreamExt::chain(first, stream::pending())));
            Arriving { body, deadline: passed, is_stream, ..arriving(&intake, vec![]) }
        };
        for (first, is_stream) in
            [(message(9)[..7].to_vec(), false), (message(9), false), (message(9)[..7].to_vec(), true)]
        {
            let refused = read(&mut pending(first, is_stream)).await.unwrap_err();
            assert_eq!(refused.code(), Code::DeadlineExceeded, "{refused}");
        }
        let mut begun = pending(message(9), true);
        begun.frame().await.unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(50), begun.frame()).await.is_err());
    }
}
