//! What requests may take of this host's memory, from their first byte to the end of their builds.
//!
//! ```text
//!   body ──▶ length, refused if too large ──▶ bytes as they come, paid for ──▶ EncodedRequest ─▶ Order ─▶ Flight
//!                                                 └─▶ Paid, given back with the last of them ◀──────────────┘
//! ```

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use cofferdam_castore::grpc::{Gate, Gated, Shares, Short, Turn};
use tonic::Status;

use super::Client;
use crate::{build::failure::Failure, frontend::status::status, request::check_encoded_bytes};

/// What all requests together may take.
const BUDGET_BYTES: usize = 1 << 30;

/// What those of one client may take of it, so that there is room for another's.
const SHARE_BYTES: usize = BUDGET_BYTES / 2;

/// How long a request may be on its way; one that is a stream, its first message.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(600);

/// The only method whose request is a stream.
const STREAM: &str = "/cofferdam.v1.BuildService/Shell";

/// Most bytes of a message of a stream: a terminal is typed at.
const MAX_TYPED_BYTES: usize = 64 * 1024;

/// What a request has paid for its memory, until the last copy is dropped.
#[derive(Debug, Clone, Default)]
pub struct Paid(Arc<Mutex<Option<Turn>>>);

impl Paid {
    /// What the request has paid that this came with.
    pub(crate) fn of<T>(request: &tonic::Request<T>) -> Self {
        request.extensions().get::<Self>().cloned().unwrap_or_default()
    }

    fn add(&self, more: Turn) {
        let mut paid = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *paid {
            Some(paid) => paid.merge(more),
            none => *none = Some(more),
        }
    }
}

/// The budget of all services.
#[derive(Debug, Clone)]
pub(crate) struct Intake(Shares<Client>);

impl Intake {
    pub(crate) fn new() -> Self {
        Self(Shares::new(BUDGET_BYTES, SHARE_BYTES))
    }

    /// A service whose requests pay out of this budget. The first message of each may have `around` bytes beside what a
    /// `BuildRequest` may have.
    pub(crate) fn guard<S>(&self, service: S, around: usize) -> Gated<S> {
        let budget = self.0.clone();
        let toll = move |request: &mut tonic::codegen::http::Request<_>| {
            let paid = Paid::default();
            request.extensions_mut().insert(paid.clone());
            Toll {
                budget: budget.clone(),
                client: Client::at(request.extensions()),
                paid,
                around,
                is_stream: request.uri().path() == STREAM,
                has_first: false,
            }
        };
        Gated::new(service, toll, ARRIVAL_TIMEOUT)
    }
}

/// Where a request pays: for its first message, since the others are small and soon gone.
struct Toll {
    budget: Shares<Client>,
    client: Option<Client>,
    paid: Paid,
    around: usize,
    is_stream: bool,
    has_first: bool,
}

impl Gate for Toll {
    fn is_stream(&self) -> bool {
        self.is_stream
    }

    fn begin(&mut self, bytes: usize) -> Result<(), Status> {
        if self.has_first && bytes > MAX_TYPED_BYTES {
            let rule = format!("a message of a stream must have at most {MAX_TYPED_BYTES} bytes (got {bytes})");
            return Err(Status::invalid_argument(rule));
        }
        check_encoded_bytes(bytes.saturating_sub(self.around)).map_err(|error| status(&error.into(), None, b""))
    }

    fn arrive(&mut self, bytes: usize) -> Result<(), Status> {
        if self.has_first {
            return Ok(());
        }
        let client = self.client.clone().ok_or_else(Client::unknown)?;
        self.paid.add(self.budget.try_take(client, bytes).map_err(full)?);
        Ok(())
    }

    fn end(&mut self) {
        self.has_first = true;
    }
}

fn full(short: Short) -> Status {
    let (who, allowed) = match short {
        Short::All => ("all clients", BUDGET_BYTES),
        Short::Share => ("a client", SHARE_BYTES),
    };
    let message = format!("the requests of all builds of {who} together may have {allowed} bytes");
    let mut failure = Failure::executor("queue_full", message).advised("try again later");
    failure.fields.insert("limit".to_owned(), "request_bytes".into());
    failure.fields.insert("allowed".to_owned(), allowed.into());
    status(&failure, None, b"")
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;
    use crate::request::MAX_ENCODED_BYTES;

    const CLIENT: Client = Client::User(1);

    fn toll(intake: &Intake, around: usize) -> Toll {
        Toll {
            budget: intake.0.clone(),
            client: Some(CLIENT),
            paid: Paid::default(),
            around,
            is_stream: true,
            has_first: false,
        }
    }

    /// Whether a client has just this much left.
    fn has_left(intake: &Intake, client: Client, bytes: usize) -> bool {
        intake.0.try_take(client.clone(), bytes).is_ok() && intake.0.try_take(client, bytes + 1).is_err()
    }

    #[test]
    fn a_request_is_paid_for_as_long_as_anybody_has_it_and_what_is_typed_is_not() {
        let intake = Intake::new();
        let mut toll = toll(&intake, 0);
        toll.arrive(10_000).unwrap();
        toll.arrive(1).unwrap();
        toll.end();
        toll.arrive(MAX_TYPED_BYTES).unwrap();
        let paid = toll.paid.clone();
        drop(toll);
        assert!(has_left(&intake, CLIENT, SHARE_BYTES - 10_001));
        drop(paid);
        assert!(has_left(&intake, CLIENT, SHARE_BYTES));
    }

    #[test]
    fn what_there_is_no_room_for_is_refused_by_whose_share_it_is() {
        let refused = |intake: &Intake| toll(intake, 0).arrive(3).unwrap_err();
        let clients = [CLIENT, Client::User(2), Client::User(3)];
        let taken = |intake: &Intake, bytes: [usize; 3]| {
            clients.clone().into_iter().zip(bytes).map(|(who, bytes)| intake.0.try_take(who, bytes).unwrap()).collect()
        };
        for (others, allowed) in
            [([SHARE_BYTES - 2, 0, 0], SHARE_BYTES), ([0, SHARE_BYTES, SHARE_BYTES - 2], BUDGET_BYTES)]
        {
            let intake = Intake::new();
            let others: Vec<_> = taken(&intake, others);
            let status = refused(&intake);
            assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
            assert!(status.message().contains(&allowed.to_string()), "{status}");
            toll(&intake, 0).arrive(2).unwrap();
            drop(others);
            toll(&intake, 0).arrive(3).unwrap();
        }
    }

    #[test]
    fn a_large_message_is_refused_before_it_comes() {
        let mut toll = toll(&Intake::new(), 9);
        toll.begin(MAX_ENCODED_BYTES + 9).unwrap();
        assert_eq!(toll.begin(MAX_ENCODED_BYTES + 10).unwrap_err().code(), Code::InvalidArgument);
        toll.end();
        toll.begin(MAX_TYPED_BYTES).unwrap();
        assert_eq!(toll.begin(MAX_TYPED_BYTES + 1).unwrap_err().code(), Code::InvalidArgument);
    }

    #[test]
    fn who_is_unknown_can_not_pay() {
        let mut toll = Toll { client: None, ..toll(&Intake::new(), 0) };
        assert_eq!(toll.arrive(1).unwrap_err().code(), Code::Unauthenticated);
    }
}
