//! The names of a machine's sockets and disk in its run directory.

/// The directory in the run directory for the hybrid vsock sockets only.
pub const VSOCK_DIRECTORY: &str = "vsock";

/// The hybrid vsock socket, in that directory. A guest that dials port P of the host reaches the socket of this name
/// followed by `_P`.
pub const VSOCK: &str = "vsock/s";

/// The raw disk in the run directory that holds the guest's scratch file system.
pub const SCRATCH_DISK: &str = "scratch.ext4";

/// What every guest's kernel is told. Nobody reads what it says at boot. A panic resets the machine at once. The machine holds one
/// build and no secrets of anybody else, so its kernel needs no mitigations: the host protects itself. Distributions' kernels
/// test all their cryptography at boot unless they are told not to.
pub const KERNEL_PARAMETERS: &str = "quiet panic=-1 mitigations=off cryptomgr.notests";

/// The guest's vsock address. The same for all, since each VM has a vsock device of its own.
pub(super) const GUEST_CID: u32 = 3;
