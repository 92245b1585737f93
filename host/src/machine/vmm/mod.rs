//! The virtual machine monitors (VMMs) that can run a build, behind one trait.
//!
//! ```text
//!   survey ── choose ──▶ Choice ── vmm() ──▶ Vmm::start(run directory, Config) ──▶ Vm ── died / kill
//!
//!   run directory                     who listens             who connects
//!     fs.sock, …     vhost-user       our devices, before     VMM
//!     vsock/s_17222  hybrid vsock     the host, before        VMM (cloud-hypervisor) or vhost-device-vsock (QEMU)
//!     vsock/s        hybrid vsock     the same two            nobody: the host never dials the guest
//!     vsock.sock     vhost-user       vhost-device-vsock      we, and hand the connection to QEMU
//!     ch.sock        HTTP             cloud-hypervisor        we
//!     scratch.ext4   raw disk         opened by the VMM
//! ```
//!
//! Both give the guest the same devices: the [attachments](Config::attachments), one vsock, one disk, an entropy source and a
//! console. The host keeps the last lines of the console. There is no network but that of an attachment.
//!
//! The directory `vsock` holds these sockets and nothing else, since a guest can connect to any socket in it whose name ends
//! in `_` and a port. All processes have the run directory as their working directory and use relative names for these
//! files, because the path of a Unix socket has at most 107 bytes.
//!
//! A guest that powers off, panics or resets ends its [`Vm`]. [`Death`](super::Death) says which it was, if the VMM does.

mod api;
mod choice;
mod cloud_hypervisor;
mod config;
mod control;
mod error;
mod events;
mod find;
mod huge_pages;
mod kind;
mod kvm;
mod layout;
mod qemu;
mod tsc;
mod vm;

pub use choice::{Candidate, Choice, ChooseError, Survey, choose, survey};
pub use config::{Config, MAX_CPUS, MIN_MEMORY_BYTES};
pub use error::VmmError;
pub(crate) use events::told;
pub use find::{Found, Missing};
pub use huge_pages::HugePages;
pub use kind::{Accelerator, Kind};
pub use kvm::{KvmError, nests as kvm_nests};
pub use layout::{KERNEL_PARAMETERS, SCRATCH_DISK, VSOCK, VSOCK_DIRECTORY};
pub use qemu::{TCG_CODE_MIB, TCG_CPU, kernel_command_line as qemu_kernel_command_line};
pub use vm::{Vm, Vmm};

#[cfg(test)]
mod tests;
