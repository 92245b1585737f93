//! Keeps what this process has in its memory from other processes of its user: requests, logs, keys and credentials.

use std::io;

use nix::sys::{
    prctl::set_dumpable,
    resource::{Resource, setrlimit},
};

/// From now on this process can't be traced, its memory and its descriptors can't be read through `/proc`, and it leaves
/// no core dump, whoever its user is; root with CAP_SYS_PTRACE still can. A program that it executes begins anew.
///
/// Its own `/proc/self/fd` stays open to it. The other files of `/proc/self` then belong to root, so that an ordinary user's
/// process can no longer write to them.
///
/// # Errors
///
/// A filter of system calls refuses it.
pub(crate) fn keep_memory_private() -> io::Result<()> {
    set_dumpable(false)?;
    Ok(setrlimit(Resource::RLIMIT_CORE, 0, 0)?)
}
