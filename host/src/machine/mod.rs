//! What a build runs in: a VMM, its devices, the jail around each helper process, and the run directory of all.

mod booted;
mod death;
mod device;
pub mod jail;
mod peer;
mod run_dir;
pub mod vmm;

pub(crate) use booted::{ConnectError, Machine, StartError};
pub use death::{Cause, Death};
pub use device::{Attachment, AttachmentKind, Device};
pub(crate) use run_dir::RunDir;
pub use run_dir::{FileError, sweep};
