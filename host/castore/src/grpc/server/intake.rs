//! What messages may take of memory while they arrive.
//!
//! ```text
//!   body ──5 bytes──▶ length, refused if too large ──bytes as they come, paid for──▶ whole: all given back ─▶ the next
//! ```

use std::{
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::stream;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use tokio::time::{Instant, timeout_at};
use tonic::{
    Status,
    body::Body,
    codegen::{Service, http::Request},
    server::NamedService,
};

use super::{
    share::{Client, Shares, Turn},
    work::silent,
};

/// What all messages together may take while they arrive.
const BUDGET_BYTES: usize = 1 << 30;

/// Of which one client has half at most.
const SHARE_BYTES: usize = BUDGET_BYTES / 2;

/// In what unit it is paid.
const UNIT_BYTES: usize = 1024;

/// The bytes before a message: whether it is compressed, and its length in four bytes.
const PREFIX_BYTES: usize = 5;

/// Bytes of the largest message that only asks for something.
pub(super) const MAX_QUESTION_BYTES: usize = 4 * 1024;

/// A budget for the bytes of messages that arrive, for all services that have a clone of it.
#[derive(Debug, Clone)]
pub struct Intake(Shares);

impl Default for Intake {
    fn default() -> Self {
        Self(Shares::new(BUDGET_BYTES / UNIT_BYTES, SHARE_BYTES / UNIT_BYTES))
    }
}

impl Intake {
    /// A service whose messages are paid for. `largest` is how many bytes a message to the method of this path may have,
    /// and the first one of each request must be there `patience` after it is waited for.
    pub(super) fn guard<S>(&self, service: S, largest: fn(path: &str) -> usize, patience: Duration) -> Guarded<S> {
        Guarded { service, budget: self.0.clone(), largest, patience }
    }
}

/// A service whose messages are paid for while they arrive.
#[derive(Debug, Clone)]
pub(in super::super) struct Guarded<S> {
    service: S,
    budget: Shares,
    largest: fn(path: &str) -> usize,
    patience: Duration,
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

    fn call(&mut self, request: Request<Body>) -> S::Future {
        let messages = Messages {
            budget: self.budget.clone(),
            client: Client::of(request.extensions()),
            largest: (self.largest)(request.uri().path()),
            prefix: Vec::new(),
            left: 0,
            unpaid: 0,
            paid: None,
            has_first: false,
        };
        let patience = self.patience;
        self.service.call(request.map(|body| {
            let arriving = Arriving { body, messages, patience, deadline: None };
            Body::new(StreamBody::new(stream::try_unfold(arriving, async |mut arriving| {
                Ok::<_, Status>(arriving.frame().await?.map(|frame| (frame, arriving)))
            })))
        }))
    }
}

/// The body of a request.
struct Arriving {
    body: Body,
    messages: Messages,
    patience: Duration,
    /// For the first message, from when it is waited for.
    deadline: Option<Instant>,
}

impl Arriving {
    async fn frame(&mut self) -> Result<Option<Frame<Bytes>>, Status> {
        let frame = if self.messages.has_first {
            self.body.frame().await
        } else {
            let deadline = *self.deadline.get_or_insert_with(|| Instant::now() + self.patience);
            timeout_at(deadline, self.body.frame()).await.map_err(|_| silent(self.patience))?
        };
        let frame = frame.transpose()?;
        if let Some(data) = frame.as_ref().and_then(Frame::data_ref) {
            self.messages.take(data)?;
        }
        Ok(frame)
    }
}

/// What has come of the messages.
struct Messages {
    budget: Shares,
    client: Client,
    largest: usize,
    /// Of the message that arrives, as far as it has come.
    prefix: Vec<u8>,
    /// Bytes of it that are still to come, if its prefix has.
    left: usize,
    /// Less than a unit.
    unpaid: usize,
    paid: Option<Turn>,
    has_first: bool,
}

impl Messages {
    fn take(&mut self, mut data: &[u8]) -> Result<(), Status> {
        while !data.is_empty() {
            if self.prefix.len() < PREFIX_BYTES {
                let (more, rest) = data.split_at(data.len().min(PREFIX_BYTES - self.prefix.len()));
                self.prefix.extend_from_slice(more);
                data = rest;
                let &[_compressed, a, b, c, d] = &self.prefix[..] else { return Ok(()) };
                self.left = u32::from_be_bytes([a, b, c, d]) as usize;
                if self.left > self.largest {
                    return Err(too_large(self.left, self.largest));
                }
            }
            let (taken, rest) = data.split_at(data.len().min(self.left));
            data = rest;
            self.left -= taken.len();
            if self.left == 0 {
                self.has_first = true;
                self.prefix.clear();
                (self.unpaid, self.paid) = (0, None);
            } else {
                self.pay(taken.len())?;
            }
        }
        Ok(())
    }

    fn pay(&mut self, bytes: usize) -> Result<(), Status> {
        self.unpaid += bytes;
        let units = u32::try_from(self.unpaid / UNIT_BYTES).unwrap_or(u32::MAX);
        self.unpaid %= UNIT_BYTES;
        if units == 0 {
            return Ok(());
        }
        let paid = self.budget.try_take(self.client, units).ok_or_else(full)?;
        match &mut self.paid {
            Some(before) => before.merge(paid),
            none => *none = Some(paid),
        }
        Ok(())
    }
}

fn too_large(bytes: usize, largest: usize) -> Status {
    Status::out_of_range(format!("the message is too large: it has {bytes} bytes, and {largest} is the limit"))
}

fn full() -> Status {
    Status::resource_exhausted(format!(
        "the messages that arrive have {BUDGET_BYTES} bytes together, or {SHARE_BYTES} from one client: try again later"
    ))
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;
    use tonic::Code;

    use super::*;

    fn arriving(intake: &Intake, pieces: Vec<Vec<u8>>) -> Arriving {
        let frames = pieces.into_iter().map(|piece| Ok::<_, Status>(Frame::data(Bytes::from(piece))));
        let messages = Messages {
            budget: intake.0.clone(),
            client: Client::Unknown,
            largest: 20 * UNIT_BYTES,
            prefix: Vec::new(),
            left: 0,
            unpaid: 0,
            paid: None,
            has_first: false,
        };
        let body = Body::new(StreamBody::new(stream::iter(frames)));
        Arriving { body, messages, patience: Duration::ZERO, deadline: None }
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

    /// All but so many units, as another client has them.
    fn others(intake: &Intake, left: usize) -> [Turn; 2] {
        let units = [SHARE_BYTES / UNIT_BYTES, SHARE_BYTES / UNIT_BYTES - left];
        let mut user = 0;
        units.map(|units| {
            user += 1;
            intake.0.try_take(Client::User(user), u32::try_from(units).unwrap()).unwrap()
        })
    }

    #[tokio::test]
    async fn messages_come_through_as_they_are_and_are_paid_for_until_they_are_whole() {
        let bytes = [message(10 * UNIT_BYTES), message(0), message(12 * UNIT_BYTES), message(3)].concat();
        for size in [1, 4, 1000, bytes.len()] {
            let intake = Intake::default();
            let _others = others(&intake, 12);
            let mut arriving = arriving(&intake, bytes.chunks(size).map(<[u8]>::to_vec).collect());
            assert_eq!(read(&mut arriving).await.unwrap(), bytes);
        }
    }

    #[tokio::test]
    async fn what_is_too_large_is_refused_at_its_prefix_and_what_there_is_no_room_for_as_it_comes() {
        let intake = Intake::default();
        for pieces in
            [vec![vec![0], u32::MAX.to_be_bytes().to_vec()], vec![[message(1), message(20 * UNIT_BYTES + 1)].concat()]]
        {
            let refused = read(&mut arriving(&intake, pieces)).await.unwrap_err();
            assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
        }
        let _others = others(&intake, 2);
        let half = message(4 * UNIT_BYTES)[..3 * UNIT_BYTES].to_vec();
        let mut first = arriving(&intake, vec![half.clone()]);
        read(&mut first).await.unwrap();
        let refused = read(&mut arriving(&intake, vec![half.clone()])).await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
        drop(first);
        read(&mut arriving(&intake, vec![half])).await.unwrap();
    }

    #[tokio::test]
    async fn a_message_that_does_not_come_is_given_up_and_a_stream_may_take_its_time() {
        let intake = Intake::default();
        let hanging = |first: Vec<u8>| {
            let mut arriving = arriving(&intake, vec![]);
            let first = stream::iter([Ok::<_, Status>(Frame::data(Bytes::from(first)))]);
            arriving.body = Body::new(StreamBody::new(futures::StreamExt::chain(first, stream::pending())));
            arriving
        };
        let mut half = hanging(message(9)[..7].to_vec());
        let refused = timeout(Duration::from_secs(60), read(&mut half)).await.unwrap().unwrap_err();
        assert_eq!(refused.code(), Code::DeadlineExceeded, "{refused}");
        let mut whole = hanging(message(9));
        whole.frame().await.unwrap();
        assert!(futures::poll!(Box::pin(whole.frame())).is_pending());
    }
}
