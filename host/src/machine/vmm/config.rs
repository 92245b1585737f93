//! The size of a machine and what it boots.

use std::fs;
use std::path::{Path, PathBuf};

use super::error::VmmError;
use super::layout::SCRATCH_DISK;
use crate::machine::device::Attachment;

/// The least memory with which the guest image boots and leaves a command something, in bytes.
pub const MIN_MEMORY_BYTES: u64 = 128 * MEBIBYTE;

/// The most virtual CPUs that both VMMs take.
pub const MAX_CPUS: u32 = 254;

const MEBIBYTE: u64 = 1024 * 1024;

/// What is to be started.
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
    /// The model of CPU that the guest sees, by QEMU's name for it, which only QEMU can set; without one, the host's own
    /// or the most that emulation can do.
    pub cpu_model: Option<String>,
    /// Whether memory is made of the host's huge pages, of which enough must be free.
    pub hugepages: bool,
    /// Its devices that are served by processes of their own.
    pub attachments: Vec<Attachment>,
    /// Whether it sees the virtualisation of its CPU, and so can run machines itself. A guest that doesn't see it can't
    /// attack the host's.
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

    /// The size of the pages that its memory is made of, in bytes, where that isn't left to the kernel.
    pub(super) fn huge_page_bytes(&self) -> Option<u64> {
        self.hugepages.then(|| HugePages::of_host().size_bytes)
    }
}

/// The host's huge pages of the default size.
#[derive(Debug, Default)]
struct HugePages {
    size_bytes: u64,
    total: u64,
    free: u64,
    reserved: u64,
}

impl HugePages {
    fn of_host() -> Self {
        // An unreadable file says that there are none.
        Self::read(&fs::read_to_string("/proc/meminfo").unwrap_or_default())
    }

    fn read(meminfo: &str) -> Self {
        let value = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|line| line.split_ascii_whitespace().next()?.parse().ok()).unwrap_or(0)
        };
        Self {
            size_bytes: value("Hugepagesize") * 1024,
            total: value("HugePages_Total"),
            free: value("HugePages_Free"),
            reserved: value("HugePages_Rsvd"),
        }
    }

    /// The size of a page, if there are enough of them for so much memory. VMMs find out too late: the one that is
    /// missing kills them when the guest first touches it.
    fn take(&self, memory_bytes: u64) -> Result<u64, VmmError> {
        let unit = self.size_bytes.max(MEBIBYTE);
        let (needed, available) = (memory_bytes.div_ceil(unit), self.free.saturating_sub(self.reserved));
        if needed > available {
            let remedy = self.total + needed - available;
            return Err(VmmError::HugePages { needed, available, remedy });
        }
        Ok(unit)
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

    #[test]
    fn huge_pages_are_counted_before_they_are_missed() {
        let host = "MemTotal: 1 kB\nHugePages_Total:     300\nHugePages_Free:      200\nHugePages_Rsvd:       72\n\
                    HugePages_Surp:        0\nHugepagesize:       2048 kB\nHugetlb: 614400 kB\n";
        let pages = HugePages::read(host);
        assert_eq!(pages.take(256 << 20).unwrap(), 2 << 20);
        assert_eq!(
            pages.take((256 << 20) + 1).unwrap_err().to_string(),
            "the machine takes 129 huge pages, and 128 are to be had; to mend it: sudo sysctl vm.nr_hugepages=301"
        );
        assert!(HugePages::read("").take(1).is_err());
    }
}
