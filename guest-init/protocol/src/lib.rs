//! The protocol between host and guest, over vsock, with its limits.
//!
//! The guest connects once to [`HOST_CID`]:[`PORT`]. Both directions carry frames (see [`frame`]): a length, and one
//! message encoded with [postcard](https://postcard.jamesmunns.com).
//!
//! ```text
//!   guest                                         host
//!     │ Hello ────────────────────────────────────▶ │
//!     │ ◀──────────────────────────────────── Ping* │   in a machine that boots before there is a request
//!     │ Pong ─────────────────────────────────────▶ │   as the answer to each, and never else
//!     │ ◀──────────────────────────── Specification │
//!     │ Log*, Sample* ────────────────────────────▶ │   while the command runs; a sample about once a second
//!     │ Exited, or SetupFailed ───────────────────▶ │
//!     │ for each output, in the request's order:    │   only after exit status 0
//!     │   Missing, Unsupported or a tree ─────────▶ │   see [`tree`]
//!     │ Finished ─────────────────────────────────▶ │
//!     │ ◀────────────────────────────────────  Keep │   at most once, only for a failed build
//!     │ a tree, Kept ─────────────────────────────▶ │
//!     │ ◀───────────────────────────────────  Shell │   at most once, only for a failed build
//!     │ Output* ──────────────────────────────────▶ │   both ways at any time
//!     │ ◀────────────────────────── Input*, Resize* │
//!     │ ShellEnded ───────────────────────────────▶ │   the guest's last message, if there was a shell
//!     │ ◀────────────────────────────── Acknowledge │   from now on the guest knows that everything arrived
//!     │ (powers off)                                │
//! ```
//!
//! A command with a terminal has Output instead of Log, and the host may send Input and Resize at any time. After the
//! command's end the guest ignores them.
//!
//! While the command runs, the host may send Stop. The command then ends at once, as if a signal had killed it.
//!
//! The host trusts nothing that a guest sends. It checks each frame's length before it reads the frame, decoding
//! allocates no more than the frame's length, and every tree passes [`tree::Check`].
//!
//! # Example
//!
//! The beginning of a conversation:
//!
//! ```
//! use std::os::unix::net::UnixStream;
//!
//! use cofferdam_protocol::{
//!     FromGuest, FromHost, Specification, VERSION,
//!     frame::{FrameReader, FrameWriter, MAX_FROM_GUEST_BYTES, MAX_FROM_HOST_BYTES},
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // The host's end of vsock is a Unix socket, too.
//! let (host, guest) = UnixStream::pair()?;
//!
//! let hello = FromGuest::Hello { version: VERSION, uptime_us: 250_000 };
//! FrameWriter::new(&guest, MAX_FROM_GUEST_BYTES).write(&hello)?;
//!
//! let mut from_guest = FrameReader::new(&host, MAX_FROM_GUEST_BYTES);
//! let FromGuest::Hello { version, .. } = from_guest.read()? else { panic!("expected Hello") };
//! assert_eq!(version, VERSION);
//!
//! let specification = Specification {
//!     command_args: vec!["/bin/sh".to_owned(), "-c".to_owned(), "echo hello >out/greeting".to_owned()],
//!     environment: vec![("PATH".to_owned(), b"/bin".to_vec().into())],
//!     working_dir: String::new(),
//!     inputs_dir: "inputs".to_owned(),
//!     scratch_paths: vec!["out".to_owned()],
//!     additional_files: Vec::new(),
//!     outputs: vec!["out/greeting".to_owned()],
//!     provide_bin_sh: true,
//!     kvm: false,
//!     host_paths: Vec::new(),
//!     network: false,
//!     processes: 1000,
//!     user_namespaces: false,
//!     ca_file: None,
//!     secrets: Vec::new(),
//!     unix_time_ns: 1_790_000_000_000_000_000,
//!     terminal: None,
//! };
//! let message = FromHost::Specification(specification);
//! FrameWriter::new(&host, MAX_FROM_HOST_BYTES).write(&message)?;
//!
//! let received: FromHost = FrameReader::new(&guest, MAX_FROM_HOST_BYTES).read()?;
//! assert_eq!(received, message);
//! # Ok(())
//! # }
//! ```

pub mod frame;
mod message;
pub mod network;
pub mod tree;

pub use message::{
    End, FromGuest, FromHost, HostPath, Report, Sample, Secret, SetupFailure, Specification, Step, Terminal,
    UnsupportedKind, Usage, WindowSize,
};

/// Version of the protocol. The host refuses a guest with another one.
pub const VERSION: u32 = 5;

/// The build's user.
pub const BUILD_UID: u32 = 1000;

/// The build's group.
pub const BUILD_GID: u32 = 100;

/// The host's address on vsock (`VMADDR_CID_HOST`).
pub const HOST_CID: u32 = 2;

/// The host's only vsock port.
pub const PORT: u32 = 17_222;

/// Tag of the virtiofs device with the inputs.
pub const INPUTS_TAG: &str = "inputs";

/// Tag of the virtiofs device with the host paths. Their names there are numbers: the index in
/// [`Specification::host_paths`].
pub const PATHS_TAG: &str = "paths";

/// Limit on the bytes of one [`FromHost::Input`].
pub const MAX_INPUT_BYTES: usize = 4096;

/// Limit on the bytes of [`Specification::ca_file`].
pub const MAX_CA_FILE_BYTES: usize = 1024 * 1024;

/// The directory of a build's secrets, relative to its root.
pub const SECRETS_DIR: &str = "run/secrets";

/// Most secrets of a build.
pub const MAX_SECRETS: usize = 16;

/// Limit on the bytes of [`Secret::contents`].
pub const MAX_SECRET_BYTES: usize = 1024 * 1024;

/// Limit on an error text or path from the guest, in bytes.
pub const MAX_DETAIL_BYTES: usize = 4096;
