//! What host and guest say to each other over vsock, and the limits of it.
//!
//! The guest dials [`HOST_CID`]:[`PORT`] once. Both directions carry frames (see [`frame`]): a length and one
//! [postcard](https://postcard.jamesmunns.com)-encoded message.
//!
//! ```text
//!   guest                                         host
//!     │ Hello ────────────────────────────────────▶ │
//!     │ ◀──────────────────────────── Specification │
//!     │ Log, Sample* ─────────────────────────────▶ │   as the command writes, and about once a second
//!     │ Exited (or SetupFailed, and nothing more) ▶ │
//!     │ for each output, in the request's order:    │   only after exit status 0
//!     │   Missing, Unsupported or a tree ─────────▶ │   see [`tree`]
//!     │ Finished ─────────────────────────────────▶ │
//!     │ ◀────────────────────────────────────  Keep │   at most once, only for a failed build
//!     │ a tree, Kept ─────────────────────────────▶ │
//!     │ ◀───────────────────────────────────  Shell │   at most once, only for a failed build
//!     │ Output* ──────────────────────────────────▶ │   both ways at any time
//!     │ ◀────────────────────────── Input*, Resize* │
//!     │ ShellEnded ───────────────────────────────▶ │   and nothing more
//!     │ ◀────────────────────────────── Acknowledge │   only now is anything known to have arrived
//!     │ (powers off)                                │
//! ```
//!
//! While the command runs the host may say Stop, and the command ends at once as if a signal had killed it.
//!
//! The host trusts nothing in here: every frame is bounded before it is read, every message is decoded without
//! allocating more than the frame holds, and trees pass [`tree::Check`].

pub mod frame;
mod message;
pub mod tree;

pub use message::{
    End, FromGuest, FromHost, HostPath, Report, Sample, SetupFailure, Specification, Step, Stream, UnsupportedKind,
    Usage, WindowSize,
};

/// Spoken by both sides; the host refuses a guest image that says another.
pub const VERSION: u32 = 2;

/// The host, as every guest sees it (`VMADDR_CID_HOST`).
pub const HOST_CID: u32 = 2;

/// The one vsock port of the host that a guest may dial.
pub const PORT: u32 = 17_222;

/// The tag of the virtiofs device that holds the inputs.
pub const INPUTS_TAG: &str = "inputs";

/// The tag of the virtiofs device that holds the paths of the host, by their numbers.
pub const PATHS_TAG: &str = "paths";

/// Most bytes in one [`FromHost::Input`].
pub const MAX_INPUT_BYTES: usize = 4096;

/// Longest error text that the guest may send, in bytes.
pub const MAX_DETAIL_BYTES: usize = 4096;
