//! What the whole-system tests are written with: the real program, real VMs, nothing faked.
//!
//! ```text
//!   Cofferdam         a user's own state directory; proves at its end that no process and no file is left
//!     .build()  ───▶ Build      the flags of `cofferdam run`, or a ProtoJSON request for `cofferdam build`
//!       .shell() ──▶ Running    the live process: its output so far, its signals, its peak memory
//!         .end() ──▶ Outcome    exit code, stdout, stderr, outputs
//! ```
//!
//! The program is compiled and the guest image is made once, by whichever test comes first, unless `COFFERDAM_BIN` and
//! `COFFERDAM_TEST_IMAGE` name what was made before. At most [`slots`] VMs run at a time over all test programs. A test
//! that can't run on a machine fails and says what mends it; none is skipped.

mod build;
pub mod castore;
mod cofferdam;
mod daemon;
pub mod guest;
pub mod nested;
mod outcome;
pub mod patience;
pub mod processes;
mod program;
pub mod request;
mod running;
pub mod slots;
mod terminal;
pub mod vmm;

pub use build::Build;
pub use cofferdam::Cofferdam;
pub use daemon::Daemon;
pub use outcome::{Outcome, Output};
pub use patience::stretched;
pub use program::{image, program, test_executables};
pub use running::Running;
