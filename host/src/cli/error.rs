//! What goes wrong, told in one place: to people on stderr, to programs as JSON and as an exit code.

use std::{
    error::Error,
    fmt::Write as _,
    io::{self, IsTerminal, Write as _},
    process::ExitCode,
};

use nix::errno::Errno;
use serde_json::{Map, Value, json};

use super::plain_text::PlainText;
use crate::{
    build::{BuildError, ExecutorError, Failed, Reason},
    request::{RequestError, RequestErrorKind},
    vmm,
};

type Cause = Box<dyn Error + Send>;

/// Whom a failure asks to act.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Whoever wrote the build: it ran and failed.
    BuildFailed,
    /// Whoever asked: the request or the command line is wrong.
    RequestWrong,
    /// Whoever runs this host; trying again may help. An interruption, too.
    Executor,
}

impl Exit {
    /// The process's exit code.
    pub fn code(self) -> u8 {
        match self {
            Self::BuildFailed => 1,
            Self::RequestWrong => 2,
            Self::Executor => 3,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::BuildFailed => "build_failed",
            Self::RequestWrong => "request_wrong",
            Self::Executor => "executor_failed",
        }
    }
}

/// A failed command.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// A build ended without a result.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The command line asks for what can't be.
    #[error("{message}")]
    Wrong {
        /// What is wrong.
        message: String,
        /// What makes it so.
        #[source]
        source: Option<Cause>,
        /// What to do about it.
        advice: Option<String>,
    },
    /// Doctor has told all there is to tell.
    #[error("no build can run here yet")]
    Unfit,
    /// This host could not do it.
    #[error("{message}")]
    Failed {
        /// What failed.
        message: String,
        /// Why.
        #[source]
        source: Option<Cause>,
        /// What to do about it.
        advice: Option<String>,
    },
    /// It failed when a build's result was on stdout already, which has room for one object only.
    #[error(transparent)]
    AfterResult(Box<CliError>),
}

impl From<RequestError> for CliError {
    fn from(error: RequestError) -> Self {
        Self::Build(BuildError::Request(error))
    }
}

impl From<&clap::Error> for CliError {
    fn from(error: &clap::Error) -> Self {
        let text = error.to_string();
        Self::wrong(text.lines().next().unwrap_or_default().trim_start_matches("error: "))
    }
}

impl CliError {
    pub(super) fn wrong(message: impl Into<String>) -> Self {
        Self::Wrong { message: message.into(), source: None, advice: None }
    }

    pub(super) fn wrong_because(message: impl Into<String>, source: impl Error + Send + 'static) -> Self {
        Self::Wrong { message: message.into(), source: Some(Box::new(source)), advice: None }
    }

    pub(super) fn failed(message: impl Into<String>, source: impl Error + Send + 'static) -> Self {
        Self::Failed { message: message.into(), source: Some(Box::new(source)), advice: None }
    }

    /// What was to be done at a path that the user has named.
    pub(super) fn at_path(message: impl Into<String>, source: io::Error) -> Self {
        if blames_path(&source) { Self::wrong_because(message, source) } else { Self::failed(message, source) }
    }

    pub(super) fn interrupted() -> Self {
        Self::Build(BuildError::Executor(ExecutorError::Interrupted))
    }

    /// Says it in terms of the command; the causes stay.
    #[must_use]
    pub(super) fn about(mut self, text: impl Into<String>) -> Self {
        if let Self::Wrong { message, .. } | Self::Failed { message, .. } = &mut self {
            *message = text.into();
        }
        self
    }

    /// Adds what to do about it.
    #[must_use]
    pub(super) fn try_this(mut self, text: impl Into<String>) -> Self {
        if let Self::Wrong { advice, .. } | Self::Failed { advice, .. } = &mut self {
            *advice = Some(text.into());
        }
        self
    }

