//! A build's failure in the form that is reported: as text, as JSON, over gRPC and in records.
//!
//! ```text
//!   BuildError ──▶ Failure ──▶ --json, stderr and exit code · gRPC status and details · the build's record
//! ```

use std::{error::Error, fmt::Write as _, io};

use cofferdam_protocol::Usage;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::error::{BuildError, ExecutorError, Failed, Kept, Reason};
use crate::{
    machine::Cause,
    network::RuleMaker,
    request::node_text,
    request::{RequestError, RequestErrorKind},
};

/// Most bytes of one text in a failure.
const MAX_TEXT_BYTES: usize = 32 * 1024;

/// Who has to act on a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The author of the build: it ran and failed.
    BuildFailed,
    /// The client: its request is wrong.
    RequestWrong,
    /// The host's operator; trying again may help. Interruptions count here.
    ExecutorFailed,
}

impl FailureKind {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::BuildFailed, Self::RequestWrong, Self::ExecutorFailed];

    /// A word for machines, stable across versions.
    pub fn word(self) -> &'static str {
        match self {
            Self::BuildFailed => "build_failed",
            Self::RequestWrong => "request_wrong",
            Self::ExecutorFailed => "executor_failed",
        }
    }
}

/// Why a build has no result, for people and for machines.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    /// Who has to act.
    pub kind: FailureKind,
    /// What happened, as a word for machines that is stable across versions.
    pub reason: String,
    /// What happened, as a sentence.
    pub message: String,
    /// The causes, the nearest first.
    pub causes: Vec<String>,
    /// What to do about it.
    pub advice: Option<Box<str>>,
    /// Details of the reason: `exit_code`, `signal`, `limit`, `field` and others, and [`hint`](Self::hint).
    pub fields: Map<String, Value>,
}

impl Failure {
    /// A failure of this host.
    pub fn executor(reason: &str, message: impl Into<String>) -> Self {
        Self {
            kind: FailureKind::ExecutorFailed,
            reason: reason.to_owned(),
            message: shorten(message.into()),
            causes: Vec::new(),
            advice: None,
            fields: Map::new(),
        }
    }

