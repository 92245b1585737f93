//! One build, from admission to result; the owner of its VM's life.
//!
//! ```text
//!   Builder::build(request)
//!     admit ──▶ resolve inputs ──▶ boot: run directory, devices, VMM, until the guest connects
//!                                       │
//!              a machine in stock ──▶ bind: the inputs' tree
//!                                       ▼
//!                    session (a thread): specification ─▶ logs ─▶ report ─▶ outputs
//!                                       │                            └▶ failed: its remains, a shell
//!     whichever comes first: the session's end · a death · a limit on time · cancellation, see `ending`
//!                                       ▼
//!      BuildError, its machine gone · Built ──▶ Teardown: kill what is left, remove the run directory
//! ```
//!
//! Nothing outlives [`Builder::build`]: dropping its future kills the processes and removes the run directory too.
//! A result doesn't wait for the end of its machine: that is [`Teardown`], which the caller waits for after it has answered.

mod builder;
mod built;
pub(crate) mod compare;
mod conversation;
mod ending;
mod environment;
mod error;
mod exchange;
pub(crate) mod failure;
mod footprint;
mod guest;
mod interruption;
mod line;
mod observer;
mod options;
mod phase;
mod progress;
mod rehearsal;
mod remains;
pub(crate) mod secrets;
mod session;
mod settings;
mod shell;
mod standby;
mod teardown;
mod terminal;

pub(crate) use builder::Builder;
pub(crate) use built::{Built, Times};
pub(crate) use environment::ImageDigests;
#[cfg(test)]
pub(crate) use error::Failed;
pub(crate) use error::{BuildError, ExecutorError, Reason};
pub(crate) use footprint::{Footprint, machine_bytes};
pub(crate) use guest::Shape;
pub(crate) use observer::Observer;
pub(crate) use options::Options;
pub(crate) use phase::Phase;
pub(crate) use rehearsal::ends_a_build;
pub use settings::Settings;
pub(crate) use standby::{News, Standby, StandbyUse};
pub(crate) use teardown::Teardown;
pub(crate) use terminal::{Terminal, TerminalInput};
