/// Resources of all builds together: the budget, or its used part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Budget {
    /// Memory of all builds, in bytes.
    pub memory_bytes: u64,
    /// CPUs of all machines.
    pub cpus: u32,
    /// Builds at a time.
    pub builds: u32,
}

impl Budget {
    /// The same, and a build or machine that needs this.
    pub(crate) fn with(self, need: Need) -> Self {
        Self {
            memory_bytes: self.memory_bytes.saturating_add(need.memory_bytes),
            cpus: self.cpus.saturating_add(need.cpus),
            builds: self.builds.saturating_add(1),
        }
    }

    /// What is left of it beside this; nothing rather than less.
    pub(crate) fn without(self, used: Self) -> Self {
        Self {
            memory_bytes: self.memory_bytes.saturating_sub(used.memory_bytes),
            cpus: self.cpus.saturating_sub(used.cpus),
            builds: self.builds.saturating_sub(used.builds),
        }
    }

    /// Whether it is no more of anything than this.
    pub(crate) fn fits(self, room: Self) -> bool {
        self.memory_bytes <= room.memory_bytes && self.cpus <= room.cpus && self.builds <= room.builds
    }
}

/// Resources of one build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Need {
    /// Memory of the host, in bytes.
    pub memory_bytes: u64,
    /// CPUs of its machine.
    pub cpus: u32,
    /// What it may grow to on the disk, in bytes. Counts for its client only.
    pub disk_bytes: u64,
}

/// What all running builds of one client have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Load {
    /// How many they are.
    pub builds: u32,
    /// What they may grow to on the disk, in bytes.
    pub disk_bytes: u64,
}
