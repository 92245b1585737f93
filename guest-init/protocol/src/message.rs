use std::fmt;

use serde::{Deserialize, Serialize};

use crate::tree;

/// A message from the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[expect(clippy::large_enum_variant, reason = "no message is kept")]
pub enum FromHost {
    /// The build to run.
    Specification(Specification),
    /// Kill the command. Has no effect once it has ended.
    Stop,
    /// Send everything in the failed build's writable directories as one tree, with the layout of the build's root. Files
    /// that exceed the limits or can't be stored are skipped.
    Keep(tree::Limits),
    /// Start an interactive shell in the failed build, on a terminal of its own.
    Shell {
        /// `TERM`, unless the build sets it; empty for none.
        term: String,
        /// The terminal's initial size.
        size: WindowSize,
    },
    /// Input for the shell's or the command's terminal, at most [`crate::MAX_INPUT_BYTES`].
    Input(serde_bytes::ByteBuf),
    /// Resize the shell's or the command's terminal.
    Resize(WindowSize),
    /// The host has received the guest's last message. The guest can power off.
    Acknowledge,
    /// Answer with [`FromGuest::Pong`]. Comes only before the specification. After the first one the guest gets ready for its
    /// build as far as it can before it answers.
    Ping,
}

/// A message from the guest. It borrows from the frame that it was read from.
///
/// ```
/// use cofferdam_protocol::{
///     FromGuest,
///     frame::{FrameReader, FrameWriter, MAX_FROM_GUEST_BYTES},
/// };
///
/// # fn main() -> Result<(), cofferdam_protocol::frame::FrameError> {
/// let mut wire = Vec::new();
/// let mut writer = FrameWriter::new(&mut wire, MAX_FROM_GUEST_BYTES);
/// writer.write(&FromGuest::Log(b"checking for gcc"))?;
/// writer.write(&FromGuest::Log(b"... yes\n"))?;
///
/// let mut log = Vec::new();
/// let mut reader = FrameReader::new(wire.as_slice(), MAX_FROM_GUEST_BYTES);
/// while let Ok(FromGuest::Log(bytes)) = reader.read() {
///     log.extend_from_slice(bytes);
/// }
/// assert_eq!(log, b"checking for gcc... yes\n");
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromGuest<'a> {
    /// The first message.
    Hello {
        /// The guest's [`crate::VERSION`].
        version: u32,
        /// Microseconds since the start of the guest's kernel.
        uptime_us: u64,
    },
    /// The setup failed before the command ran, or guest-init failed later. The last message.
    #[serde(borrow)]
    SetupFailed(SetupFailure<'a>),
    /// Output of the command on stdout and stderr, in the order of writing, at most [`crate::frame::MAX_DATA_BYTES`]. Not
    /// empty. May be anything: it need not be UTF-8, or end at the end of a line.
    Log(#[serde(borrow, with = "serde_bytes")] &'a [u8]),
    /// Every process of the build has ended. The outputs follow if [`Report::succeeded`].
    Exited(Report),
    /// The next output in order does not exist.
    Missing {
        /// Whether it exists at this path below the working directory.
        below_working_dir: bool,
    },
    /// The next output, or a file in it, can't be stored. The last message.
    Unsupported {
        /// The file's path relative to the output; empty for the output itself. At most [`crate::MAX_DETAIL_BYTES`].
        #[serde(borrow, with = "serde_bytes")]
        path: &'a [u8],
        /// The reason.
        kind: UnsupportedKind,
    },
    /// A part of the next output's tree, or of the kept files' tree.
    #[serde(borrow)]
    Tree(tree::Event<'a>),
    /// All outputs have been sent.
    Finished,
    /// The build's usage, about once a second while its command runs.
    Sample(Sample),
    /// The tree of kept files is complete. If no tree came before this, there are none.
    Kept {
        /// Number of entries that were skipped.
        skipped: u64,
    },
    /// Output of the shell's or the command's terminal, at most [`crate::frame::MAX_DATA_BYTES`].
    Output(#[serde(borrow, with = "serde_bytes")] &'a [u8]),
    /// The shell has ended. If it could not be started, the output has the reason. The last message.
    ShellEnded,
    /// The answer to [`FromHost::Ping`]: the guest is ready for its specification.
    Pong,
}

/// Why a file can't be stored as a castore node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum UnsupportedKind {
    /// A named pipe.
    Fifo,
    /// A Unix socket.
    Socket,
    /// A block device.
    BlockDevice,
    /// A character device.
    CharacterDevice,
    /// Directories nested deeper than [`tree::MAX_DEPTH`].
    TooDeep,
    /// The names in open directories exceed the guest's memory for them. An output of up to a million entries and
    /// [`tree::MAX_METADATA_BYTES`] never does.
    TooManyNames,
    /// The guest could not read it. The number is an `errno` of Linux.
    Unreadable(i32),
}

/// Everything that a guest needs to run one build, except the inputs, which are on the virtiofs device
/// [`crate::INPUTS_TAG`].
///
/// Paths follow the rules of `snix.build.v1.BuildRequest`, and are relative to the build's root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Specification {
    /// The command and its arguments; not empty.
    pub command_args: Vec<String>,
    /// The command's whole environment: names and values.
    pub environment: Vec<(String, serde_bytes::ByteBuf)>,
    /// The command's working directory.
    pub working_dir: String,
    /// The directory where the inputs are mounted.
    pub inputs_dir: String,
    /// Writable directories, sorted.
    pub scratch_paths: Vec<String>,
    /// Paths and contents of further files.
    pub additional_files: Vec<(String, serde_bytes::ByteBuf)>,
    /// The outputs, in the order in which they are sent.
    pub outputs: Vec<String>,
    /// Whether `/bin/sh` must exist.
    pub provide_bin_sh: bool,
    /// Whether `/dev/kvm` must exist.
    pub kvm: bool,
    /// Host paths to mount. The virtiofs device [`crate::PATHS_TAG`] has them, named by their index here.
    pub host_paths: Vec<HostPath>,
    /// Whether the build uses the machine's network device, with the addresses in [`crate::network`].
    pub network: bool,
    /// Limit on the build's processes and threads at a time.
    pub processes: u32,
    /// Whether the build can make user namespaces.
    pub user_namespaces: bool,
    /// The contents of `/etc/ssl/certs/ca-certificates.crt`, instead of the inputs'. At most [`crate::MAX_CA_FILE_BYTES`].
    pub ca_file: Option<serde_bytes::ByteBuf>,
    /// Files in [`crate::SECRETS_DIR`] that only the command sees. At most [`crate::MAX_SECRETS`].
    pub secrets: Vec<Secret>,
    /// The host's time, in nanoseconds since 1970. The guest's own clock may have lost it while the machine waited.
    pub unix_time_ns: u64,
    /// The command's terminal. Without one, its stdin is empty, and its output is the log.
    pub terminal: Option<Terminal>,
}

/// A terminal to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// `TERM`, unless the build sets it; empty for none.
    pub term: String,
    /// The initial size.
    pub size: WindowSize,
}