    /// Whom it asks to act.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Build(BuildError::Failed(_)) => Exit::BuildFailed,
            Self::Build(BuildError::Request(_)) | Self::Wrong { .. } => Exit::RequestWrong,
            Self::Build(BuildError::Executor(_)) | Self::Failed { .. } | Self::Unfit => Exit::Executor,
            Self::AfterResult(error) => error.exit(),
        }
    }

    /// The process's exit code.
    pub fn exit_code(&self) -> ExitCode {
        self.exit().code().into()
    }

    /// Tells it: on stderr, and with `json` on stdout, too.
    pub fn report(&self, json: bool) {
        match self {
            Self::Unfit => return,
            Self::AfterResult(error) => return error.report(false),
            _ => {}
        }
        let mut stderr = io::stderr();
        let mut text = self.text();
        if stderr.is_terminal() {
            // Names of files can hold what controls a terminal, too.
            text = PlainText::default().filter(text.as_bytes());
        }
        // Nobody is left to tell when this fails.
        let _ = stderr.write_all(text.as_bytes());
        if json {
            self.report_json();
        }
    }

    /// Tells it to a program, on stdout.
    pub(super) fn report_json(&self) {
        let _ = super::print(&format!("{}\n", self.json()));
    }

    fn advice(&self) -> Option<&str> {
        match self {
            Self::Wrong { advice, .. } | Self::Failed { advice, .. } => advice.as_deref(),
            Self::Build(BuildError::Failed(failed)) => failed.reason.advice(),
            Self::Build(BuildError::Request(error)) => match error.kind {
                RequestErrorKind::Missing => Some(
                    "import it with `cofferdam import`, or name the store that has it with --blob-service-addr and \
                     --directory-service-addr",
                ),
                _ => None,
            },
            Self::Build(BuildError::Executor(ExecutorError::Interrupted)) | Self::Unfit => None,
            Self::Build(BuildError::Executor(ExecutorError::Died { cause: vmm::Cause::Reset, .. })) => {
                Some("--vmm qemu, whose serial console shows what a kernel says before its drivers are up, too")
            }
            Self::Build(BuildError::Executor(_)) => Some("`cofferdam doctor` tells what this host lacks, if anything"),
            Self::AfterResult(error) => error.advice(),
        }
    }

    /// The error, its causes, each on a line, and what to try.
    fn text(&self) -> String {
        if let Self::Build(BuildError::Executor(ExecutorError::Interrupted)) = self {
            return "error: interrupted\n".to_owned();
        }
        let mut text = format!("error: {self}\n");
        for cause in causes(self) {
            let _ = writeln!(text, "  caused by: {cause}");
        }
        if let Some(advice) = self.advice() {
            let _ = writeln!(text, "  try: {advice}");
        }
        text
    }

    fn json(&self) -> Value {
        let (reason, fields) = match self {
            Self::Build(BuildError::Failed(failed)) => (failed.reason.code(), failed_fields(failed)),
            Self::Build(BuildError::Request(error)) => (error.kind.code(), request_fields(error)),
            Self::Build(BuildError::Executor(error)) => (executor_code(error), Map::new()),
            Self::Wrong { .. } => ("command_line", Map::new()),
            Self::Failed { .. } | Self::Unfit => ("host", Map::new()),
            Self::AfterResult(error) => return error.json(),
        };
        let mut message = self.to_string();
        for cause in causes(self) {
            let _ = write!(message, ": {cause}");
        }
        json!({ "kind": self.exit().word(), "reason": reason, "message": message, "fields": fields })
    }
}

/// The causes of an error, from its own to the first.
pub(super) fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(error.source(), |&error| error.source())
}

/// Whether it is the path that was asked for which can't be, and not this host that is in trouble.
pub(super) fn blames_path(error: &io::Error) -> bool {
    use Errno::{EACCES, EEXIST, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM, EROFS};
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(EACCES | EEXIST | EISDIR | ELOOP | ENAMETOOLONG | ENOENT | ENOTDIR | EPERM | EROFS))
}

fn request_fields(error: &RequestError) -> Map<String, Value> {
    let RequestError { kind: _, field, rule, value } = error;
    object(json!({ "field": field, "rule": rule, "value": value }))
}

