//! What messages may take of memory while they arrive: each pays for its bytes as they come, and gets all of it back when it
//! is whole.

use std::time::Duration;

use tonic::Status;

use super::{
    gate::{Gate, Gated},
    share::{Client, Shares, Turn},
};

/// What all messages together may take while they arrive.
const BUDGET_BYTES: usize = 1 << 30;

/// Of which one client has half at most.
const SHARE_BYTES: usize = BUDGET_BYTES / 2;

/// Bytes of the largest message that only asks for something.
pub(super) const MAX_QUESTION_BYTES: usize = 4 * 1024;

/// A budget for the bytes of messages that arrive, for all services that have a clone of it.
#[derive(Debug, Clone)]
pub struct Intake(Shares<Client>);

impl Default for Intake {
    fn default() -> Self {
        Self(Shares::new(BUDGET_BYTES, SHARE_BYTES))
    }
}

/// What a request is made of, and how many bytes a message of it may have.
#[derive(Debug, Clone, Copy)]
pub(super) enum Takes {
    One(usize),
    Stream(usize),
}

impl Intake {
    /// A service whose messages are paid for. `takes` is told the path of the method.
    pub(super) fn guard<S>(&self, service: S, takes: fn(path: &str) -> Takes, patience: Duration) -> Gated<S> {
        let budget = self.0.clone();
        let toll = move |request: &mut tonic::codegen::http::Request<_>| Toll {
            budget: budget.clone(),
            client: Client::of(request.extensions()),
            takes: takes(request.uri().path()),
            paid: None,
        };
        Gated::new(service, toll, patience)
    }
}

/// Where the messages of a request pay.
struct Toll {
    budget: Shares<Client>,
    client: Client,
    takes: Takes,
    paid: Option<Turn>,
}

impl Gate for Toll {
    fn is_stream(&self) -> bool {
        matches!(self.takes, Takes::Stream(_))
    }

    fn begin(&mut self, bytes: usize) -> Result<(), Status> {
        let (Takes::One(largest) | Takes::Stream(largest)) = self.takes;
        if bytes > largest { Err(too_large(bytes, largest)) } else { Ok(()) }
    }

    fn arrive(&mut self, bytes: usize) -> Result<(), Status> {
        let paid = self.budget.try_take(self.client, bytes).map_err(|_| full())?;
        match &mut self.paid {
            Some(before) => before.merge(paid),
            none => *none = Some(paid),
        }
        Ok(())
    }

    fn end(&mut self) {
        self.paid = None;
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
    use tonic::Code;

    use super::*;

    const LARGEST: usize = 20_000;

    fn toll(intake: &Intake) -> Toll {
        Toll { budget: intake.0.clone(), client: Client::Unknown, takes: Takes::Stream(LARGEST), paid: None }
    }

    #[test]
    fn messages_are_paid_for_until_they_are_whole() {
        let intake = Intake::default();
        let _others = [SHARE_BYTES, SHARE_BYTES - 12_000]
            .into_iter()
            .zip(1..)
            .map(|(bytes, user)| intake.0.try_take(Client::User(user), bytes).unwrap())
            .collect::<Vec<_>>();
        let mut first = toll(&intake);
        for message in [[10_000, 0], [5_000, 7_000]] {
            message.into_iter().for_each(|bytes| first.arrive(bytes).unwrap());
            first.end();
        }
        first.arrive(7_000).unwrap();
        let refused = toll(&intake).arrive(7_000).unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
        drop(first);
        toll(&intake).arrive(7_000).unwrap();
    }

    #[test]
    fn a_large_message_is_refused_before_it_comes() {
        let mut toll = toll(&Intake::default());
        toll.begin(LARGEST).unwrap();
        let refused = toll.begin(LARGEST + 1).unwrap_err();
        assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
    }
}
