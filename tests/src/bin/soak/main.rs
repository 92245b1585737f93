//! `soak`: many builds by daemons whose processes are killed at random, and whose tenants are hostile.
//!
//! ```text
//!   disturbed   in a row ──▶ at once, while clients cancel and leave, helper processes are killed, and once the daemon is ──▶ the end
//!               result of each            result of each that somebody waited for                       nothing is left, or has grown
//!   hostile     an honest tenant alone ──▶ beside each attack of others ──▶ beside all attacks ──▶ the end
//!               its times                  its delays are bounded           its builds are right
//! ```
//!
//! The clients' actions are drawn from a seed, which is printed. So a run can be repeated, except for its timing.

mod disturbed;
mod hostile;
mod usage;
mod watched;

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use clap::Parser;
use cofferdam_proto::cofferdam::v1::{self as ours, build_service_client::BuildServiceClient};
use cofferdam_tests::{Cofferdam, Daemon, stretched};
use tokio::time::sleep;

/// Most by which a daemon's memory may grow between the begin of a series and its end, in bytes.
const MAX_GROWTH_BYTES: u64 = 32 << 20;

/// A client's pause before it retries.
const RETRY: Duration = Duration::from_millis(500);

const CONFIG: &str = "
    [budget]
    builds = 4
    [build]
    memory = \"256M\"
    [queue]
    max = 1000
    max_per_client = 1000
";

/// Have daemons run many builds, kill their processes at random, set hostile tenants on them, and check for leftovers.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Builds one after the other
    #[arg(long, default_value_t = 500)]
    in_a_row: usize,
    /// Builds at once, most of them disturbed in some way
    #[arg(long, default_value_t = 50)]
    at_once: usize,
    /// Seed of the clients' actions
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    hostile: hostile::Scale,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    println!("seed {}", arguments.seed);
    let mounts = fs::read("/proc/self/mounts")?;
    let cofferdam = Arc::new(Cofferdam::new());
    if arguments.in_a_row + arguments.at_once > 0 {
        let daemon = Daemon::start(&cofferdam, CONFIG);
        disturbed::in_a_row(&daemon, arguments.in_a_row).await?;
        let daemon = disturbed::at_once(&cofferdam, daemon, &arguments).await?;
        nothing_runs(&daemon).await?;
        daemon.end().succeeds();
    }
    if arguments.hostile.builds > 0 {
        let run = hostile::run(&cofferdam, &arguments.hostile).await;
        // What the daemon leaves when it is killed would be reported instead.
        run.inspect_err(|error| eprintln!("{error:#}"))?;
    }
    cofferdam.processes_are_gone_within(Duration::from_secs(10));
    let left = cofferdam.leftovers();
    ensure!(left.is_empty(), "files are left: {left:?}");
    ensure!(fs::read("/proc/self/mounts")? == mounts, "mounts are left");
    let directory = cofferdam.files();
    let place = directory.parent().expect("it is in the test's directory").to_string_lossy().into_owned();
    let sockets = fs::read_to_string("/proc/net/unix")?;
    let left: Vec<_> = sockets.lines().filter(|line| line.contains(&place)).collect();
    ensure!(left.is_empty(), "sockets are left: {left:?}");
    cofferdam.command(["store", "verify"]).succeeds();
    println!("the store is sound, and no process, file, mount, socket or descriptor is left");
    Ok(())
}

/// Waits until the daemon has no active build.
async fn nothing_runs(daemon: &Daemon) -> Result<()> {
    let mut client = BuildServiceClient::new(daemon.peer().raw_channel());
    let deadline = Instant::now() + stretched(Duration::from_secs(120));
    loop {
        let asked = ours::ListRequest { active: true, ..Default::default() };
        let active = client.list(asked).await?.into_inner().builds;
        if active.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "these builds are still active without a client: {active:?}");
        sleep(RETRY).await;
    }
}
