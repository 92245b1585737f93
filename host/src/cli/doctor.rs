//! `doctor`: what this host can do, what is missing, and the command that mends it.

mod checks;

use clap::Args;
use serde_json::{Value, json};

use super::{CliError, StoreArgs, print};

const EXAMPLES: &str = "\
Examples:
  cofferdam doctor
  cofferdam doctor --json | jq .can_build";

/// Tells what this host can do, what is missing, and the command that mends it
///
/// Exits with 0 if a build can run here, else with 3.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct DoctorArgs {
    /// Print one JSON object: can_build and the list of checks
    #[arg(long)]
    json: bool,
}

/// One thing that was looked at.
#[derive(Debug)]
struct Check {
    name: &'static str,
    state: State,
    /// What was found.
    detail: String,
    /// The command or the step that mends it; where nothing is wrong, nothing.
    mend: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// As it should be.
    Fine,
    /// Not here, and builds can run without it.
    Absent,
    /// Not here, and builds need it.
    Missing,
}

impl State {
    fn word(self) -> &'static str {
        match self {
            Self::Fine => "ok",
            Self::Absent => "absent",
            Self::Missing => "missing",
        }
    }
}

impl DoctorArgs {
    pub(super) fn execute(&self, store: &StoreArgs) -> Result<(), CliError> {
        let checks = checks::all(store);
        let can_build = checks.iter().all(|check| check.state != State::Missing);
        if self.json {
            let checks: Vec<_> = checks.iter().map(Check::json).collect();
            print(&format!("{}\n", json!({ "can_build": can_build, "checks": checks })))?;
        } else {
            let lines: String = checks.iter().map(Check::lines).collect();
            let verdict = if can_build { "builds can run here" } else { "no build can run here yet" };
            print(&format!("{lines}\n{verdict}\n"))?;
        }
        if can_build { Ok(()) } else { Err(CliError::Unfit) }
    }
}

impl Check {
    fn fine(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, state: State::Fine, detail: detail.into(), mend: None }
    }

    fn absent(name: &'static str, detail: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { name, state: State::Absent, detail: detail.into(), mend: Some(mend.into()) }
    }

    fn missing(name: &'static str, detail: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { name, state: State::Missing, detail: detail.into(), mend: Some(mend.into()) }
    }

    fn lines(&self) -> String {
        let mut lines = format!("{:<8} {:<19} {}\n", self.state.word(), self.name, self.detail);
        if let Some(mend) = &self.mend {
            lines.push_str(&format!("{:<28} try: {mend}\n", ""));
        }
        lines
    }

    fn json(&self) -> Value {
        json!({ "name": self.name, "state": self.state.word(), "detail": self.detail, "mend": self.mend })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_is_one_line_and_one_more_when_something_mends_it() {
        assert_eq!(Check::fine("kvm", "works").lines(), "ok       kvm                 works\n");
        let lines = Check::missing("guest image", "no kernel", "just image").lines();
        assert_eq!(lines, "missing  guest image         no kernel\n                             try: just image\n");
    }

    #[test]
    fn every_check_says_what_it_found() {
        for check in checks::all(&StoreArgs::default()) {
            assert!(!check.detail.is_empty() && !check.detail.contains('\n'), "{check:?}");
            assert_eq!(check.state == State::Fine, check.mend.is_none(), "{check:?}");
        }
    }
}
