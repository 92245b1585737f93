//! Other programs, run to their end: what they print is returned, what they complain about goes into the error.

use std::io;
use std::process::{Command, ExitStatus};

/// Most of a program's complaint that an error repeats, in bytes from its end.
const SAID_BYTES: usize = 4096;

/// A program that did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It could not be started.
    #[error("could not start {program}; images/setup.sh installs what is needed")]
    NotStarted {
        /// The program's name.
        program: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It ran and failed.
    #[error("{program} failed ({status}):\n{said}")]
    Failed {
        /// The program and its arguments.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of its standard error.
        said: String,
    },
}

/// Runs to the end and returns standard output.
pub(crate) fn output(command: &mut Command) -> Result<Vec<u8>, CommandError> {
    let output = match command.output() {
        Ok(output) => output,
        Err(source) => return Err(CommandError::NotStarted { program: command_name(command), source }),
    };
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = &output.stderr[output.stderr.len().saturating_sub(SAID_BYTES)..];
    let said = String::from_utf8_lossy(said).trim().to_owned();
    Err(CommandError::Failed { program: command_line(command), status: output.status, said })
}

/// Runs to the end and returns standard output as text.
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
    fn a_failure_names_the_command_and_repeats_its_complaint() {
        let error = output(Command::new("sh").args(["-c", "echo no good >&2; exit 3"])).unwrap_err();
        assert_eq!(error.to_string(), "sh -c echo no good >&2; exit 3 failed (exit status: 3):\nno good");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = output(&mut Command::new("cofferdam-no-such-program")).unwrap_err();
        assert!(error.to_string().starts_with("could not start cofferdam-no-such-program"), "{error}");
    }
}
