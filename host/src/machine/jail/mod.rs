//! How every helper process is started, watched and ended.
//!
//! ```text
//!   any task ── Program ──▶ spawner thread ── fork ──▶ child: session, death signal, no new privileges,
//!                              │                        no core, only the descriptors meant for it ── exec
//!                              ▼
//!   any task ◀── Child ── wait / kill / said
//!                              ▲
//!                     tail of stdout and stderr, 16 KiB
//! ```
//!
//! A program with a [`View`] is walled in as well, see `fork`, where the host can do that ([`Walls`]). Our own device processes
//! also give up everything that they haven't opened by then, see [`confine_without_files`].
//!
//! What holds for each child, and why:
//!
//! | rule | reason |
//! |---|---|
//! | all are forked by one thread, which outlives them | the parent-death signal fires when the *thread* that forked ends |
//! | SIGKILL when the parent dies, and the parent checked after asking for it | whatever kills the host process, no VM and no device stays behind; without the check a parent that died before the request would never be noticed |
//! | a session of its own | a terminal's Ctrl-C reaches the host alone, which then ends its children in order; the whole group can be killed |
//! | `no_new_privs` | nothing that it runs can gain what we don't have |
//! | no core dump | a VMM's memory is the guest's: up to gigabytes, and somebody's sources |
//! | empty environment, null stdin | nothing of the host's session (tokens, paths, a terminal) is in reach of a broken VMM |
//! | walled in: seven namespaces, and a root with its libraries and its view | no path leads to the daemon's socket, the store, another machine or `/proc` |
//! | walled in: a user id for each machine, where the host has such | a path that is found after all leads to somebody else's file |
//! | walled in: no capability, and a filter of system calls on every thread | rights that a user namespace gives, and the kernel's rarely used parts |
//! | a cgroup for each machine, where the host delegates one | memory, processor time, processes and disk accesses of all its helpers together are bounded |
//! | every descriptor closed but those handed down | a socket or file of another build must not leak into this one's processes |
//! | output kept in a bounded tail | it is somebody else's text, possibly a guest's: enough to explain a death, never enough to fill memory |

mod cgroups;
mod child;
mod confine;
mod descriptors;
mod filter;
mod fork;
mod ids;
mod libraries;
mod program;
mod spawner;
mod tail;
mod view;
mod walls;

pub(crate) use cgroups::Delegated;
pub use cgroups::{DiskRates, Shares};
pub use child::Child;
pub use confine::{ConfineError, confine_to_reading, confine_without_files, landlock_version};
pub(crate) use descriptors::allow_descriptors;
pub use program::Program;
pub use spawner::{SpawnError, Spawner};
pub(crate) use tail::{escape, one_line};
pub use view::View;
pub(crate) use walls::Best;
pub use walls::{Rules, Walls, WallsError};

#[cfg(test)]
mod tests;