/// A file that is on no disk. Its contents are never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret {
    /// Its name in [`crate::SECRETS_DIR`].
    pub name: String,
    /// At most [`crate::MAX_SECRET_BYTES`].
    pub contents: serde_bytes::ByteBuf,
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secret").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A file or directory of the host, mounted read-only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPath {
    /// The mount point.
    pub path: String,
    /// Whether it is a directory or a file.
    pub is_directory: bool,
}

/// How the build's command ended, and what it used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// How the command itself ended.
    pub end: End,
    /// Whether the OOM killer of the guest's kernel killed a process of the build.
    pub out_of_memory: bool,
    /// Whether the scratch disk was found full at any time.
    pub scratch_full: bool,
    /// The limit on processes and threads, if the build reached it: [`Specification::processes`], or less in a small
    /// machine.
    pub too_many_processes: Option<u32>,
    /// The build's usage.
    pub usage: Usage,
}

impl Report {
    /// Whether the command exited with status 0.
    ///
    /// ```
    /// use cofferdam_protocol::{End, Report, Usage};
    ///
    /// let report = |end| Report {
    ///     end,
    ///     out_of_memory: false,
    ///     scratch_full: false,
    ///     too_many_processes: None,
    ///     usage: Usage { wall_us: 1_500_000, user_us: 900_000, ..Usage::default() },
    /// };
    /// assert!(report(End::Exited(0)).succeeded());
    /// assert!(!report(End::Exited(1)).succeeded());
    /// assert!(!report(End::Signaled(9)).succeeded());
    /// ```
    pub fn succeeded(&self) -> bool {
        self.end == End::Exited(0)
    }
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// It exited with this status.
    Exited(u8),
    /// This signal killed it.
    Signaled(u8),
    /// The working directory could not be entered. The number is an `errno` of Linux.
    NoWorkingDir(i32),
    /// `execve` failed. The number is an `errno` of Linux.
    NotExecuted(i32),
    /// The program exists, and the program that it names to run it doesn't: a script's interpreter, or a dynamic loader.
    /// At most [`crate::MAX_DETAIL_BYTES`].
    NoInterpreter(String),
}

/// A build's resource usage, as counted inside the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Time from the command's start to the end of all its processes, in microseconds.
    pub wall_us: u64,
    /// Time in user mode, in microseconds.
    pub user_us: u64,
    /// Time in the kernel, in microseconds.
    pub system_us: u64,
    /// Highest memory use at any time, in bytes.
    pub peak_memory_bytes: u64,
    /// Scratch space in use at the end, in bytes.
    pub scratch_bytes: u64,
}

/// A build's resource usage at one moment, as counted inside the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Usage up to now.
    pub usage: Usage,
    /// Memory in use, in bytes.
    pub memory_bytes: u64,
    /// Number of processes and threads.
    pub processes: u32,
}

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// Why guest-init failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetupFailure<'a> {
    /// The step that failed.
    pub step: Step,
    /// What failed and the kernel's error, at most [`crate::MAX_DETAIL_BYTES`].
    pub detail: &'a str,
}

/// A step of the guest's setup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// Preparing the scratch disk.
    Scratch,
    /// Mounting the inputs.
    Inputs,
    /// Assembling the build's root.
    Root,
    /// Making the request's paths: the inputs have something else at one of them, or it is reserved.
    Places,
    /// Making `additional_files`: one of the request's paths can't be a file.
    AdditionalFiles,
    /// Starting the command's processes.
    Start,
}