fn failed_fields(failed: &Failed) -> Map<String, Value> {
    let mut fields = object(match &failed.reason {
        Reason::ExitCode(code) => json!({ "exit_code": code }),
        Reason::Signal(signal) => json!({ "signal": signal }),
        Reason::OutOfMemory { memory_bytes } => json!({ "memory_bytes": memory_bytes }),
        Reason::ScratchFull { scratch_bytes } => json!({ "scratch_bytes": scratch_bytes }),
        Reason::CommandNotFound { command } => json!({ "command": command }),
        Reason::CommandNotExecutable { command, errno } => json!({ "command": command, "errno": errno }),
        Reason::NoWorkingDir { path, errno } => json!({ "working_dir": path, "errno": errno }),
        Reason::Timeout { limit } => json!({ "limit_seconds": limit.as_secs_f64() }),
        Reason::OutputMissing { outputs } => json!({ "outputs": outputs }),
        Reason::OutputUnsupported { output, path, .. } => json!({ "output": output, "path": path }),
        Reason::LimitReached { limit, allowed } => json!({ "limit": limit.code(), "allowed": allowed }),
    });
    if let Some(usage) = &failed.usage {
        let usage = json!({
            "wall_us": usage.wall_us,
            "user_us": usage.user_us,
            "system_us": usage.system_us,
            "peak_memory_bytes": usage.peak_memory_bytes,
            "scratch_bytes": usage.scratch_bytes,
        });
        fields.insert("usage".to_owned(), usage);
    }
    fields
}

fn executor_code(error: &ExecutorError) -> &'static str {
    match error {
        ExecutorError::Interrupted => "interrupted",
        ExecutorError::Died { cause: vmm::Cause::Process, .. } => "process_died",
        ExecutorError::Died { cause: vmm::Cause::Panic, .. } => "guest_panicked",
        ExecutorError::Died { cause: vmm::Cause::Reset, .. } => "guest_reset",
        ExecutorError::NeverConnected { .. } => "never_connected",
        ExecutorError::Guest { .. } => "guest",
        ExecutorError::Protocol(_) => "protocol",
        ExecutorError::Vmm(_) => "vmm",
        ExecutorError::InputsDevice(_) => "inputs_device",
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

    fn failed(reason: Reason) -> CliError {
        BuildError::Failed(Box::new(Failed { reason, usage: None })).into()
    }

    #[test]
    fn the_chain_is_told_line_by_line_with_advice_at_its_end() {
        let error = CliError::failed("can't open the store", io::Error::other("disk on fire")).try_this("water");
        assert_eq!(error.text(), "error: can't open the store\n  caused by: disk on fire\n  try: water\n");
        assert_eq!(error.exit().code(), 3);
        let error = CliError::from(RequestError::new(RequestErrorKind::Invalid, "outputs[0]", "must not be empty"));
        assert_eq!(error.text(), "error: the request is wrong\n  caused by: outputs[0] must not be empty\n");
        assert_eq!(error.exit().code(), 2);
        assert_eq!(CliError::interrupted().text(), "error: interrupted\n");
        assert_eq!(CliError::interrupted().exit().code(), 3);
    }

    #[test]
    fn failures_of_a_build_are_told_apart() {
        let error = failed(Reason::ExitCode(7));
        assert_eq!(error.exit().code(), 1);
        assert_eq!(
            error.json().to_string(),
            r#"{"fields":{"exit_code":7},"kind":"build_failed","message":"the build failed: the command exited with status 7","reason":"exit_code"}"#
        );
        let error = failed(Reason::OutputMissing { outputs: vec!["build/out".into()] });
        assert_eq!(error.json()["fields"]["outputs"][0], "build/out");
        assert_eq!(error.json()["reason"], "output_missing");
    }

    #[test]
    fn what_fails_after_the_result_asks_the_same_people_to_act() {
        for (error, code) in [(CliError::wrong("w"), 2), (CliError::interrupted(), 3)] {
            assert_eq!(CliError::AfterResult(Box::new(error)).exit().code(), code);
        }
    }

    #[test]
    fn a_path_is_to_blame_for_what_another_path_mends() {
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
    fn a_wrong_request_names_its_field_in_json() {
        let error = RequestError::new(RequestErrorKind::Missing, "inputs[0]", "must be in the store").got("blake3-");
        let json = CliError::from(error).json();
        assert_eq!(json["kind"], "request_wrong");
        assert_eq!(json["reason"], "missing");
        assert_eq!(json["fields"]["field"], "inputs[0]");
    }
}
