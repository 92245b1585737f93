//! The size of a machine and what it boots.

use std::fs;
use std::path::{Path, PathBuf};

use super::error::VmmError;
use super::huge_pages::HugePages;
use super::layout::SCRATCH_DISK;
use crate::machine::device::Attachment;

/// The least memory with which the guest image boots and leaves a command something, in bytes.
pub const MIN_MEMORY_BYTES: u64 = 128 * MEBIBYTE;

/// The most virtual CPUs that both VMMs take.
pub const MAX_CPUS: u32 = 254;

const MEBIBYTE: u64 = 1024 * 1024;

/// The machine to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The kernel: a bzImage, or an ELF file with a PVH entry.
    pub kernel: PathBuf,
    /// The initial file system, a cpio archive that may be compressed.
    pub initramfs: PathBuf,
    /// Memory in bytes, rounded up to a full mebibyte; at least [`MIN_MEMORY_BYTES`].
    pub memory_bytes: u64,
    /// Virtual CPUs, from 1 to [`MAX_CPUS`]; the guest sees as many cores of one socket.
    pub cpus: u32,
    /// The guest's CPU model, by QEMU's name for it. Only QEMU can set one. Default: the host's own CPU, or the most capable
    /// one that QEMU emulates.
    pub cpu_model: Option<String>,
    /// Whether the host's huge pages back its memory. Enough of them must be free.
    pub hugepages: bool,
    /// The devices that have a process of their own.
    pub attachments: Vec<Attachment>,
    /// Whether the guest can run machines itself, with the CPU's virtualisation. A guest without it can't attack the host's
    /// support for that.
    pub nested: bool,
}

impl Config {
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
        let named = |model: &str| {
            !model.is_empty() && model.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        };
        if let Some(model) = self.cpu_model.as_ref().filter(|model| !named(model)) {
            let rule = "must be a name of letters, digits, \"-\", \"_\" and \".\"".to_owned();
            return Err(VmmError::Machine { field: "cpu_model", rule, value: format!("{model:?}") });
        }
        let unit = if self.hugepages { HugePages::of_host().take(self.memory_bytes)? } else { MEBIBYTE };
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
            memory_bytes: self.memory_bytes.div_ceil(unit).saturating_mul(unit),
            cpus: self.cpus,
            cpu_model: self.cpu_model.clone(),
            hugepages: self.hugepages,
            attachments: self.attachments.clone(),
            nested: self.nested,
        })
    }

    /// The longest file that a VMM writes, in bytes: its machine's scratch disk, or the memory, which is a file to its devices.
    pub(super) fn longest_file(&self, run_dir: &Path) -> u64 {
        let scratch = fs::metadata(run_dir.join(SCRATCH_DISK)).map_or(0, |disk| disk.len());
        scratch.max(self.memory_bytes)
    }

    /// The size of the huge pages that back its memory, in bytes. Without `hugepages` the kernel chooses.
    pub(super) fn huge_page_bytes(&self) -> Option<u64> {
        self.hugepages.then(|| HugePages::of_host().size_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_named() {
        let file = std::env::current_exe().unwrap();
        let good = Config {
            kernel: file.clone(),
            initramfs: file,
            memory_bytes: MIN_MEMORY_BYTES + 1,
            cpus: 1,
            cpu_model: Some("Haswell-noTSX".to_owned()),
            hugepages: false,
            attachments: Vec::new(),
            nested: false,
        };
        assert_eq!(good.checked().unwrap().memory_bytes, MIN_MEMORY_BYTES + MEBIBYTE);
        let message = |config: Config| config.checked().unwrap_err().to_string();
        assert_eq!(
            message(Config { memory_bytes: 1, ..good.clone() }),
            "the machine's memory_bytes must be at least 134217728, not 1"
        );
        assert_eq!(message(Config { cpus: 0, ..good.clone() }), "the machine's cpus must be from 1 to 254, not 0");
        assert_eq!(message(Config { cpus: 255, ..good.clone() }), "the machine's cpus must be from 1 to 254, not 255");
        assert_eq!(
            message(Config { cpu_model: Some("max,+svm".to_owned()), ..good.clone() }),
            "the machine's cpu_model must be a name of letters, digits, \"-\", \"_\" and \".\", not \"max,+svm\""
        );
        assert_eq!(
            message(Config { kernel: "/nowhere/kernel".into(), ..good }),
            "the machine's kernel must be a file, not /nowhere/kernel"
        );
    }
}
