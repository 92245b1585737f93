//! Runs one build inside one microVM: parse, run, exit code.

use std::{env, io::IsTerminal, process::ExitCode};

use cofferdam::cli::Cli;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = match Cli::from_arguments() {
        Ok(cli) => cli,
        Err(exit_code) => return exit_code,
    };
    log_to_stderr(if cli.quiet() { "error" } else { "warn" });
    let json = cli.json();
    match cli.execute() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error.report(json);
            error.exit_code()
        }
    }
}

fn log_to_stderr(default: &str) {
    let filter = EnvFilter::try_from_env("COFFERDAM_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if env::var_os("COFFERDAM_LOG_FORMAT").is_some_and(|format| format == "json") {
        log.json().flatten_event(true).init();
    } else {
        log.with_ansi(std::io::stderr().is_terminal()).init();
    }
}
