//! The host's side of the conversation with one guest, on a thread of its own.
//!
//! ```text
//!   hello ──▶ running ──▶ outputs ──▶ done
//!     │          │           │
//!     │          └───────────┴──▶ the build has failed ──▶ its remains and a shell, if requested
//!     │          │           │
//!     └──────────┴───────────┴──▶ an error, after which the guest is killed
//! ```
//!
//! The guest may have been taken over, so nothing that it sends is trusted. Frames are bounded before they are read, and a
//! message that doesn't fit the state ends the session.

use std::{
    io,
    net::Shutdown,
    time::{Duration, Instant, SystemTime},
};

use cofferdam_castore::refscan::ReferencePattern;
use cofferdam_protocol::{
    self as protocol, End, FromGuest, FromHost, MAX_DETAIL_BYTES, Report, SetupFailure, Specification, Step,
    UnsupportedKind, Usage, VERSION, frame::FrameError,
};
use nix::errno::Errno;

use super::{
    ending::{Claim, Party},
    error::{BuildError, ExecutorError, Failed, Limit, ProtocolError, Reason},
    exchange::{Exchange, failed, frame, next, out_of_place, protocol, receive_failed},
    line::Reader,
    phase::Phase,
    shell::{Screen, plain},
    terminal::Terminal,
};
use crate::{
    machine::jail::one_line,
    outputs::Receiver,
    request::{BuildOutput, BuildResult, RequestError, RequestErrorKind},
};

/// Time for the other side of a broken connection to report a reason.
pub(super) const AFTERMATH: Duration = Duration::from_secs(2);

/// How long a guest may say nothing, and take nothing of what the host says. It tells each second how its command fares. Only while
/// it has a shell may it say nothing for longer.
pub(super) const SILENCE: Duration = Duration::from_secs(300);

/// What a session ends with.
pub(super) type Outcome = Result<(BuildResult, Usage), BuildError>;

/// Least time between two samples. Samples that arrive sooner are dropped.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(500);

/// One conversation with a guest.
pub(super) struct Session<'a> {
    pub(super) exchange: Exchange<'a>,
    pub(super) specification: Specification,
    pub(super) needles: &'a ReferencePattern,
    pub(super) memory_bytes: u64,
    /// Whether the guest has said its hello before: it waited for a request.
    pub(super) is_greeted: bool,
    /// See [`SILENCE`].
    pub(super) silence: Duration,
}

