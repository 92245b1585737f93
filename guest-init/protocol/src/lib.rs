//! What host and guest say to each other over vsock, and the limits of it.
//!
//! The guest dials [`HOST_CID`]:[`PORT`] once. Both directions carry frames (see [`frame`]): a length and one
//! [postcard](https://postcard.jamesmunns.com)-encoded message.
//!
//! ```text
//!   guest                                         host
//!     │ Hello ────────────────────────────────────▶ │
//!     │ ◀──────────────────────────── Specification │
//!     │ Log*  ────────────────────────────────────▶ │   as the command writes
//!     │ Exited (or SetupFailed, and nothing more) ▶ │
//!     │ for each output, in the request's order:    │   only after exit status 0
//!     │   Missing, Unsupported or a tree ─────────▶ │   see [`tree`]
//!     │ Finished ─────────────────────────────────▶ │
//!     │ ◀────────────────────────────── Acknowledge │   only now is anything known to have arrived
//!     │ (powers off)                                │
//! ```
//!
//! The host trusts nothing in here: every frame is bounded before it is read, every message is decoded without
//! allocating more than the frame holds, and trees pass [`tree::Check`].

pub mod frame;
mod message;
pub mod tree;

pub use message::{
    End, FromGuest, FromHost, Report, SetupFailure, Specification, Step, Stream, UnsupportedKind, Usage,
};

/// Spoken by both sides; the host refuses a guest image that says another.
pub const VERSION: u32 = 1;

/// The host, as every guest sees it (`VMADDR_CID_HOST`).
pub const HOST_CID: u32 = 2;

/// The one vsock port of the host that a guest may dial.
pub const PORT: u32 = 17_222;

/// The tag of the virtiofs device that holds the inputs.
pub const INPUTS_TAG: &str = "inputs";

/// Longest error text that the guest may send, in bytes.
pub const MAX_DETAIL_BYTES: usize = 4096;
