//! What a build runs in: a VMM, the jail around each helper process, and the run directory of both.

pub mod jail;
mod run_dir;
pub mod vmm;

pub(crate) use run_dir::RunDir;
pub use run_dir::{FileError, sweep};