impl Session<'_> {
    /// Talks to the guest until the build's end. A result is durable when this returns.
    pub(super) fn converse(self) -> Outcome {
        let line = self.exchange.line;
        let outcome = line
            .limit_waits(Some(self.silence))
            .map_err(frame)
            .and_then(|()| self.until_last_message())
            .map_err(|error| self.explained(error));
        // The guest has nothing more to say. It may have gone, or stopped reading.
        let _ = line.stream().set_write_timeout(Some(AFTERMATH));
        let _ = line.say(&FromHost::Acknowledge);
        let _ = line.stream().shutdown(Shutdown::Write);
        outcome
    }

    /// A guest that let the host wait for too long.
    fn explained(&self, error: BuildError) -> BuildError {
        match error {
            BuildError::Executor(ExecutorError::Protocol(ProtocolError::Frame(FrameError::Io(error))))
                if error.kind() == io::ErrorKind::WouldBlock =>
            {
                protocol(ProtocolError::Unresponsive { limit: self.silence })
            }
            error => error,
        }
    }

    fn until_last_message(&self) -> Outcome {
        let Exchange { line, progress, options, .. } = self.exchange;
        let mut reader = line.reader();
        if !self.is_greeted {
            hello(&mut reader)?;
        }
        let terminal = match options.interactive {
            true => Some(progress.terminal(None).ok_or(BuildError::Executor(ExecutorError::NoTerminal))?),
            false => None,
        };
        progress.enter(Phase::Running);
        let mut specification = Specification { unix_time_ns: unix_time_ns(), ..self.specification.clone() };
        let Some(Terminal { kind, size, input, output }) = terminal else {
            line.say(&FromHost::Specification(specification)).map_err(frame)?;
            return self.follow(&mut reader, None);
        };
        specification.terminal = Some(protocol::Terminal { term: plain(kind), size });
        line.say(&FromHost::Specification(specification)).map_err(frame)?;
        self.exchange.interact(input, Screen::new(output), |screen| self.follow(&mut reader, Some(screen)))
    }

    /// From the command's start to the outcome.
    fn follow(&self, reader: &mut Reader<'_>, screen: Option<Screen>) -> Outcome {
        let Exchange { progress, ending, .. } = self.exchange;
        let report = self.run(reader, screen)?;
        if let Some(reason) = ending.stopping().map(|(_, reason)| reason).or_else(|| self.reason(&report)) {
            let failed = Failed::new(reason, Some(report.usage));
            // If the command succeeded while it was being stopped, its guest sends outputs, and can't keep remains.
            return Err(match report.succeeded() {
                true => BuildError::Failed(Box::new(failed)),
                false => self.exchange.look_after(failed, reader),
            });
        }
        progress.enter(Phase::Ingesting);
        match self.receive(reader, report.usage) {
            Ok(outputs) => Ok((BuildResult { outputs }, report.usage)),
            // At a limit on outputs the guest is still sending.
            Err(BuildError::Failed(failed)) if !matches!(failed.reason, Reason::LimitReached { .. }) => {
                Err(self.exchange.look_after(*failed, reader))
            }
            Err(error) => Err(error),
        }
    }

    /// Passes the log or the terminal's output on until the command has ended.
    fn run(&self, reader: &mut Reader<'_>, screen: Option<Screen>) -> Result<Report, BuildError> {
        let Exchange { line, progress, options, .. } = self.exchange;
        let mut logged = 0_u64;
        let mut sampled: Option<Instant> = None;
        loop {
            match next(reader)? {
                FromGuest::Output(bytes) if let Some(screen) = &screen => self.exchange.show(screen, bytes)?,
                FromGuest::Log([]) => return Err(protocol(ProtocolError::EmptyLog)),
                FromGuest::Log(bytes) if screen.is_none() => {
                    logged = logged.saturating_add(bytes.len() as u64);
                    if logged <= options.limits.log_bytes {
                        progress.log(bytes);
                        continue;
                    }
                    let reason = Reason::LimitReached { limit: Limit::LogBytes, allowed: options.limits.log_bytes };
                    if !options.needs_failed_guest() {
                        return Err(failed(reason, None));
                    }
                    if progress.stop(reason) {
                        line.say(&FromHost::Stop).map_err(frame)?;
                    }
                }
                FromGuest::Sample(sample) => {
                    if sampled.is_none_or(|at| at.elapsed() >= SAMPLE_INTERVAL) {
                        tracing::debug!(?sample);
                        progress.sample(&sample);
                        sampled = Some(Instant::now());
                    }
                }
                FromGuest::Exited(report) => {
                    if let End::NoInterpreter(interpreter) = &report.end {
                        check_length("the name of an interpreter", interpreter.as_bytes())?;
                    }
                    if let Some(screen) = screen {
                        screen.close();
                    }
                    return Ok(report);
                }
                FromGuest::SetupFailed(failure) => return Err(setup_failed(&failure)?),
                other => return Err(out_of_place(&other, "while the command ran")),
            }
        }
    }

    /// Why the build failed, if it did.
    fn reason(&self, report: &Report) -> Option<Reason> {
        if report.succeeded() {
            return None;
        }
        let command = || self.specification.command_args.first().cloned().unwrap_or_default();
        Some(match &report.end {
            &End::NoWorkingDir(errno) => Reason::NoWorkingDir { path: self.specification.working_dir.clone(), errno },
            &End::NotExecuted(errno) if errno == Errno::ENOENT as i32 => Reason::CommandNotFound { command: command() },
            &End::NotExecuted(errno) => Reason::CommandNotExecutable { command: command(), errno },
            End::NoInterpreter(interpreter) => {
                Reason::InterpreterNotFound { command: command(), interpreter: interpreter.clone() }
            }
            End::Exited(_) | End::Signaled(_) if report.out_of_memory => {
                Reason::OutOfMemory { memory_bytes: self.memory_bytes }
            }
            End::Exited(_) | End::Signaled(_) if report.scratch_full => {
                Reason::ScratchFull { scratch_bytes: self.exchange.options.limits.scratch_bytes }
            }
            End::Exited(_) | End::Signaled(_) if let Some(allowed) = report.too_many_processes => {
                // The guest isn't trusted with the number.
                Reason::TooManyProcesses { allowed: allowed.min(self.specification.processes) }
            }
            &End::Exited(code) => Reason::ExitCode(code),
            &End::Signaled(signal) => Reason::Signal(signal),
        })
    }

    /// Ingests the request's outputs, in its order.
    fn receive(&self, reader: &mut Reader<'_>, usage: Usage) -> Result<Vec<BuildOutput>, BuildError> {
        let Exchange { store, handle, ending, options, .. } = &self.exchange;
        let expected = &self.specification.outputs;
        let batch = store.batch();
        let mut receiver = Receiver::new(&batch, handle.clone(), self.needles, options.limits.outputs());
        let mut outputs = Vec::with_capacity(expected.len());
        let (mut missing, mut meant) = (Vec::new(), None);
        loop {
            let position = outputs.len() + missing.len();
            let current = expected.get(position);
            match (next(reader)?, current) {
                (FromGuest::Tree(event), Some(_)) => {
                    outputs.extend(receiver.take(&event).map_err(receive_failed)?);
                }
                (FromGuest::Missing { below_working_dir }, Some(output)) if !receiver.is_inside_tree() => {
                    if below_working_dir && meant.is_none() {
                        meant = Some(format!("{}/{output}", self.specification.working_dir));
                    }
                    missing.push(output.clone());
                }
                (FromGuest::Unsupported { path, kind }, Some(output)) => {
                    check_length("the path of an unsupported entry", path)?;
                    let (output, path) = (output.clone(), path.escape_ascii().to_string());
                    if let UnsupportedKind::Unreadable(errno) = kind {
                        let error = io::Error::from_raw_os_error(errno);
                        let detail = format!("output {output:?} at \"{path}\": {error}");
                        let step = "reading the outputs";
                        return Err(BuildError::Executor(ExecutorError::Guest { step, detail }));
                    }
                    return Err(failed(Reason::OutputUnsupported { output, path, kind }, Some(usage)));
                }
                (FromGuest::Finished, None) => break,
                (other, Some(_)) => return Err(out_of_place(&other, "before all outputs had come")),
                (other, None) => return Err(out_of_place(&other, "after all outputs had come")),
            }
        }
        if !missing.is_empty() {
            return Err(failed(Reason::OutputMissing { outputs: missing, meant }, Some(usage)));
        }
        if ending.claim(Party::Session) == Claim::Lost {
            return Err(BuildError::Executor(ExecutorError::Interrupted));
        }
        receiver.commit().map_err(|error| BuildError::Executor(ExecutorError::Store(error)))?;
        Ok(outputs)
    }
}

