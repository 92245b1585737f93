//! What a daemon uses of its host.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

/// The resources that a process might leak.
#[derive(Debug)]
pub(crate) struct Use {
    pub(crate) resident_bytes: u64,
    pub(crate) descriptors: usize,
    pub(crate) threads: usize,
}

impl Use {
    pub(crate) fn of(pid: i32) -> Result<Self> {
        let place = Path::new("/proc").join(pid.to_string());
        let status = fs::read_to_string(place.join("status"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("it has no VmRSS")?;
        let kib: u64 = resident.trim().trim_end_matches("kB").trim().parse()?;
        let count = |name| anyhow::Ok(fs::read_dir(place.join(name))?.count());
        Ok(Self { resident_bytes: kib << 10, descriptors: count("fd")?, threads: count("task")? })
    }
}
