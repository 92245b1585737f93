//! Failures as gRPC statuses. They fit into 8 KiB, the limit for trailers in many clients.

use std::{collections::HashMap, time::Duration};

use serde_json::Value;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::build::failure::{Failure, FailureKind};

/// Names this project in a `google.rpc.ErrorInfo`.
pub(super) const ERROR_DOMAIN: &str = "cofferdam";

/// Bytes of the log's end in a status's details.
pub(super) const MAX_LOG_TAIL_BYTES: usize = 3 * 1024;

/// Bytes of the log's end in a status's message, for clients that show only that.
const MAX_SHOWN_TAIL_BYTES: usize = 512;

/// Bytes of a status's message without the log's end.
const MAX_MESSAGE_BYTES: usize = 1024;

/// Bytes of the hint in it.
const MAX_HINT_BYTES: usize = 512;

/// Bytes of one value in the metadata of an `ErrorInfo`.
const MAX_VALUE_BYTES: usize = 256;

/// When a refused client may try again.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// The status of a failure. `id` is the build's, if there is one, and `log` the end of its log.
pub(crate) fn status(failure: &Failure, id: Option<&str>, log: &[u8]) -> Status {
    let mut metadata: HashMap<String, String> = failure
        .fields
        .iter()
        // The message has the hint.
        .filter(|(key, value)| !value.is_null() && *key != "hint")
        .map(|(key, value)| (key.clone(), shown(value)))
        .collect();
    metadata.insert("kind".to_owned(), failure.kind.word().to_owned());
    if let Some(id) = id {
        metadata.insert("build_id".to_owned(), id.to_owned());
    }
    let mut details = ErrorDetails::with_error_info(failure.reason.to_uppercase(), ERROR_DOMAIN, metadata);
    let code = code(failure);
    match code {
        Code::InvalidArgument | Code::FailedPrecondition => {
            let text = |key: &str| failure.fields.get(key).and_then(Value::as_str).unwrap_or_default();
            details.set_bad_request([]);
            details.add_bad_request_violation(cut(text("field"), MAX_VALUE_BYTES), cut(text("rule"), MAX_VALUE_BYTES));
        }
        Code::ResourceExhausted => {
            let hint = failure.fields.get("retry_after_seconds").and_then(Value::as_u64);
            details.set_retry_info(Some(hint.map_or(RETRY_AFTER, Duration::from_secs)));
        }
        Code::Unavailable => {
            details.set_retry_info(Some(RETRY_AFTER));
        }
        _ => {}
    }
    let hint = failure.hint().map_or_else(String::new, |hint| format!("; hint: {}", cut(hint, MAX_HINT_BYTES)));
    let mut message = cut(&failure.chain(), MAX_MESSAGE_BYTES.saturating_sub(hint.len())).to_owned() + &hint;
    let tail = tail(log, MAX_LOG_TAIL_BYTES);
    if !tail.is_empty() {
        let shown = self::tail(tail.as_bytes(), MAX_SHOWN_TAIL_BYTES);
        message = format!("{message}; the last lines of its log:\n{shown}");
        details.set_debug_info(Vec::new(), tail);
    }
    Status::with_error_details(code, message, details)
}

fn code(failure: &Failure) -> Code {
    match (failure.kind, failure.reason.as_str()) {
        (FailureKind::BuildFailed, _) => Code::Aborted,
        (
            FailureKind::RequestWrong,
            "missing" | "unsupported" | "no_shell" | "no_provenance" | "not_comparable" | "not_divided",
        ) => Code::FailedPrecondition,
        (FailureKind::RequestWrong, "unknown_build") => Code::NotFound,
        (FailureKind::RequestWrong, "beyond_end") => Code::OutOfRange,
        (FailureKind::RequestWrong, _) => Code::InvalidArgument,
        (FailureKind::ExecutorFailed, "interrupted") => Code::Cancelled,
        (FailureKind::ExecutorFailed, "queue_full" | "quota") => Code::ResourceExhausted,
        (FailureKind::ExecutorFailed, "protocol" | "records") => Code::Internal,
        (FailureKind::ExecutorFailed, _) => Code::Unavailable,
    }
}

/// The failure in a status, as far as it has details.
pub(crate) fn failure(status: &Status) -> Failure {
    let mut failure = Failure::executor("daemon", format!("the daemon refused: {}", status.code().description()));
    failure.causes = vec![status.message().to_owned()];
    let Some(info) = status.get_details_error_info().filter(|info| info.domain == ERROR_DOMAIN) else { return failure };
    let kind = info.metadata.get("kind").and_then(|word| FailureKind::ALL.into_iter().find(|kind| kind.word() == word));
    let Some(kind) = kind else { return failure };
    let fields = info.metadata.into_iter().filter(|(key, _)| key != "kind");
    failure.fields = fields.map(|(key, value)| (key, Value::String(value))).collect();
    failure.message = std::mem::take(&mut failure.causes).concat();
    Failure { kind, reason: info.reason.to_lowercase(), ..failure }
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => cut(text, MAX_VALUE_BYTES).to_owned(),
        other => cut(&other.to_string(), MAX_VALUE_BYTES).to_owned(),
    }
}