fn unix_time_ns() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn hello(reader: &mut Reader<'_>) -> Result<(), BuildError> {
    check_hello(&next(reader)?)
}

/// Checks the first message of a guest.
pub(super) fn check_hello(message: &FromGuest<'_>) -> Result<(), BuildError> {
    match message {
        FromGuest::Hello { version: VERSION, .. } => Ok(()),
        &FromGuest::Hello { version, .. } => Err(protocol(ProtocolError::Version { version, expected: VERSION })),
        FromGuest::SetupFailed(failure) => Err(setup_failed(failure)?),
        other => Err(out_of_place(other, "instead of its hello")),
    }
}

fn setup_failed(failure: &SetupFailure<'_>) -> Result<BuildError, BuildError> {
    check_length("the detail of its failure", failure.detail.as_bytes())?;
    let detail = one_line(failure.detail);
    let wrong = |field: &str, rule: &str| {
        Ok(BuildError::Request(RequestError::new(RequestErrorKind::Invalid, field, rule).got(&detail)))
    };
    let step = match failure.step {
        Step::Places => return wrong("inputs", "must not conflict with the request's other paths"),
        Step::AdditionalFiles => return wrong("additional_files", "must fit into the build's root"),
        Step::Scratch => "preparing the scratch disk",
        Step::Inputs => "mounting the inputs",
        Step::Root => "assembling the build's root",
        Step::Start => "starting the command's processes",
    };
    Ok(BuildError::Executor(ExecutorError::Guest { step, detail }))
}

fn check_length(field: &'static str, bytes: &[u8]) -> Result<(), BuildError> {
    if bytes.len() <= MAX_DETAIL_BYTES {
        return Ok(());
    }
    Err(protocol(ProtocolError::TooLong { field, length: bytes.len(), limit: MAX_DETAIL_BYTES }))
}

#[cfg(test)]
mod tests;
