//! The processes that serve a guest, each confined to one device of one machine.
//!
//! ```text
//!   host process                        device process                          VMM
//!   Process::start ── SUBCOMMAND ─────▶ run ─▶ inputs / paths / net ◀── socket ───┘
//!     listens first, so that the VMM can connect at once
//! ```
//!
//! A new device is a module here with a [`Device`](crate::machine::Device) for the host's side and a `run` for its process,
//! and one more [`Kind`].

mod backend;
pub mod inputs;
mod kind;
pub mod net;
mod packets;
pub mod paths;
mod process;
pub(crate) mod rehearsal;
mod requests;
mod serve;
mod syscalls;

pub use kind::{ENABLED_EARLY, Kind, SUBCOMMAND};
pub use process::StartError;
pub use serve::DeviceError;
pub use syscalls::FilterError;

/// Serves one VM, until its VMM hangs up.
///
/// To be called first thing in a process of its own, whose descriptor 3 is a vhost-user listener, except in an opener, and whose
/// other descriptors from there on are its own. `enabled_early` is for network devices, see [`ENABLED_EARLY`]. No other thread may
/// run yet, since a thread confines itself and those that it starts.
///
/// # Errors
///
/// See [`DeviceError`].
pub fn run(kind: Kind, enabled_early: bool) -> Result<(), DeviceError> {
    serve::die_of_any_panic();
    match kind {
        Kind::Inputs => inputs::run(),
        Kind::Paths => paths::run(),
        Kind::PathsOpener => paths::run_opener(),
        Kind::Network => net::run(enabled_early),
    }
}
