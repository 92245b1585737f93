//! Runs other programs. Their standard output is returned; their standard error goes into the error.

use std::io;
use std::process::{Command, ExitStatus};

/// How much of the end of a program's standard error an error shows, in bytes.
const MAX_STDERR_BYTES: usize = 4096;

/// A program could not be started, or failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The program could not be started.
    #[error("could not start {program}; images/setup.sh installs all programs that are needed")]
    NotStarted {
        /// The program's name.
        program: String,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The program failed.
    #[error("{program} failed ({status}):\n{stderr}")]
    Failed {
        /// The program and its arguments.
        program: String,
        /// Its exit status.
        status: ExitStatus,
        /// The end of its standard error.
        stderr: String,
    },
}

/// Runs a program, and returns its standard output.
pub(crate) fn output(command: &mut Command) -> Result<Vec<u8>, CommandError> {
    let output = match command.output() {
        Ok(output) => output,
        Err(source) => return Err(CommandError::NotStarted { program: command_name(command), source }),
    };
    if output.status.success() {
        return Ok(output.stdout);
    }
    let stderr = &output.stderr[output.stderr.len().saturating_sub(MAX_STDERR_BYTES)..];
    let stderr = String::from_utf8_lossy(stderr).trim().to_owned();
    Err(CommandError::Failed { program: command_line(command), status: output.status, stderr })
}

/// Runs a program, and returns its standard output as text.
pub(crate) fn text(command: &mut Command) -> Result<String, CommandError> {
    Ok(String::from_utf8_lossy(&output(command)?).into_owned())
}

fn command_name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

fn command_line(command: &Command) -> String {
    let mut line = command_name(command);
    for argument in command.get_args() {
        line.push(' ');
        line.push_str(&argument.to_string_lossy());
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_command_and_shows_its_standard_error() {
        let error = output(Command::new("sh").args(["-c", "echo no good >&2; exit 3"])).unwrap_err();
        assert_eq!(error.to_string(), "sh -c echo no good >&2; exit 3 failed (exit status: 3):\nno good");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = output(&mut Command::new("cofferdam-no-such-program")).unwrap_err();
        assert!(error.to_string().starts_with("could not start cofferdam-no-such-program"), "{error}");
    }
}
