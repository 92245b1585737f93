//! PID 1 of the guest. It runs one build and powers the machine off, even after an error.
//!
//! The modules, top first; each uses only modules below it:
//!
//! ```text
//!   session    the conversation with the host
//!   shell      an interactive shell in a failed build
//!   build      one build: root, command, outputs
//!   rehearsal  a build of nothing, before there is a request
//!   outputs    sends the outputs, or the files that a failed build left
//!   watch      sends the command's output to the host until the command has ended
//!   terminal   the terminal of a shell, or of an interactive command
//!   command    the command's processes: namespaces, a small init, the command itself
//!   network    the interface of a build with a network
//!   confine    the seccomp filter of the command
//!   interpreter  why a program that exists can't be found
//!   cgroup     limits and counts the build's memory and processes
//!   root       mounts the build's root
//!   plan       decides what the build's root consists of, without any I/O
//!   scratch    mounts and grows the scratch disk
//!   host       the vsock connection
//!   boot       file systems and kernel modules; power off
//!   console    errors on the console
//!   error, sys, layout
//! ```
//!
//! There is no async code, and one thread, beside which a second one mounts the scratch disk before guest-init greets the host.
//! Nothing here trusts the build, and the host trusts nothing that guest-init sends.
#![cfg_attr(not(test), no_main)]

mod boot;
mod build;
mod cgroup;
mod command;
mod confine;
mod console;
mod error;
mod host;
mod interpreter;
mod layout;
mod network;
mod outputs;
mod plan;
mod rehearsal;
mod root;
mod scratch;
mod session;
mod shell;
mod sys;
mod terminal;
mod watch;

/// Replaces Rust's own entry point, which aborts if the image has neither `/dev/console` nor `/dev/null`.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn main() -> std::ffi::c_int {
    if std::process::id() != 1 {
        eprintln!("guest-init only runs as the first process of a Cofferdam microVM");
        return 2;
    }
    std::panic::set_hook(Box::new(|panic| {
        console::log(&panic.to_string());
        boot::power_off()
    }));
    match boot::prepare() {
        Ok(()) => session::run().unwrap_or_else(|error| console::log_error(&error)),
        Err(error) => console::log_error(&error),
    }
    boot::power_off()
}
