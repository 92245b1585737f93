//! `doctor`: what this host can do, what is missing, and how to fix it.

mod checks;

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::{CliError, ClientArgs, print};
use crate::daemon::Config;

const EXAMPLES: &str = "\
Examples:
  cofferdam doctor
  cofferdam doctor --config /etc/cofferdam/daemon.toml
  cofferdam doctor --json | jq .can_build";

/// Shows what this host can do, what is missing, and how to fix it
///
/// Exits with 0 if builds can run here, else with 3. With --json it prints one object: can_build and the list of checks.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct DoctorArgs {
    /// The configuration of the daemon that is to run here
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// The result of one check.
#[derive(Debug)]
struct Check {
    name: &'static str,
    state: State,
    detail: String,
    /// A command or a step, unless the state is [`State::Fine`].
    fix: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Fine,
    /// Builds can run without it.
    Absent,
    /// The host would be safer with it.
    Weak,
    /// Builds need it.
    Missing,
}

impl State {
    fn word(self) -> &'static str {
        match self {
            Self::Fine => "ok",
            Self::Absent => "absent",
            Self::Weak => "weak",
            Self::Missing => "missing",
        }
    }
}

impl DoctorArgs {
    pub(super) fn execute(&self, client: &ClientArgs) -> Result<(), CliError> {
        let config = self.config.as_deref().map_or_else(|| Ok(Config::default()), Config::read)?;
        let checks = checks::all(&client.store, config);
        let can_build = checks.iter().all(|check| check.state != State::Missing);
        if client.json {
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
        Self { name, state: State::Fine, detail: detail.into(), fix: None }
    }

    fn absent(name: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name, state: State::Absent, detail: detail.into(), fix: Some(fix.into()) }
    }

    fn weak(name: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name, state: State::Weak, detail: detail.into(), fix: Some(fix.into()) }
    }

    fn missing(name: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name, state: State::Missing, detail: detail.into(), fix: Some(fix.into()) }
    }

    fn lines(&self) -> String {
        let mut lines = format!("{:<8} {:<19} {}\n", self.state.word(), self.name, self.detail);
        if let Some(fix) = &self.fix {
            lines.push_str(&format!("{:<28} try: {fix}\n", ""));
        }
        lines
    }

    fn json(&self) -> Value {
        json!({ "name": self.name, "state": self.state.word(), "detail": self.detail, "fix": self.fix })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_is_one_line_and_its_fix_another() {
        assert_eq!(Check::fine("kvm", "works").lines(), "ok       kvm                 works\n");
        let lines = Check::missing("guest image", "no kernel", "just image").lines();
        assert_eq!(lines, "missing  guest image         no kernel\n                             try: just image\n");
    }

    #[test]
    fn every_check_has_details_and_a_fix_unless_all_is_well() {
        for check in checks::all(&ClientArgs::default().store, Config::default()) {
            assert!(!check.detail.is_empty() && !check.detail.contains('\n'), "{check:?}");
            assert_eq!(check.state == State::Fine, check.fix.is_none(), "{check:?}");
        }
    }
}
