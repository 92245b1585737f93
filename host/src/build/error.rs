//! The three ways in which a build ends without a result, never mixed.

use std::{fmt, io, time::Duration};

use cofferdam_castore::Node;
use cofferdam_protocol::{UnsupportedKind, Usage, frame::FrameError, tree::TreeError};

use super::phase::Phase;
use crate::{
    devices::{self, inputs::ResolveError},
    machine::{Cause, ConnectError, Death, FileError, StartError, jail::WallsError, vmm},
    request::RequestError,
};

/// Why there is no result. Each variant asks something else of the caller: mend the build, mend the request, or try
/// again elsewhere.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The command ran without success.
    #[error("the build failed")]
    Failed(#[source] Box<Failed>),
    /// The request can't be built by anybody, or not here.
    #[error("the request is wrong")]
    Request(#[source] RequestError),
    /// The request is fine; this host could not do it.
    #[error("the executor failed")]
    Executor(#[source] ExecutorError),
}

/// A build that ran and did not succeed.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct Failed {
    /// What went wrong.
    pub reason: Reason,
    /// What the build used up to its end; absent when its guest was stopped with it.
    pub usage: Option<Usage>,
    /// Its remains, if they were asked for and could be kept.
    pub kept: Option<Kept>,
}

/// What a failed build has left in its scratch paths, and in `/tmp`; in the store, and not scanned for needles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// A directory that is laid out as the build's root was.
    pub node: Node,
    /// How many entries are not in it: beyond the limits on outputs, or of a kind that castore has no node for.
    pub skipped: u64,
}

/// What went wrong in a build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// The command exited with a status other than 0.
    ExitCode(u8),
    /// A signal that did not come from the guest's kernel for want of memory killed the command.
    Signal(u8),
    /// The command failed after the guest had run out of memory.
    OutOfMemory {
        /// The guest's memory, in bytes.
        memory_bytes: u64,
    },
    /// The command failed after the scratch disk had run full.
    ScratchFull {
        /// The scratch disk's size, in bytes.
        scratch_bytes: u64,
    },
    /// The command failed after it could start no more processes or threads.
    TooManyProcesses {
        /// How many it could have at a time.
        allowed: u32,
    },
    /// The command was not found, neither as a path nor along the request's `PATH`.
    CommandNotFound {
        /// `command_args[0]`.
        command: String,
    },
    /// The command is there and can't be executed.
    CommandNotExecutable {
        /// `command_args[0]`.
        command: String,
        /// Linux's `errno`.
        errno: i32,
    },
    /// The working directory can't be entered.
    NoWorkingDir {
        /// `working_dir`.
        path: String,
        /// Linux's `errno`.
        errno: i32,
    },
    /// The build took longer than it may.
    Timeout {
        /// The time that it had.
        limit: Duration,
    },
    /// The command wrote nothing for longer than it may.
    Silence {
        /// How long it may be silent.
        limit: Duration,
    },
    /// Outputs that do not exist after a successful command.
    OutputMissing {
        /// All of them, in the request's order.
        outputs: Vec<String>,
    },
    /// Something in an output that castore has no node for.
    OutputUnsupported {
        /// The output, as the request names it.
        output: String,
        /// Where in it, escaped; empty for the output itself.
        path: String,
        /// What is there.
        kind: UnsupportedKind,
    },
    /// A limit on what a build may produce.
    LimitReached {
        /// What was exceeded.
        limit: Limit,
        /// How much is allowed, in the limit's own unit.
        allowed: u64,
    },
}

/// The limits on what a build may produce.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// Bytes on stdout and stderr together.
    LogBytes,
    /// Bytes of file contents in all outputs.
    OutputBytes,
    /// Files, directories and symlinks in all outputs.
    OutputEntries,
    /// Bytes of names and symlink targets in all outputs.
    OutputMetadata,
}

impl Limit {
    /// A stable word for machines.
    pub fn code(self) -> &'static str {
        match self {
            Self::LogBytes => "log_bytes",
            Self::OutputBytes => "output_bytes",
            Self::OutputEntries => "output_entries",
            Self::OutputMetadata => "output_metadata",
        }
    }
}

