//! Why a build has no result: the build failed, the request is wrong, or the executor failed.

use std::{fmt, io, time::Duration};

use cofferdam_castore::Node;
use cofferdam_protocol::{UnsupportedKind, Usage, frame::FrameError, tree::TreeError};

use super::phase::Phase;
use crate::{
    devices::{self, inputs::ResolveError},
    machine::{Cause, ConnectError, Death, FileError, StartError, jail::WallsError, vmm},
    network::Denials,
    request::RequestError,
};

/// Why there is no result. Each variant calls for another action: fix the build, fix the request, or try again elsewhere.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The command ran and failed, or an output was missing or refused.
    #[error("the build failed")]
    Failed(#[source] Box<Failed>),
    /// The request can't be built anywhere, or not on this host.
    #[error("the request is wrong")]
    Request(#[source] RequestError),
    /// The request is valid, but this host could not build it.
    #[error("the executor failed")]
    Executor(#[source] ExecutorError),
}

/// A build that ran and did not succeed.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct Failed {
    /// Why it failed.
    pub reason: Reason,
    /// Resources that the build used. `None` if its guest was stopped before it could report them.
    pub usage: Option<Usage>,
    /// Files that it left, if they were requested and could be kept.
    pub kept: Option<Kept>,
    /// Connections that it was denied. They may have nothing to do with the reason.
    pub denials: Denials,
}

impl Failed {
    /// Failed for this reason, without remains or denials.
    pub fn new(reason: Reason, usage: Option<Usage>) -> Self {
        Self { reason, usage, kept: None, denials: Denials::default() }
    }
}

/// Files that a failed build left in its scratch paths and in `/tmp`. They are in the store, and not scanned for needles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// A directory with the layout of the build's root.
    pub node: Node,
    /// The number of entries left out: beyond the limits on outputs, or of a kind that castore can't store.
    pub skipped: u64,
}

/// Why a build failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// The command exited with a status other than 0.
    ExitCode(u8),
    /// A signal killed the command. [`Reason::OutOfMemory`] if the guest's kernel sent it to free memory.
    Signal(u8),
    /// The command failed after the guest had run out of memory.
    OutOfMemory {
        /// The guest's memory, in bytes.
        memory_bytes: u64,
    },
    /// The command failed after the scratch disk was full.
    ScratchFull {
        /// The scratch disk's size, in bytes.
        scratch_bytes: u64,
    },
    /// The command failed after it could start no more processes or threads.
    TooManyProcesses {
        /// The limit at any one time.
        allowed: u32,
    },
    /// The command was not found, either as a path or in the request's `PATH`.
    CommandNotFound {
        /// `command_args[0]`.
        command: String,
    },
    /// The command exists, but can't be executed.
    CommandNotExecutable {
        /// `command_args[0]`.
        command: String,
        /// Linux's `errno`.
        errno: i32,
    },
    /// The command exists, and the program that it names to run it doesn't.
    InterpreterNotFound {
        /// `command_args[0]`.
        command: String,
        /// A script's interpreter or a dynamic loader, as the command's file names it.
        interpreter: String,
    },
    /// The working directory can't be entered.
    NoWorkingDir {
        /// `working_dir`.
        path: String,
        /// Linux's `errno`.
        errno: i32,
    },
    /// The build exceeded its time limit.
    Timeout {
        /// The limit.
        limit: Duration,
    },
    /// The command wrote nothing for too long.
    Silence {
        /// The limit.
        limit: Duration,
    },
    /// The command succeeded, but did not make these outputs.
    OutputMissing {
        /// All of them, in the request's order.
        outputs: Vec<String>,
        /// The path of something that was made, if the first one was meant to be relative to the working directory.
        meant: Option<String>,
    },
    /// An output holds something that castore can't store.
    OutputUnsupported {
        /// The output, as the request names it.
        output: String,
        /// The path within the output, escaped. Empty for the output itself.
        path: String,
        /// Its type.
        kind: UnsupportedKind,
    },
    /// The build exceeded a limit on its log or its outputs.
    LimitReached {
        /// The limit that was exceeded.
        limit: Limit,
        /// The limit's value, in its own unit.
        allowed: u64,
    },
}

/// The limits on a build's log and outputs.
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
    /// Memory of the host for the directories of all outputs.
    OutputDirectories,
}

