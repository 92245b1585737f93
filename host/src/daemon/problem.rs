//! The problems that keep a daemon from starting. All are reported at once.

use std::error::Error;

use crate::build::failure::{Failure, FailureKind, causes};

/// Where a setting comes from.
#[derive(Debug)]
pub(super) struct Place {
    /// Of the file, if that sets it.
    pub(super) line: Option<usize>,
    /// File, line, key and value as far as there are any.
    pub(super) text: String,
}

/// One thing that is wrong with the configuration, or that this host lacks.
#[derive(Debug, Clone)]
pub(crate) struct Problem {
    kind: FailureKind,
    /// The line of the configuration file, if that sets it.
    line: Option<usize>,
    /// File, line, key, value and the rule that is broken, on one line.
    text: String,
    advice: Option<String>,
}

impl Problem {
    /// The configuration or the command line asks for the impossible.
    pub(super) fn wrong(at: &Place, rule: &str) -> Self {
        Self { kind: FailureKind::RequestWrong, line: at.line, text: format!("{}: {rule}", at.text), advice: None }
    }

    /// This host lacks something that the daemon needs.
    pub(super) fn lacking(at: &Place, what: &str) -> Self {
        Self { kind: FailureKind::ExecutorFailed, ..Self::wrong(at, what) }
    }

    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    pub(crate) fn advice(&self) -> Option<&str> {
        self.advice.as_deref()
    }

    pub(super) fn advise(&mut self, advice: impl Into<String>) {
        self.advice = Some(advice.into());
    }
}

/// All problems as one failure. The host is to blame only if the configuration is right.
pub(super) fn failure(mut problems: Vec<Problem>) -> Failure {
    problems.sort_by_key(|problem| (problem.line.is_none(), problem.line));
    let is_wrong = problems.iter().any(|problem| problem.kind == FailureKind::RequestWrong);
    let head = if is_wrong { "the configuration is wrong" } else { "this host can't run the daemon as configured" };
    let mut text = head.to_owned();
    for Problem { text: problem, advice, .. } in &problems {
        text.push_str("\n  ");
        text.push_str(problem);
        if let Some(advice) = advice {
            text.push_str("\n    try: ");
            text.push_str(advice);
        }
    }
    if is_wrong {
        Failure::wrong("configuration", text).advised("docs/daemon.md describes every setting")
    } else {
        Failure::executor("host", text)
    }
}

/// An error with its causes, on one line.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    for cause in causes(error).map(ToString::to_string) {
        // Libraries wrap errors in others that say the same.
        if !text.ends_with(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text.replace('\n', " ")
}
