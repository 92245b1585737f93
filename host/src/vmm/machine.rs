//! The size of a machine and what it boots.

use std::path::PathBuf;

use super::VmmError;

/// The least memory with which the guest image boots and leaves a command something, in bytes.
pub const MIN_MEMORY_BYTES: u64 = 128 * MEBIBYTE;

/// The most virtual CPUs that both VMMs take.
pub const MAX_CPUS: u32 = 254;

const MEBIBYTE: u64 = 1024 * 1024;

/// What is to be started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// The kernel: a bzImage, or an ELF file with a PVH entry.
    pub kernel: PathBuf,
    /// The initial file system, a cpio archive that may be compressed.
    pub initramfs: PathBuf,
    /// Memory in bytes, rounded up to a full mebibyte; at least [`MIN_MEMORY_BYTES`].
    pub memory_bytes: u64,
    /// Virtual CPUs, from 1 to [`MAX_CPUS`].
    pub cpus: u32,
}

impl Machine {
    /// Checks the bounds and makes the paths absolute, since VMMs work in the run directory.
    pub(super) fn checked(&self) -> Result<Self, VmmError> {
        if self.memory_bytes < MIN_MEMORY_BYTES {
            let rule = format!("must be at least {MIN_MEMORY_BYTES}");
            return Err(VmmError::Machine { field: "memory_bytes", rule, value: self.memory_bytes.to_string() });
        }
        if self.cpus == 0 || self.cpus > MAX_CPUS {
            let rule = format!("must be from 1 to {MAX_CPUS}");
            return Err(VmmError::Machine { field: "cpus", rule, value: self.cpus.to_string() });
        }
        let absolute = |field, path: &PathBuf| {
            std::path::absolute(path).ok().filter(|path| path.is_file()).ok_or_else(|| VmmError::Machine {
                field,
                rule: "must be a file".into(),
                value: path.display().to_string(),
            })
        };
        Ok(Self {
            kernel: absolute("kernel", &self.kernel)?,
            initramfs: absolute("initramfs", &self.initramfs)?,
            memory_bytes: self.memory_bytes.div_ceil(MEBIBYTE).saturating_mul(MEBIBYTE),
            cpus: self.cpus,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_named() {
        let file = std::env::current_exe().unwrap();
        let good = Machine { kernel: file.clone(), initramfs: file, memory_bytes: MIN_MEMORY_BYTES + 1, cpus: 1 };
        assert_eq!(good.checked().unwrap().memory_bytes, MIN_MEMORY_BYTES + MEBIBYTE);
        let message = |machine: Machine| machine.checked().unwrap_err().to_string();
        assert_eq!(
            message(Machine { memory_bytes: 1, ..good.clone() }),
            "the machine's memory_bytes must be at least 134217728, not 1"
        );
        assert_eq!(message(Machine { cpus: 0, ..good.clone() }), "the machine's cpus must be from 1 to 254, not 0");
        assert_eq!(message(Machine { cpus: 255, ..good.clone() }), "the machine's cpus must be from 1 to 254, not 255");
        assert_eq!(
            message(Machine { kernel: "/nowhere/kernel".into(), ..good }),
            "the machine's kernel must be a file, not /nowhere/kernel"
        );
    }
}