    /// A failure of this host with its cause.
    pub fn executor_because(reason: &str, message: impl Into<String>, error: &(dyn Error + 'static)) -> Self {
        Self { causes: with_causes(error), ..Self::executor(reason, message) }
    }

    /// A wrong request.
    pub fn wrong(reason: &str, message: impl Into<String>) -> Self {
        Self { kind: FailureKind::RequestWrong, ..Self::executor(reason, message) }
    }

    /// A wrong request with its cause.
    pub fn wrong_because(reason: &str, message: impl Into<String>, error: &(dyn Error + 'static)) -> Self {
        Self { causes: with_causes(error), ..Self::wrong(reason, message) }
    }

    /// Adds the causes of an error whose own text is the message.
    #[must_use]
    pub fn caused_by(mut self, error: &(dyn Error + 'static)) -> Self {
        self.causes = causes(error).map(|cause| shorten(cause.to_string())).collect();
        self
    }

    /// Adds advice.
    #[must_use]
    pub fn advised(mut self, text: impl Into<Box<str>>) -> Self {
        self.advice = Some(text.into());
        self
    }

    /// The message and its causes, separated by colons.
    pub fn chain(&self) -> String {
        let mut text = self.message.clone();
        for cause in &self.causes {
            let _ = write!(text, ": {cause}");
        }
        text
    }

    /// The object that `--json` prints.
    pub fn to_json(&self) -> Value {
        json!({ "kind": self.kind.word(), "reason": self.reason, "message": self.chain(), "fields": self.fields })
    }

    /// What else may have brought it about, and what to do about that: a denied connection.
    pub fn hint(&self) -> Option<&str> {
        self.fields.get("hint")?.as_str()
    }

    /// The failure of a build whose network has rules of this maker's.
    pub fn of(error: &BuildError, maker: RuleMaker) -> Self {
        let (kind, reason, fields) = match error {
            BuildError::Failed(failed) => {
                (FailureKind::BuildFailed, failed.reason.code(), failed_fields(failed, maker))
            }
            BuildError::Request(error) => (FailureKind::RequestWrong, error.kind.code(), request_fields(error)),
            BuildError::Executor(error) => (FailureKind::ExecutorFailed, executor_code(error), Map::new()),
        };
        Self {
            kind,
            reason: reason.to_owned(),
            message: shorten(error.to_string()),
            causes: causes(error).map(|cause| shorten(cause.to_string())).collect(),
            advice: advice(error).map(Into::into),
            fields,
        }
    }
}

impl From<&BuildError> for Failure {
    fn from(error: &BuildError) -> Self {
        Self::of(error, RuleMaker::CommandLine)
    }
}

impl From<RequestError> for Failure {
    fn from(error: RequestError) -> Self {
        (&BuildError::Request(error)).into()
    }
}

/// A text, cut at [`MAX_TEXT_BYTES`].
pub(crate) fn shorten(mut text: String) -> String {
    if text.len() > MAX_TEXT_BYTES {
        text.truncate(text.floor_char_boundary(MAX_TEXT_BYTES));
        text.push('…');
    }
    text
}

/// The first of these texts, [`MAX_TEXT_BYTES`] together at most.
fn shortened(texts: &[impl AsRef<str>]) -> Vec<&str> {
    let mut room = MAX_TEXT_BYTES;
    let fits = |text: &&str| room.checked_sub(text.len()).map(|left| room = left).is_some();
    texts.iter().map(AsRef::as_ref).take_while(fits).collect()
}

/// Whether the user's path caused the error, rather than this host.
pub(crate) fn blames_path(error: &io::Error) -> bool {
    use Errno::{EACCES, EEXIST, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM, EROFS};
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(EACCES | EEXIST | EISDIR | ELOOP | ENAMETOOLONG | ENOENT | ENOTDIR | EPERM | EROFS))
}

/// An error and its causes.
fn with_causes(error: &(dyn Error + 'static)) -> Vec<String> {
    std::iter::once(error).chain(causes(error)).map(|cause| shorten(cause.to_string())).collect()
}

/// The causes of an error, the nearest first.
pub(crate) fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(error.source(), |&error| error.source())
}

fn advice(error: &BuildError) -> Option<&'static str> {
    match error {
        BuildError::Failed(failed) => failed.reason.advice(),
        BuildError::Request(error) => match error.kind {
            RequestErrorKind::Missing => Some(
                "import it with `cofferdam import PATH`, or name the store that has it with --blob-service-addr and \
                 --directory-service-addr",
            ),
            RequestErrorKind::Unsupported if error.field.starts_with("limits.") => {
                Some("ask for less, or have the daemon's operator allow more with [build] in its configuration")
            }
            RequestErrorKind::Unsupported if error.field == "constraints.min_memory" => Some(
                "ask for less memory, or for less with --inputs-memory, or have the daemon's operator raise [budget] memory in \
                 its configuration",
            ),
            RequestErrorKind::Unsupported if error.rule.contains("inputs_memory") => {
                Some("allow more with --inputs-memory, or with [build] inputs_memory in the daemon's configuration")
            }
            RequestErrorKind::Unsupported if error.field.starts_with("constraints.available_ro_paths") => {
                Some("have the daemon's operator allow it, with [host_paths] or nested in its configuration")
            }
            _ => None,
        },
        BuildError::Executor(ExecutorError::Interrupted) => None,
        BuildError::Executor(ExecutorError::Died { cause: Cause::Reset, .. }) => {
            Some("--vmm qemu: its serial console shows the kernel's earliest messages, too")
        }
        BuildError::Executor(_) => Some("`cofferdam doctor`, which shows what this host lacks"),
    }
}

fn request_fields(error: &RequestError) -> Map<String, Value> {
    let RequestError { kind: _, field, rule, value } = error;
    object(json!({ "field": field, "rule": rule, "value": value }))
}

fn failed_fields(failed: &Failed, maker: RuleMaker) -> Map<String, Value> {
    let mut fields = object(match &failed.reason {
        Reason::ExitCode(code) => json!({ "exit_code": code }),
        Reason::Signal(signal) => json!({ "signal": signal }),
        Reason::OutOfMemory { memory_bytes } => json!({ "memory_bytes": memory_bytes }),
        Reason::ScratchFull { scratch_bytes } => json!({ "scratch_bytes": scratch_bytes }),
        Reason::TooManyProcesses { allowed } => json!({ "allowed": allowed }),
        Reason::CommandNotFound { command } => json!({ "command": shorten(command.to_owned()) }),
        Reason::CommandNotExecutable { command, errno } => {
            json!({ "command": shorten(command.to_owned()), "errno": errno })
        }
        Reason::InterpreterNotFound { command, interpreter } => {
            json!({ "command": command, "interpreter": interpreter })
        }
        Reason::NoWorkingDir { path, errno } => json!({ "working_dir": path, "errno": errno }),
        Reason::Timeout { limit } | Reason::Silence { limit } => json!({ "limit_seconds": limit.as_secs_f64() }),
        Reason::OutputMissing { outputs, .. } => json!({ "outputs": shortened(outputs) }),
        Reason::OutputUnsupported { output, path, .. } => json!({ "output": output, "path": shorten(path.to_owned()) }),
        Reason::LimitReached { limit, allowed } => json!({ "limit": limit.code(), "allowed": allowed }),
    });
    if let Some(usage) = &failed.usage {
        fields.insert("usage".to_owned(), usage_fields(usage));
    }
    if let Some(hint) = failed.denials.hint(maker) {
        fields.insert("hint".to_owned(), hint.into());
        fields.insert("missing_rules".to_owned(), failed.denials.missing_rules().into());
    }
    if let Some(Kept { node, skipped }) = &failed.kept {
        fields.insert("kept".to_owned(), node_text::format(node).into());
        fields.insert("kept_skipped".to_owned(), (*skipped).into());
    }
    fields
}

/// A build's resource usage as JSON.
pub(crate) fn usage_fields(usage: &Usage) -> Value {
    json!({
        "wall_us": usage.wall_us,
        "user_us": usage.user_us,
        "system_us": usage.system_us,
        "peak_memory_bytes": usage.peak_memory_bytes,
        "scratch_bytes": usage.scratch_bytes,
    })
}

fn executor_code(error: &ExecutorError) -> &'static str {
    match error {
        ExecutorError::Interrupted => "interrupted",
        ExecutorError::NoTerminal => "no_terminal",
        ExecutorError::Died { cause: Cause::Process, .. } => "process_died",
        ExecutorError::Died { cause: Cause::Memory, .. } => "machine_out_of_memory",
        ExecutorError::Died { cause: Cause::Panic, .. } => "guest_panicked",
        ExecutorError::Died { cause: Cause::Reset, .. } => "guest_reset",
        ExecutorError::NeverConnected { .. } => "never_connected",
        ExecutorError::Guest { .. } => "guest",
        ExecutorError::Protocol(_) => "protocol",
        ExecutorError::Vmm(_) => "vmm",
        ExecutorError::Walls(_) => "walls",
        ExecutorError::Device(error) => error.device.code(),
        ExecutorError::Store(_) | ExecutorError::Resolve(_) => "store",
        _ => "host",
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_that_another_path_avoids_blame_the_path() {
        for (errno, blamed) in [
            (Errno::ENOENT, true),
            (Errno::ENOTDIR, true),
            (Errno::EACCES, true),
            (Errno::EROFS, true),
            (Errno::ELOOP, true),
            (Errno::EIO, false),
            (Errno::EMFILE, false),
            (Errno::ENFILE, false),
            (Errno::ENOMEM, false),
            (Errno::ENOSPC, false),
        ] {
            assert_eq!(blames_path(&errno.into()), blamed, "{errno}");
        }
    }

    #[test]
    fn a_build_that_is_too_large_is_not_advised_to_reserve_more() {
        let advised = |field: &str, rule: &str| {
            Failure::from(RequestError::new(RequestErrorKind::Unsupported, field, rule)).advice.unwrap()
        };
        let rule = "must leave the build's machine and inputs_memory within this daemon's [budget] memory";
        assert!(advised("constraints.min_memory", rule).starts_with("ask for less"));
        let rule = "must leave the directories of all inputs within inputs_memory, which is 1 bytes";
        assert!(advised("inputs[0]", rule).starts_with("allow more with --inputs-memory"));
    }
}
