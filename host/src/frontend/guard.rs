//! The limits of build services: how large their requests may be, and the memory that these share.

use std::time::Duration;

use cofferdam_rpc::{Limits, MemoryBudget, Refusal, Takes};
use tonic::{Code, Status};

use super::status;
use crate::{
    build::failure::Failure,
    request::{MAX_ENCODED_BYTES, check_encoded_bytes},
};

/// How long a request may take to arrive; one that is a stream, its first message.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(600);

/// The limits of a service whose methods take this. Requests stay in `memory` as long as their builds, so it is not the
/// memory of services that only pass messages through: these must work while many builds wait.
pub(super) fn limits(memory: &MemoryBudget, takes: fn(method: &str) -> Takes) -> Limits {
    Limits { memory: memory.clone(), takes, arrival_timeout: ARRIVAL_TIMEOUT, status: refused }
}

fn refused(refusal: Refusal) -> Status {
    match refusal {
        Refusal::TooLarge { bytes, limit } if limit >= MAX_ENCODED_BYTES => match check_encoded_bytes(bytes) {
            Err(error) => status(&error.into(), None, b""),
            Ok(()) => refusal.into(),
        },
        Refusal::TooLarge { .. } => Status::new(Code::InvalidArgument, refusal.to_string()),
        Refusal::NoMemory { who, limit } => {
            let message = format!("the requests of all builds of {who} together may have {limit} bytes");
            let mut failure = Failure::executor("queue_full", message).advised("try again later");
            failure.fields.insert("limit".to_owned(), "request_bytes".into());
            failure.fields.insert("allowed".to_owned(), limit.into());
            status(&failure, None, b"")
        }
        Refusal::NotOneMessage | Refusal::Late(_) => refusal.into(),
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::StatusExt as _;

    use super::*;

    #[test]
    fn a_too_large_request_is_an_invalid_field() {
        let status = refused(Refusal::TooLarge { bytes: MAX_ENCODED_BYTES + 1, limit: MAX_ENCODED_BYTES });
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert_eq!(status.get_details_bad_request().unwrap().field_violations[0].field, "the request");
        let status = refused(Refusal::TooLarge { bytes: 10, limit: 9 });
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains("10 bytes"), "{status}");
    }

    #[test]
    fn a_client_beyond_its_memory_is_told_when_to_retry() {
        let status = refused(Refusal::NoMemory { who: "a client", limit: 512 });
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        assert!(status.message().contains("of a client together may have 512 bytes"), "{status}");
        let info = status.get_details_error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.metadata["limit"].as_str()), ("QUEUE_FULL", "request_bytes"));
        assert!(status.get_details_retry_info().is_some());
    }
}