fn cut(text: &str, most: usize) -> &str {
    &text[..text.floor_char_boundary(most)]
}

/// The last lines of a log that fit. The first is complete unless it alone is too long.
fn tail(log: &[u8], most: usize) -> String {
    let cut = log.len().saturating_sub(most);
    let mut rest = &log[cut..];
    if cut > 0
        && let Some(end) = rest.iter().position(|&byte| byte == b'\n')
        && end + 1 < rest.len()
    {
        rest = &rest[end + 1..];
    }
    let text = String::from_utf8_lossy(rest);
    let start = text.ceil_char_boundary(text.len().saturating_sub(most));
    text[start..].trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        build::{BuildError, Failed, Reason},
        request::{RequestError, RequestErrorKind},
    };

    fn failed(reason: Reason) -> Failure {
        (&BuildError::Failed(Box::new(Failed::new(reason, None)))).into()
    }

    #[test]
    fn a_status_has_all_details_and_the_end_of_the_log() {
        let status = status(&failed(Reason::ExitCode(7)), Some("b1"), b"one\ntwo\n");
        assert_eq!(status.code(), Code::Aborted);
        assert!(status.message().starts_with("the build failed: the command exited with status 7"), "{status}");
        assert!(status.message().ends_with("one\ntwo"), "{status}");
        let details = status.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("EXIT_CODE", ERROR_DOMAIN));
        assert_eq!(info.metadata["exit_code"], "7");
        assert_eq!(info.metadata["build_id"], "b1");
        assert_eq!(info.metadata["kind"], "build_failed");
        assert_eq!(details.debug_info().unwrap().detail, "one\ntwo");
        assert_eq!(failure(&status).reason, "exit_code");
        assert_eq!(failure(&status).kind, FailureKind::BuildFailed);
    }

    #[test]
    fn each_kind_has_its_code_and_its_details() {
        let request = |kind| Failure::from(RequestError::new(kind, "outputs[0]", "must be clean"));
        for (kind, code) in [
            (RequestErrorKind::Malformed, Code::InvalidArgument),
            (RequestErrorKind::Invalid, Code::InvalidArgument),
            (RequestErrorKind::Missing, Code::FailedPrecondition),
            (RequestErrorKind::Unsupported, Code::FailedPrecondition),
        ] {
            let status = status(&request(kind), None, b"");
            assert_eq!(status.code(), code);
            let violations = status.get_details_bad_request().unwrap().field_violations;
            assert_eq!(
                (violations[0].field.as_str(), violations[0].description.as_str()),
                ("outputs[0]", "must be clean")
            );
            assert_eq!(failure(&status).fields["field"], "outputs[0]");
        }
        let mut full = Failure::executor("queue_full", "too many builds wait");
        full.fields.insert("retry_after_seconds".to_owned(), 9.into());
        let status = status(&full, None, b"");
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(status.get_details_retry_info().unwrap().retry_delay, Some(Duration::from_secs(9)));
    }

    #[test]
    fn a_status_is_small_for_any_failure() {
        let outputs = vec!["\u{1f980}".repeat(1000); 1000];
        let log = "\u{1f980}\n".repeat(10_000);
        let mut failed = failed(Reason::OutputMissing { outputs, meant: None });
        failed.fields.insert("hint".to_owned(), "\u{1f980}".repeat(1000).into());
        let status = status(&failed, Some("b1"), log.as_bytes());
        // As they go over the wire: base64 and percent-encoding.
        let size = status.details().len() * 4 / 3 + status.message().len() * 3;
        assert!(size < 12 * 1024, "{size}");
        for status in [Status::unavailable("gone"), Status::with_details(Code::Aborted, "odd", vec![0xff].into())] {
            assert_eq!(failure(&status).kind, FailureKind::ExecutorFailed);
            assert_eq!(failure(&status).causes, [status.message()]);
        }
    }

    #[test]
    fn a_tail_begins_with_a_whole_line_where_it_can() {
        assert_eq!(tail(b"one\ntwo\nthree\n", 9), "three");
        assert_eq!(tail(b"one\ntwo\nthree\n", 13), "two\nthree");
        assert_eq!(tail(b"onetwothree", 5), "three");
        assert_eq!(tail(b"\xff", 5), "\u{fffd}");
        assert!(tail(&[0xff; 100], 5).len() <= 5);
    }
}
