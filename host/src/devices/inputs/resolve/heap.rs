//! Memory that is free in this process, and not yet free for others.

use cofferdam_castore::directoryservice::DirectoryMemory;

/// Trees that take less leave too little behind to be worth the time, in bytes.
const LITTLE_BYTES: u64 = 16 << 20;

/// Returns to the system the memory that a tree has left in the heap, unless it is little. The allocator by itself keeps up
/// to 64 MiB for each of its arenas, of which it makes eight for each CPU.
#[derive(Debug)]
pub(super) struct Returned(pub(super) DirectoryMemory);

impl Returned {
    /// Returns what is free now.
    pub(super) fn now(&self) {
        if self.0.used() > LITTLE_BYTES {
            #[cfg(target_env = "gnu")]
            // SAFETY: it may be called at any time, from any thread, and touches nothing that is in use.
            unsafe {
                libc::malloc_trim(0);
            }
        }
    }
}

impl Drop for Returned {
    fn drop(&mut self) {
        self.now();
    }
}
