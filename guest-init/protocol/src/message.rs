use serde::{Deserialize, Serialize};

use crate::tree;

/// Everything that the host sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromHost {
    /// The one build of this VM, whole.
    Specification(Specification),
    /// The command is to be killed. Without effect when it has ended already.
    Stop,
    /// What the failed build has left in its writable directories is to be sent as one tree, laid out as in the build's
    /// root. What has no room within the limits, or can't be stored, is left out.
    Keep(tree::Limits),
    /// A shell is to be started in the failed build's place, on a terminal of its own.
    Shell {
        /// The value of `TERM`, if the build has none; empty for none.
        term: String,
        /// The terminal's size at first.
        size: WindowSize,
    },
    /// Bytes for the shell's terminal, at most [`crate::MAX_INPUT_BYTES`].
    Input(serde_bytes::ByteBuf),
    /// The shell's terminal has another size now.
    Resize(WindowSize),
    /// The host has [`FromGuest::Finished`] (or the last message of a failed build) and needs the guest no more.
    Acknowledge,
}

/// Everything that a guest sends. Borrows from the frame that it came in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromGuest<'a> {
    /// The first message.
    Hello {
        /// [`crate::VERSION`] of the guest's side.
        version: u32,
        /// Microseconds since the guest's kernel started.
        uptime_us: u64,
    },
    /// The build's machine could not be made; the last message.
    #[serde(borrow)]
    SetupFailed(SetupFailure<'a>),
    /// Bytes as the command wrote them, at most [`crate::frame::MAX_DATA_BYTES`].
    Log {
        /// Where the command wrote them.
        stream: Stream,
        /// Not empty; need not be UTF-8 or end with a line.
        #[serde(borrow, with = "serde_bytes")]
        bytes: &'a [u8],
    },
    /// The command and everything that it left behind have ended. The last message unless [`Report::succeeded`].
    Exited(Report),
    /// The next output in order does not exist.
    Missing,
    /// The next output, or what is in it, can't be stored; the last message.
    Unsupported {
        /// Where, relative to the output; empty for the output itself. At most [`crate::MAX_DETAIL_BYTES`].
        #[serde(borrow, with = "serde_bytes")]
        path: &'a [u8],
        /// What is there.
        kind: UnsupportedKind,
    },
    /// A step of the next output's tree.
    #[serde(borrow)]
    Tree(tree::Event<'a>),
    /// All outputs have been sent.
    Finished,
    /// What the build uses, about once a second while its command runs.
    Sample(Sample),
    /// The tree of what is kept is complete; without a tree there is nothing to keep.
    Kept {
        /// How many entries were left out.
        skipped: u64,
    },
    /// What the shell's terminal shows, at most [`crate::frame::MAX_DATA_BYTES`].
    Output(#[serde(borrow, with = "serde_bytes")] &'a [u8]),
    /// The shell has ended, or could not be started, which the last output tells. The last message.
    ShellEnded,
}

/// Where a command wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stream {
    /// File descriptor 1.
    Stdout,
    /// File descriptor 2.
    Stderr,
}

/// What can't be stored as a castore node.
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
    /// More names in directories than a guest holds in memory; an output within [`tree::MAX_METADATA_BYTES`] and a
    /// million entries has fewer.
    TooManyNames,
    /// The guest could not read it; the number is Linux's `errno`.
    Unreadable(i32),
}

/// What a guest needs to know to run one build. Paths follow the rules of `snix.build.v1.BuildRequest`; the inputs
/// themselves are what the virtiofs device [`crate::INPUTS_TAG`] shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Specification {
    /// The command and its arguments, not empty.
    pub command_args: Vec<String>,
    /// Exactly the command's environment.
    pub environment: Vec<(String, serde_bytes::ByteBuf)>,
    /// Where the command starts, relative to the build's root.
    pub working_dir: String,
    /// Where the inputs appear, relative to the build's root.
    pub inputs_dir: String,
    /// Writable directories, relative to the build's root, sorted.
    pub scratch_paths: Vec<String>,
    /// Files to place, with their contents, relative to the build's root.
    pub additional_files: Vec<(String, serde_bytes::ByteBuf)>,
    /// What to send back, relative to the build's root, in this order.
    pub outputs: Vec<String>,
    /// Whether `/bin/sh` must exist.
    pub provide_bin_sh: bool,
    /// Whether `/dev/kvm` must exist.
    pub kvm: bool,
    /// What the virtiofs device [`crate::PATHS_TAG`] shows, by its numbers there.
    pub host_paths: Vec<HostPath>,
    /// Most processes and threads that the build may have at a time.
    pub processes: u32,
}

/// Something of the host that is shown, read-only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPath {
    /// Where, relative to the build's root.
    pub path: String,
    /// Whether it is a directory; else it is a file.
    pub is_directory: bool,
}

/// How a build's command ended, and what it used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// How the command itself ended.
    pub end: End,
    /// The guest's kernel killed a process of the build for want of memory.
    pub out_of_memory: bool,
    /// The scratch disk was seen without room.
    pub scratch_full: bool,
    /// How many processes and threads the build could have at a time, if it wanted more: at most
    /// [`Specification::processes`], fewer in a small machine.
    pub too_many_processes: Option<u32>,
    /// What the build used.
    pub usage: Usage,
}

impl Report {
    /// The command ran and exited with status 0.
    pub fn succeeded(&self) -> bool {
        self.end == End::Exited(0)
    }
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// With this status.
    Exited(u8),
    /// Killed by this signal.
    Signaled(u8),
    /// The working directory could not be entered; the number is Linux's `errno`.
    NoWorkingDir(i32),
    /// `execve` failed; the number is Linux's `errno`.
    NotExecuted(i32),
}

/// What a build used inside its guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// From the command's start to the end of all its processes, in microseconds.
    pub wall_us: u64,
    /// Time in user mode, in microseconds.
    pub user_us: u64,
    /// Time in the kernel, in microseconds.
    pub system_us: u64,
    /// Most memory at any time, in bytes.
    pub peak_memory_bytes: u64,
    /// Scratch space in use at the end, in bytes.
    pub scratch_bytes: u64,
}

/// What a build uses at one moment inside its guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// What it has used up to now.
    pub usage: Usage,
    /// Memory in use, in bytes.
    pub memory_bytes: u64,
    /// Processes and threads.
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

/// What guest-init could not do before the command ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetupFailure<'a> {
    /// The step that failed.
    pub step: Step,
    /// What it was done to, and what the kernel said; at most [`crate::MAX_DETAIL_BYTES`].
    pub detail: &'a str,
}

/// The steps of a guest's setup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// Preparing the scratch disk.
    Scratch,
    /// Mounting the inputs.
    Inputs,
    /// Assembling the build's root.
    Root,
    /// Making room for what the request names: its inputs have something else there, or the machine has.
    Places,
    /// Placing `additional_files`: the request asks for a place that can't hold a file.
    AdditionalFiles,
    /// Starting the command's processes.
    Start,
}
