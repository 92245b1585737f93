//! Errors of commands, and the one place that reports them: as text on stderr, as JSON on stdout, and as an exit code.

use std::{
    error::Error,
    fmt::Write as _,
    io::{self, IsTerminal, Write as _},
    process::ExitCode,
};

use serde_json::{Map, Value};

use super::{plain_text::PlainText, store::advise_import, transport};
use crate::{
    build::compare,
    build::failure::{Failure, FailureKind, blames_path, causes},
    build::{BuildError, ExecutorError},
    request::{RequestError, RequestErrorKind},
    state::StateError,
};

type Cause = Box<dyn Error + Send>;

/// Who has to act on a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The author of the build: it ran and failed.
    BuildFailed,
    /// The user: the request or the command line is wrong.
    RequestWrong,
    /// The operator of this host; trying again may help. An interruption, too.
    Executor,
}

impl From<FailureKind> for Exit {
    fn from(kind: FailureKind) -> Self {
        match kind {
            FailureKind::BuildFailed => Self::BuildFailed,
            FailureKind::RequestWrong => Self::RequestWrong,
            FailureKind::ExecutorFailed => Self::Executor,
        }
    }
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
}

/// The error of a command.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// A build ended without a result.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// A daemon reported a failure, or can't be reached.
    #[error("{}", failure.message)]
    Daemon {
        /// The failure.
        failure: Box<Failure>,
        /// The daemon's address.
        addr: String,
    },
    /// A failure with all its parts.
    #[error("{}", .0.message)]
    Failure(Box<Failure>),
    /// The command line is wrong.
    #[error("{message}")]
    Wrong {
        /// What is wrong.
        message: String,
        /// The cause.
        #[source]
        source: Option<Cause>,
        /// What to do about it.
        advice: Option<String>,
    },
    /// `doctor` found something missing, and has printed it.
    #[error("no build can run here yet")]
    Unfit,
    /// This host failed.
    #[error("{message}")]
    Failed {
        /// What failed.
        message: String,
        /// The cause.
        #[source]
        source: Option<Cause>,
        /// What to do about it.
        advice: Option<String>,
    },
    /// The command failed after its result was printed; no second object follows on stdout.
    #[error(transparent)]
    AfterResult(Box<CliError>),
    /// An interactive command ended, and this process has its exit code.
    #[error("{failure}")]
    Interactive {
        /// The failure of the build.
        failure: Box<CliError>,
        /// The command's status, or 128 and the signal that killed it.
        code: u8,
    },
}

impl From<RequestError> for CliError {
    fn from(error: RequestError) -> Self {
        Self::Build(BuildError::Request(error))
    }
}

impl From<StateError> for CliError {
    fn from(error: StateError) -> Self {
        let advice = error.advice();
        let message = error.to_string();
        let source = match error {
            StateError::NoPlace | StateError::NotUtf8(_) => None,
            StateError::Relative(source) => Some(Box::new(source) as Cause),
            StateError::Addr(source) => Some(Box::new(source) as Cause),
            StateError::Open(source) => return Self::failed(message, source),
            StateError::OpenLocal(source) => return Self::failed(message, source),
        };
        Self::Wrong { message, source, advice: advice.map(str::to_owned) }
    }
}

