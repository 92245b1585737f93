//! The virtual machine monitors (VMMs) that can run a build, behind one trait.
//!
//! ```text
//!   survey ── choose ──▶ Choice ── vmm() ──▶ Vmm::start(run directory, Machine) ──▶ Vm ── died / kill
//!
//!   run directory                     who listens             who connects
//!     fs.sock        vhost-user-fs    our device, before      VMM
//!     vsock/s_17222  hybrid vsock     the host, before        VMM (cloud-hypervisor) or vhost-device-vsock (QEMU)
//!     vsock/s        hybrid vsock     the same two            nobody: the host never dials the guest
//!     vsock.sock     vhost-user       vhost-device-vsock      we, and hand the connection to QEMU
//!     ch.sock        HTTP             cloud-hypervisor        we
//!     scratch.ext4   raw disk         opened by the VMM
//! ```
//!
//! Both give the guest the same devices: one vhost-user-fs, one vsock, one disk, an entropy source, a console of which
//! the host keeps the tail, no network. The directory `vsock` holds these sockets and nothing else, since a guest reaches
//! whatever is there under a name that ends in `_` and a port. All processes have the run directory as their working directory and name
//! these files relatively, because the path of a Unix socket has at most 107 bytes.
//!
//! A guest that powers off, panics or resets ends its [`Vm`]; [`Death`] tells which, where the VMM does.

mod api;
mod choice;
mod cloud_hypervisor;
mod events;
mod find;
mod kvm;
mod machine;
mod qemu;
mod tsc;
mod vm;

use std::path::Path;

use async_trait::async_trait;

use crate::machine::jail::Spawner;

pub use choice::{Accelerator, Candidate, Choice, ChooseError, Found, Kind, Missing, Survey, choose, survey};
pub(crate) use events::told;
pub use kvm::{KvmError, nests as kvm_nests};
pub use machine::{MAX_CPUS, MIN_MEMORY_BYTES, Machine};
pub use vm::{Cause, Death, Vm, VmmError};

/// The socket in the run directory on which the vhost-user-fs device listens.
pub const FS_SOCKET: &str = "fs.sock";

/// The socket there on which the device for paths of the host listens, where a machine has one.
pub const PATHS_SOCKET: &str = "paths.sock";

/// The directory in the run directory for the hybrid vsock sockets, and for nothing else.
pub const VSOCK_DIRECTORY: &str = "vsock";

/// The hybrid vsock socket, in that directory. A guest that dials port P of the host reaches the socket of this name
/// followed by `_P`.
pub const VSOCK: &str = "vsock/s";

/// The raw disk in the run directory that holds the guest's scratch file system.
pub const SCRATCH_DISK: &str = "scratch.ext4";

/// The guest's vsock address. The same for all, since each VM has a vsock device of its own.
const GUEST_CID: u32 = 3;

/// Length of the virtiofs request queue, in descriptors.
const FS_QUEUE_SIZE: u32 = 512;

/// A virtual machine monitor.
#[async_trait]
pub trait Vmm: Send + Sync {
    /// Starts a machine whose run directory holds all that the module's table says is there before. Returns once the
    /// processes run; whether the guest comes up shows in its call to the host. After an error nothing runs.
    async fn start(&self, spawner: &Spawner, run_dir: &Path, machine: &Machine) -> Result<Vm, VmmError>;
}

#[cfg(test)]
mod tests;
