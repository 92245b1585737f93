//! PID 1 of the guest.
//!
//! ```text
//!   boot      file systems, modules, protection from the OOM killer
//!   session   dials the host, says Hello, gets the specification, reports, waits for Acknowledge
//!     scratch   mounts and grows the scratch disk
//!     plan      what the build's root is made of, a pure function
//!     root      makes it
//!     cgroup    bounds the build's memory and processes, counts what it uses
//!     command   namespaces, a small init inside of them, and the command, confined
//!     watch     streams its output until it ends
//!     outputs   sends the outputs, or what a failed build has left
//!     shell     lets somebody look around in a failed build
//!   power off, whatever happened
//! ```
//!
//! One thread, no async, no state that outlives the one build. Nothing here trusts the build; the host trusts nothing
//! that comes from here.
#![cfg_attr(not(test), no_main)]

mod boot;
mod cgroup;
mod command;
mod confine;
mod error;
mod outputs;
mod plan;
mod root;
mod scratch;
mod session;
mod shell;
mod sys;
mod watch;

/// The build's user.
const BUILD_UID: u32 = 1000;
/// The build's group.
const BUILD_GID: u32 = 100;

/// Where the inputs are mounted.
const INPUTS: &str = "/inputs";
/// Where the paths of the host are mounted, if there are any.
const PATHS: &str = "/paths";
/// Where the scratch disk is mounted.
const SCRATCH: &str = "/scratch";
/// Where a tmpfs holds what every build's root has beside inputs and scratch.
const SKELETON: &str = "/skeleton";
/// Where the build's root is assembled.
const ROOT: &str = "/build-root";
/// The static shell that becomes `/bin/sh` when a request asks for it.
const SHELL: &str = "/sh";

/// Takes the place of Rust's own entry, which would abort where the image has neither `/dev/console` nor `/dev/null`.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn main() -> std::ffi::c_int {
    if std::process::id() != 1 {
        eprintln!("guest-init is the first process of a Cofferdam microVM and does nothing elsewhere");
        return 2;
    }
    session::run()
}
