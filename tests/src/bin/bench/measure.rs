//! Times, peak memory, and a line for each comparison.

use std::{
    fs,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

/// Rounds. Odd, so that there is a median.
pub(crate) const ROUNDS: usize = 5;

/// Rounds for measurements that move gigabytes.
pub(crate) const LARGE_ROUNDS: usize = 3;

/// The costs of one side, in each round.
#[derive(Default)]
pub(crate) struct Series {
    pub(crate) times: Vec<Duration>,
    /// Peak memory of this process during the work, file mappings included.
    peak_bytes: Option<u64>,
}

impl Series {
    /// Times that were measured elsewhere.
    pub(crate) const fn of(times: Vec<Duration>) -> Self {
        Self { times, peak_bytes: None }
    }

    /// Works in this process.
    pub(crate) fn work<T>(&mut self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        reset_peak()?;
        let start = Instant::now();
        let done = work()?;
        self.times.push(start.elapsed());
        self.peak_bytes = self.peak_bytes.max(Some(peak_bytes()?));
        Ok(done)
    }

    /// Runs a program.
    pub(crate) fn run(&mut self, command: &mut Command) -> Result<()> {
        let start = Instant::now();
        let output = command.stdin(Stdio::null()).output().with_context(|| format!("can't start {command:?}"))?;
        self.times.push(start.elapsed());
        ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    fn median(&self) -> f64 {
        let mut times = self.times.clone();
        times.sort();
        times[times.len() / 2].as_secs_f64()
    }
}

fn reset_peak() -> Result<()> {
    fs::write("/proc/self/clear_refs", "5").context("can't begin to measure memory")
}

fn peak_bytes() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
    peak.map(|kib: u64| kib * 1024).context("the kernel does not say how much memory was used")
}

pub(crate) fn print_head() {
    println!("medians of {ROUNDS} rounds, or of {LARGE_ROUNDS} where gigabytes are moved, peers in turn");
    println!("{:<40} {:>10} {:>10} {:>7} {:>9}  aim", "", "cofferdam", "peer", "ratio", "peak");
}

pub(crate) fn report(what: &str, ours: &Series, peer: &Series, aim: &str) {
    let peak = ours.peak_bytes.map_or_else(|| "-".to_owned(), |bytes| format!("{} MiB", bytes >> 20));
    let (ours, peer) = (ours.median(), peer.median());
    println!("{what:<40} {ours:>8.3} s {peer:>8.3} s {:>7.2} {peak:>9}  {aim}", ours / peer);
}