impl Reason {
    /// A word for machines, stable across versions.
    pub fn code(&self) -> &'static str {
        match self {
            Self::ExitCode(_) => "exit_code",
            Self::Signal(_) => "signal",
            Self::OutOfMemory { .. } => "out_of_memory",
            Self::ScratchFull { .. } => "scratch_full",
            Self::TooManyProcesses { .. } => "too_many_processes",
            Self::CommandNotFound { .. } => "command_not_found",
            Self::CommandNotExecutable { .. } => "command_not_executable",
            Self::NoWorkingDir { .. } => "no_working_dir",
            Self::Timeout { .. } => "timeout",
            Self::Silence { .. } => "silence",
            Self::OutputMissing { .. } => "output_missing",
            Self::OutputUnsupported { .. } => "output_unsupported",
            Self::LimitReached { .. } => "limit_reached",
        }
    }

    /// What the person who asked for the build can do about it, where that is known.
    pub fn advice(&self) -> Option<&'static str> {
        Some(match self {
            Self::OutOfMemory { .. } => "give the build more memory with --memory (min_memory in a request)",
            Self::ScratchFull { .. } => "give the build more room with --scratch-size",
            Self::TooManyProcesses { .. } => {
                "allow it more with --processes; a machine with more --memory can have more, too"
            }
            Self::CommandNotFound { .. } => {
                "name it by its path inside the build, put its directory into PATH with --env, or ask for a shell with --bin-sh"
            }
            Self::NoWorkingDir { .. } => "name a directory that an input or a scratch path makes",
            Self::Timeout { .. } => "give it more time with --timeout",
            Self::Silence { .. } => "have it tell how far it is, or let it be silent for longer with --silence",
            Self::LimitReached { limit, .. } => match limit {
                Limit::LogBytes => "allow it more with --log-limit",
                Limit::OutputBytes => "allow it more with --output-limit",
                Limit::OutputEntries => "allow it more with --output-files",
                Limit::OutputMetadata => return None,
            },
            _ => return None,
        })
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ExitCode(code) => write!(f, "the command exited with status {code}"),
            Self::Signal(signal) => write!(f, "the command was killed by signal {signal} ({})", signal_name(*signal)),
            Self::OutOfMemory { memory_bytes } => {
                write!(f, "the build ran out of memory; its machine has {memory_bytes} bytes")
            }
            Self::ScratchFull { scratch_bytes } => {
                write!(f, "the build filled its scratch disk of {scratch_bytes} bytes")
            }
            Self::TooManyProcesses { allowed } => {
                write!(f, "the build wanted more than the {allowed} processes and threads that it can have at a time")
            }
            Self::CommandNotFound { command } => write!(f, "the command {command:?} was not found"),
            Self::CommandNotExecutable { command, errno } => {
                write!(f, "the command {command:?} can't be executed: {}", io::Error::from_raw_os_error(*errno))
            }
            Self::NoWorkingDir { path, errno } => {
                write!(f, "the working directory {path:?} can't be entered: {}", io::Error::from_raw_os_error(*errno))
            }
            Self::Timeout { limit } => write!(f, "the build did not end within {} seconds", limit.as_secs_f64()),
            Self::Silence { limit } => write!(f, "the command wrote nothing for {} seconds", limit.as_secs_f64()),
            Self::OutputMissing { outputs } => {
                write!(f, "the command succeeded without making {}", quoted(outputs))
            }
            Self::OutputUnsupported { output, path, kind } => {
                write!(f, "output {output:?} holds ")?;
                match kind {
                    UnsupportedKind::Fifo => write!(f, "a named pipe"),
                    UnsupportedKind::Socket => write!(f, "a Unix socket"),
                    UnsupportedKind::BlockDevice => write!(f, "a block device"),
                    UnsupportedKind::CharacterDevice => write!(f, "a character device"),
                    UnsupportedKind::TooDeep => write!(f, "directories nested too deeply"),
                    UnsupportedKind::TooManyNames => write!(f, "more names than can be held in memory"),
                    UnsupportedKind::Unreadable(errno) => {
                        write!(f, "what can't be read ({})", io::Error::from_raw_os_error(*errno))
                    }
                }?;
                if path.is_empty() { Ok(()) } else { write!(f, " at \"{path}\"") }?;
                write!(f, "; outputs are made of files, directories and symlinks")
            }
            Self::LimitReached { limit, allowed } => match limit {
                Limit::LogBytes => write!(f, "the build wrote more than {allowed} bytes to stdout and stderr"),
                Limit::OutputBytes => write!(f, "the outputs hold more than {allowed} bytes"),
                Limit::OutputMetadata => {
                    write!(f, "the outputs hold more than {allowed} bytes of names and symlink targets")
                }
                Limit::OutputEntries => {
                    write!(f, "the outputs hold more than {allowed} files, directories and symlinks")
                }
            },
        }
    }
}

