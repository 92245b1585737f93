//! The host's huge pages of the default size, as `/proc/meminfo` counts them.

use std::fs;

use super::error::VmmError;

/// The default size on x86-64, in bytes.
const DEFAULT_SIZE_BYTES: u64 = 2 << 20;

/// The huge pages of this host.
#[derive(Debug, Clone, Copy)]
pub struct HugePages {
    /// The size of one, in bytes.
    pub size_bytes: u64,
    /// How many there are, whether free or in use.
    pub total: u64,
    free: u64,
    reserved: u64,
}

impl HugePages {
    /// Counts them. If `/proc/meminfo` can't be read, there are none.
    pub fn of_host() -> Self {
        Self::read(&fs::read_to_string("/proc/meminfo").unwrap_or_default())
    }

    fn read(meminfo: &str) -> Self {
        let value = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|line| line.split_ascii_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
        };
        Self {
            size_bytes: match value("Hugepagesize") {
                0 => DEFAULT_SIZE_BYTES,
                kibibytes => kibibytes.saturating_mul(1024),
            },
            total: value("HugePages_Total"),
            free: value("HugePages_Free"),
            reserved: value("HugePages_Rsvd"),
        }
    }

    /// The size of a page, if enough of them are free for this much memory. Without this check the kernel would kill the
    /// VMM when the guest first touches memory for which there is no page.
    pub(super) fn take(&self, memory_bytes: u64) -> Result<u64, VmmError> {
        let (needed, available) = (memory_bytes.div_ceil(self.size_bytes), self.free.saturating_sub(self.reserved));
        if needed > available {
            let remedy = self.total + needed - available;
            return Err(VmmError::HugePages { needed, available, remedy });
        }
        Ok(self.size_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_pages_are_not_free() {
        let host = "MemTotal: 1 kB\nHugePages_Total:     300\nHugePages_Free:      200\nHugePages_Rsvd:       72\n\
                    HugePages_Surp:        0\nHugepagesize:       2048 kB\nHugetlb: 614400 kB\n";
        let pages = HugePages::read(host);
        assert_eq!((pages.size_bytes, pages.total), (2 << 20, 300));
        assert_eq!(pages.take(256 << 20).unwrap(), 2 << 20);
        assert_eq!(
            pages.take((256 << 20) + 1).unwrap_err().to_string(),
            "the machine needs 129 huge pages, but only 128 are free; to fix it: sudo sysctl vm.nr_hugepages=301"
        );
    }

    #[test]
    fn an_unreadable_meminfo_means_no_pages() {
        let pages = HugePages::read("");
        assert_eq!((pages.size_bytes, pages.total), (DEFAULT_SIZE_BYTES, 0));
        assert!(pages.take(1).is_err());
    }
}
