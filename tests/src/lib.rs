//! The harness of the whole-system tests. They use the real program and real VMs.
//!
//! ```text
//!   Cofferdam         a user's own state directory; checks at its end that no process and no file is left
//!     .build()  ───▶ Build      the flags of `cofferdam run`, or a ProtoJSON request for `cofferdam build`
//!       .shell() ──▶ Running    the live process: its output so far, its signals, its peak memory
//!         .end() ──▶ Outcome    exit code, stdout, stderr, outputs
//! ```
//!
//! The first test compiles the program and makes the guest image, unless `COFFERDAM_BIN` and `COFFERDAM_TEST_IMAGE` name
//! existing ones. With `COFFERDAM_TEST_STANDBY`, every daemon keeps a standby machine. At most [`slots`] VMs run at a time over all
//! test programs. A test that can't run on a machine fails with advice. None is skipped.

mod authority;
mod build;
pub mod castore;
mod cofferdam;
mod daemon;
pub mod debian_root;
pub mod front_end;
pub mod guest;
mod lab;
pub mod nested;
pub mod nix;
pub mod nix_hello;
mod outcome;
pub mod patience;
pub mod processes;
mod program;
pub mod recipes;
pub mod request;
mod running;
pub mod slots;
mod small_disk;
pub mod ssh;
pub mod telemetry;
mod terminal;
pub mod vmm;

pub use authority::Authority;
pub use build::Build;
pub use cofferdam::Cofferdam;
pub use daemon::Daemon;
pub use lab::{Lab, RESOLVER, in_network_of, network_devices, networked};
pub use outcome::{Outcome, Output};
pub use patience::stretched;
pub use program::{DEBIAN_IMAGE_SETTING, copy_program, debian_image, image, program, test_executable};
pub use running::Running;
pub use small_disk::SmallDisk;