impl From<Failure> for CliError {
    fn from(failure: Failure) -> Self {
        Self::Failure(Box::new(failure))
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

    /// Something that this host stores is damaged.
    pub(super) fn damaged(message: impl Into<String>) -> Self {
        Self::Failed { message: message.into(), source: None, advice: None }
    }

    /// An I/O error at a path that the user named.
    pub(super) fn at_path(message: impl Into<String>, source: io::Error) -> Self {
        if blames_path(&source) { Self::wrong_because(message, source) } else { Self::failed(message, source) }
    }

    pub(super) fn interrupted() -> Self {
        Self::Build(BuildError::Executor(ExecutorError::Interrupted))
    }

    /// Replaces the message; the causes stay.
    #[must_use]
    pub(super) fn about(mut self, text: impl Into<String>) -> Self {
        if let Self::Wrong { message, .. } | Self::Failed { message, .. } = &mut self {
            *message = text.into();
        }
        self
    }

    /// Adds advice.
    #[must_use]
    pub(super) fn try_this(mut self, text: impl Into<String>) -> Self {
        if let Self::Wrong { advice, .. } | Self::Failed { advice, .. } = &mut self {
            *advice = Some(text.into());
        }
        self
    }

    /// Adds a hint to the failure of a build that has none.
    #[must_use]
    pub(super) fn hint(self, text: &str) -> Self {
        let mut failure = self.failure();
        if failure.kind != FailureKind::BuildFailed || failure.hint().is_some() {
            return self;
        }
        failure.fields.insert("hint".to_owned(), text.into());
        match self {
            Self::Daemon { addr, .. } => Self::Daemon { failure: Box::new(failure), addr },
            _ => failure.into(),
        }
    }

    /// The same failure, of an interactive build: if its command ended, this process ends likewise.
    pub(super) fn of_interactive(self) -> Self {
        let fields = self.failure().fields;
        let number = |name: &str| u8::try_from(fields.get(name)?.as_u64()?).ok();
        match number("exit_code").or_else(|| number("signal")?.checked_add(128)) {
            Some(code) => Self::Interactive { failure: Box::new(self), code },
            None => self,
        }
    }

    /// Who has to act.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Build(BuildError::Failed(_)) => Exit::BuildFailed,
            Self::Build(BuildError::Request(_)) | Self::Wrong { .. } => Exit::RequestWrong,
            Self::Build(BuildError::Executor(_)) | Self::Failed { .. } | Self::Unfit => Exit::Executor,
            Self::Daemon { failure, .. } | Self::Failure(failure) => failure.kind.into(),
            Self::AfterResult(error) | Self::Interactive { failure: error, .. } => error.exit(),
        }
    }

    /// The process's exit code.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Interactive { code, .. } => (*code).into(),
            _ => self.exit().code().into(),
        }
    }

    /// Reports it on stderr, and with `json` on stdout, too.
    pub fn report(&self, json: bool) {
        match self {
            Self::Unfit => return,
            Self::AfterResult(error) => return error.report(false),
            // A person has seen how a command ended that exited by itself.
            Self::Interactive { failure, .. } if failure.failure().reason == "exit_code" => {
                if json {
                    self.report_json();
                }
                return;
            }
            _ => {}
        }
        let mut stderr = io::stderr();
        let mut text = self.text();
        if stderr.is_terminal() {
            // File names can contain control sequences, too.
            text = PlainText::default().filter(text.as_bytes());
        }
        // If stderr is gone, there is nowhere to report that.
        let _ = stderr.write_all(text.as_bytes());
        if json {
            self.report_json();
        }
    }

    /// Reports it on stdout as JSON.
    pub(super) fn report_json(&self) {
        let _ = super::print(&format!("{}\n", self.json()));
    }

    /// The failure to report. For a command other than a build, its kind follows the exit code.
    pub(super) fn failure(&self) -> Failure {
        if let Self::Failed { source: Some(source), .. } = self
            && let Some(failure) = transport::failure_of_store(&**source)
        {
            return Failure { message: self.to_string(), causes: vec![failure.message.clone()], ..failure };
        }
        let (kind, reason, advice) = match self {
            Self::Build(error) => return error.into(),
            // The daemon doesn't know the address by which this client reaches it.
            Self::Daemon { failure, addr } if failure.reason == RequestErrorKind::Missing.code() => {
                return failure.as_ref().clone().advised(advise_import(addr));
            }
            Self::Daemon { failure, .. } | Self::Failure(failure) => return failure.as_ref().clone(),
            Self::AfterResult(error) | Self::Interactive { failure: error, .. } => return error.failure(),
            Self::Wrong { advice, .. } => (FailureKind::RequestWrong, "command_line", advice),
            Self::Failed { advice, .. } => (FailureKind::ExecutorFailed, "host", advice),
            Self::Unfit => (FailureKind::ExecutorFailed, "host", &None),
        };
        Failure {
            kind,
            reason: reason.to_owned(),
            message: self.to_string(),
            causes: causes(self).map(ToString::to_string).collect(),
            advice: advice.as_deref().map(Into::into),
            fields: Map::new(),
        }
    }

    /// The error, its causes and the advice, each on a line.
    fn text(&self) -> String {
        let Failure { reason, message, causes, advice, fields, .. } = self.failure();
        if reason == "interrupted" {
            return "error: interrupted\n".to_owned();
        }
        let mut text = format!("error: {message}\n");
        // Libraries wrap errors in others with the same text.
        for (at, cause) in causes.iter().enumerate() {
            if !causes[..at].contains(cause) {
                let _ = writeln!(text, "  caused by: {cause}");
            }
        }
        if let Some(advice) = advice {
            let _ = writeln!(text, "  try: {advice}");
        }
        if let Some(hint) = fields.get("hint").and_then(Value::as_str) {
            let _ = writeln!(text, "  hint: {hint}");
        }
        for difference in fields.get("differences").and_then(Value::as_array).into_iter().flatten() {
            for line in compare::lines(difference).unwrap_or_default() {
                let _ = writeln!(text, "  {line}");
            }
        }
        if let Some(more @ 1..) = fields.get("more_differences").and_then(Value::as_u64) {
            let _ = writeln!(text, "  and {more} more");
        }
        for output in fields.get("outputs").and_then(Value::as_array).into_iter().flatten() {
            if let [Some(path), Some(earlier), Some(later)] =
                ["path", "earlier", "later"].map(|key| output.get(key).and_then(Value::as_str))
            {
                let _ = writeln!(text, "  {path}: {earlier} before, {later} now");
            }
        }
        if let Some(node) = fields.get("kept").and_then(Value::as_str) {
            let skipped = fields.get("kept_skipped").and_then(Value::as_u64).unwrap_or(0);
            let without = if skipped == 0 { String::new() } else { format!(", {skipped} left out") };
            let _ = writeln!(text, "  kept: {node}{without}");
            let store = match self {
                Self::Daemon { addr, .. } => format!(" --blob-service-addr {addr} --directory-service-addr {addr}"),
                _ => String::new(),
            };
            let _ = writeln!(text, "  try: cofferdam{store} export {node} ./failed");
        }
        text
    }

    fn json(&self) -> Value {
        self.failure().to_json()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::{Failed, Reason};

    fn failed(reason: Reason) -> CliError {
        BuildError::Failed(Box::new(Failed::new(reason, None))).into()
    }

    #[test]
    fn the_chain_is_printed_line_by_line_with_advice_last() {
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
    fn the_chain_says_nothing_twice() {
        #[derive(Debug, thiserror::Error)]
        #[error("refused")]
        struct Refused(#[source] Option<Box<Self>>);
        let error = CliError::failed("can't connect", Refused(Some(Refused(None).into())));
        assert_eq!(error.text(), "error: can't connect\n  caused by: refused\n");
    }

    #[test]
    fn failures_of_a_build_are_distinguished() {
        let error = failed(Reason::ExitCode(7));
        assert_eq!(error.exit().code(), 1);
        assert_eq!(
            error.json().to_string(),
            r#"{"fields":{"exit_code":7},"kind":"build_failed","message":"the build failed: the command exited with status 7","reason":"exit_code"}"#
        );
        let error = failed(Reason::OutputMissing { outputs: vec!["build/out".into()], meant: None });
        assert_eq!(error.json()["fields"]["outputs"][0], "build/out");
        assert_eq!(error.json()["reason"], "output_missing");
    }

    #[test]
    fn the_advice_for_a_missing_input_names_the_daemon() {
        let error = RequestError::new(RequestErrorKind::Missing, "inputs[0]", "must be in the store").got("blake3-");
        let failure = Box::new(Failure::from(error));
        let error = CliError::Daemon { failure, addr: "grpc+unix:///socket".to_owned() };
        let advice = "  try: import it with `cofferdam import --daemon grpc+unix:///socket PATH`\n";
        assert!(error.text().ends_with(advice), "{}", error.text());
    }

    #[test]
    fn failures_after_the_result_keep_their_exit_code() {
        for (error, code) in [(CliError::wrong("w"), 2), (CliError::interrupted(), 3)] {
            assert_eq!(CliError::AfterResult(Box::new(error)).exit().code(), code);
        }
    }

    #[test]
    fn an_interactive_command_gives_its_status() {
        let status = |reason| format!("{:?}", failed(reason).of_interactive().exit_code());
        let code = |code: u8| format!("{:?}", ExitCode::from(code));
        assert_eq!(status(Reason::ExitCode(7)), code(7));
        assert_eq!(status(Reason::Signal(9)), code(137));
        assert_eq!(status(Reason::Silence { limit: std::time::Duration::ZERO }), code(1));
        assert_eq!(format!("{:?}", CliError::interrupted().of_interactive().exit_code()), code(3));
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