fn quoted(paths: &[String]) -> String {
    paths.iter().map(|path| format!("{path:?}")).collect::<Vec<_>>().join(", ")
}

fn signal_name(number: u8) -> &'static str {
    nix::sys::signal::Signal::try_from(i32::from(number)).map_or("unknown", nix::sys::signal::Signal::as_str)
}

/// What this host could not do.
#[derive(Debug, thiserror::Error)]
pub enum ExecutorError {
    /// The state directory or a run directory in it.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its helper processes can't be walled in.
    #[error("can't wall helper processes in")]
    Walls(#[from] WallsError),
    /// The inputs can't be read from the store.
    #[error("can't resolve the inputs")]
    Resolve(#[source] ResolveError),
    /// A device's process.
    #[error(transparent)]
    Device(#[from] devices::StartError),
    /// The VMM.
    #[error("can't start the virtual machine")]
    Vmm(#[source] vmm::VmmError),
    /// A process that the build needs has died, or the guest's kernel.
    #[error("{what} {when}{}", last_words(.said))]
    Died {
        /// Who, and how.
        what: String,
        /// What brought it about.
        cause: Cause,
        /// Which phase the build was in.
        when: &'static str,
        /// The last that it wrote, escaped; may be empty.
        said: String,
    },
    /// The guest's side of the conversation never began.
    #[error("the guest did not connect within {} seconds{}", limit.as_secs(), last_words(.console))]
    NeverConnected {
        /// The time that it had.
        limit: Duration,
        /// The last lines of its console, escaped; may be empty.
        console: String,
    },
    /// The guest reports that it can't make the build's machine.
    #[error("the guest failed at {step}: {detail}")]
    Guest {
        /// The step's name.
        step: &'static str,
        /// What the guest says, escaped.
        detail: String,
    },
    /// The guest broke the rules of the conversation.
    #[error("the guest broke the protocol")]
    Protocol(#[source] ProtocolError),
    /// The store refused outputs.
    #[error("can't store the outputs")]
    Store(#[source] io::Error),
    /// No thread can be started for the build.
    #[error("can't start a thread")]
    Thread(#[source] io::Error),
    /// A defect of this program; the log has the panic's message.
    #[error("the thread that talks to the guest panicked")]
    SessionPanicked,
    /// Somebody asked for the end.
    #[error("the build was interrupted")]
    Interrupted,
}

impl ExecutorError {
    /// A death in a phase of the build.
    pub(super) fn died(death: Death, phase: Phase) -> Self {
        Self::Died { what: death.what(), cause: death.cause, when: phase.when(), said: death.said }
    }
}

impl From<StartError> for ExecutorError {
    fn from(error: StartError) -> Self {
        match error {
            StartError::File(error) => Self::File(error),
            StartError::Vmm(error) => Self::Vmm(error),
        }
    }
}

impl From<ConnectError> for ExecutorError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::File(error) => Self::File(error),
            ConnectError::Died(death) => Self::died(death, Phase::Booting),
            ConnectError::Timeout { limit, console } => Self::NeverConnected { limit, console },
        }
    }
}

fn last_words(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("; the last that it said:\n{text}") }
}

/// A rule of the conversation that the guest broke.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// A frame.
    #[error("its frame can't be taken")]
    Frame(#[source] FrameError),
    /// A guest image of another version.
    #[error("it speaks version {version}, this host version {expected}; build the image again with `just image`")]
    Version {
        /// What the guest said.
        version: u32,
        /// [`cofferdam_protocol::VERSION`].
        expected: u32,
    },
    /// A message that has no place now.
    #[error("it sent {message} {state}")]
    OutOfPlace {
        /// The message's name.
        message: &'static str,
        /// Where the conversation was.
        state: &'static str,
    },
    /// A log message without a byte.
    #[error("it sent an empty piece of the log")]
    EmptyLog,
    /// A field that exceeds its bound.
    #[error("{field} has {length} bytes, the limit is {limit}")]
    TooLong {
        /// The field's name.
        field: &'static str,
        /// Its length.
        length: usize,
        /// The limit.
        limit: usize,
    },
    /// The tree stream.
    #[error("its output tree is malformed")]
    Tree(#[source] TreeError),
}