impl Limit {
    /// A word for machines, stable across versions.
    pub fn code(self) -> &'static str {
        match self {
            Self::LogBytes => "log_bytes",
            Self::OutputBytes => "output_bytes",
            Self::OutputEntries => "output_entries",
            Self::OutputMetadata => "output_metadata",
            Self::OutputDirectories => "output_directories",
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
            Self::InterpreterNotFound { .. } => "interpreter_not_found",
            Self::NoWorkingDir { .. } => "no_working_dir",
            Self::Timeout { .. } => "timeout",
            Self::Silence { .. } => "silence",
            Self::OutputMissing { .. } => "output_missing",
            Self::OutputUnsupported { .. } => "output_unsupported",
            Self::LimitReached { .. } => "limit_reached",
        }
    }

    /// What the build's author can do about it, if that is known.
    pub fn advice(&self) -> Option<&'static str> {
        Some(match self {
            Self::OutOfMemory { .. } => "give the build more memory with --memory (min_memory in a request)",
            Self::ScratchFull { .. } => "enlarge the scratch disk with --scratch-size",
            Self::TooManyProcesses { .. } => {
                "raise the limit with --processes; a machine with little memory allows fewer, so raise --memory, too"
            }
            Self::CommandNotFound { .. } => {
                "name it by its path inside the build, or put its directory into PATH with --env; a build has the programs of its inputs, and with --bin-sh a shell"
            }
            Self::InterpreterNotFound { interpreter, .. } if interpreter.ends_with('\r') => {
                "the script has the line ends of Windows: convert it, for example with `dos2unix`"
            }
            Self::InterpreterNotFound { .. } => {
                "bring the interpreter as an input, or name one in the script's first line that the build has; --bin-sh provides /bin/sh"
            }
            Self::NoWorkingDir { .. } => "name a directory in an input or below a scratch path",
            Self::Timeout { .. } => "raise the limit with --timeout",
            Self::Silence { .. } => "have the command print its progress, or raise the limit with --silence",
            Self::LimitReached { limit, .. } => match limit {
                Limit::LogBytes => "raise the limit with --log-limit",
                Limit::OutputBytes => "raise the limit with --output-limit",
                Limit::OutputEntries => "raise the limit with --output-files",
                Limit::OutputMetadata => return None,
                Limit::OutputDirectories => {
                    "put the files into more directories, of fewer than 100,000 each, or into an archive"
                }
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
                write!(f, "the build needed more than the {allowed} processes and threads that it may have at a time")
            }
            Self::CommandNotFound { command } => write!(f, "the command {command:?} was not found"),
            Self::CommandNotExecutable { command, errno } => {
                write!(f, "the command {command:?} can't be executed: {}", io::Error::from_raw_os_error(*errno))
            }
            Self::InterpreterNotFound { command, interpreter } => {
                write!(f, "the command {command:?} is there, but needs {interpreter:?} to run, which is not")
            }
            Self::NoWorkingDir { path, errno } => {
                write!(f, "the working directory {path:?} can't be entered: {}", io::Error::from_raw_os_error(*errno))
            }
            Self::Timeout { limit } => write!(f, "the build did not end within {} seconds", limit.as_secs_f64()),
            Self::Silence { limit } => write!(f, "the command wrote nothing for {} seconds", limit.as_secs_f64()),
            Self::OutputMissing { outputs, meant } => {
                write!(f, "the command succeeded without making {}", quoted(outputs))?;
                let Some(meant) = meant else { return Ok(()) };
                write!(f, "; outputs are relative to the root: did you mean {meant:?}?")
            }
            Self::OutputUnsupported { output, path, kind } => {
                write!(f, "output {output:?} holds ")?;
                match kind {
                    UnsupportedKind::Fifo => write!(f, "a named pipe"),
                    UnsupportedKind::Socket => write!(f, "a Unix socket"),
                    UnsupportedKind::BlockDevice => write!(f, "a block device"),
                    UnsupportedKind::CharacterDevice => write!(f, "a character device"),
                    UnsupportedKind::TooDeep => write!(f, "directories nested too deeply"),
                    UnsupportedKind::TooManyNames => write!(f, "a directory with too many names to hold in memory"),
                    UnsupportedKind::Unreadable(errno) => {
                        write!(f, "something unreadable ({})", io::Error::from_raw_os_error(*errno))
                    }
                }?;
                if path.is_empty() { Ok(()) } else { write!(f, " at \"{path}\"") }?;
                write!(f, "; outputs may hold only files, directories and symlinks")
            }
            Self::LimitReached { limit, allowed } => match limit {
                Limit::LogBytes => write!(f, "the build wrote more than {allowed} bytes to stdout and stderr"),
                Limit::OutputBytes => write!(f, "the outputs hold more than {allowed} bytes"),
                Limit::OutputMetadata => {
                    write!(f, "the outputs hold more than {allowed} bytes of names and symlink targets")
                }
                Limit::OutputDirectories => {
                    write!(f, "the directories of the outputs take more than {allowed} bytes of the host's memory")
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

/// Why this host could not build a valid request.
#[derive(Debug, thiserror::Error)]
pub enum ExecutorError {
    /// The state directory, or a run directory in it, can't be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its helper processes can't be walled in.
    #[error("can't wall helper processes in")]
    Walls(#[from] WallsError),
    /// The inputs can't be read from the store.
    #[error("can't resolve the inputs")]
    Resolve(#[source] ResolveError),
    /// A device's process can't be started.
    #[error(transparent)]
    Device(#[from] devices::StartError),
    /// The VMM can't be started.
    #[error("can't start the virtual machine")]
    Vmm(#[source] vmm::VmmError),
    /// The guest's kernel, or a process that the build needs, has died.
    #[error("{what} {when}{}", last_words(.said))]
    Died {
        /// Its name, and how it died.
        what: String,
        /// The cause.
        cause: Cause,
        /// The build's phase, as part of a sentence.
        when: &'static str,
        /// Its last output, escaped. May be empty.
        said: String,
    },
    /// The guest did not connect in time.
    #[error("the guest did not connect within {} seconds{}", limit.as_secs(), last_words(.console))]
    NeverConnected {
        /// The time that it had.
        limit: Duration,
        /// The last lines of its console, escaped. May be empty.
        console: String,
    },
    /// The guest reports that it can't prepare the build, or read its outputs.
    #[error("the guest failed at {step}: {detail}")]
    Guest {
        /// The step's name.
        step: &'static str,
        /// The guest's explanation, escaped.
        detail: String,
    },
    /// The guest broke a rule of the protocol.
    #[error("the guest broke the protocol")]
    Protocol(#[source] ProtocolError),
    /// The store could not take the outputs.
    #[error("can't store the outputs")]
    Store(#[source] io::Error),
    /// No thread can be started for the build.
    #[error("can't start a thread")]
    Thread(#[source] io::Error),
    /// This program has a defect. The log has the panic's message.
    #[error("the thread that talks to the guest panicked")]
    SessionPanicked,
    /// The client of an interactive build didn't bring its terminal in time.
    #[error("the command needs a terminal, and none came")]
    NoTerminal,
    /// The build was cancelled.
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
    if text.is_empty() { String::new() } else { format!("; its last output:\n{text}") }
}

/// The rule of the protocol that the guest broke.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// A frame is malformed, or cut short.
    #[error("its frame can't be read")]
    Frame(#[source] FrameError),
    /// The guest image has another version.
    #[error("it speaks version {version}, this host version {expected}; build the image again with `just image`")]
    Version {
        /// The guest's version.
        version: u32,
        /// [`cofferdam_protocol::VERSION`].
        expected: u32,
    },
    /// A message arrived at the wrong time.
    #[error("it sent {message} {state}")]
    OutOfPlace {
        /// The message's name.
        message: &'static str,
        /// When, as part of a sentence.
        state: &'static str,
    },
    /// The guest has neither said anything nor taken what the host said.
    #[error("it has not answered for {} s", limit.as_secs())]
    Unresponsive {
        /// How long.
        limit: Duration,
    },
    /// A log message was empty.
    #[error("it sent an empty piece of the log")]
    EmptyLog,
    /// A field exceeds its bound.
    #[error("{field} has {length} bytes, the limit is {limit}")]
    TooLong {
        /// The field's name.
        field: &'static str,
        /// Its length.
        length: usize,
        /// The limit.
        limit: usize,
    },
    /// An output's tree breaks a rule.
    #[error("its output tree is malformed")]
    Tree(#[source] TreeError),
}
