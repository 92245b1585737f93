//! What a build runs in: a VMM, its devices, the jail around each helper process, and the run directory of all.

mod booted;
mod death;
mod device;
pub(crate) mod hardening;
pub mod jail;
mod peer;
mod run_dir;
pub mod vmm;

pub(crate) use booted::{ConnectError, Machine, StartError};
pub use death::{Cause, Death};
pub use device::{Attachment, AttachmentKind, Device};
pub use run_dir::{FileError, sweep};
pub(crate) use run_dir::{RunDir, bind};
