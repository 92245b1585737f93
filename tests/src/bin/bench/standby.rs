//! The time of builds that take a machine from the stock.

use std::{ffi::OsStr, time::Instant};

use anyhow::{Context as _, Result};
use cofferdam_proto::cofferdam::v1::{Phase, event::Event::Phase as PhaseBegun};
use cofferdam_tests::{Cofferdam, Daemon, processes::Memory, request::shell};
use tempfile::TempDir;

use super::{
    measure::{ROUNDS, Series, report},
    service::{Client, follow, next, start, submit},
};

/// A build that sees a path of the host boots a machine of its own.
const CONFIG: &str = "
    [host_paths]
    \"/shown\" = \"/usr/share/zoneinfo\"
    [budget]
    builds = 2
    cpus = 4
    memory = \"4G\"
    [build]
    memory = \"256M\"
    cpus = 1
    [standby]
    machines = 1
";

pub(crate) fn standby(_: &TempDir) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let _entered = runtime.enter();
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start_with(&cofferdam, CONFIG, &[("COFFERDAM_LOG", OsStr::new("info"))]);
    daemon.running().wait_for_times(READY, 1);
    idle_memory(&cofferdam);
    runtime.block_on(compare(&daemon))?;
    daemon.end().succeeds();
    Ok(())
}

const READY: &str = "a standby machine is ready";

async fn compare(daemon: &Daemon) -> Result<()> {
    let mut client = Client::new(daemon.peer().raw_channel());
    let mut busy = start(&mut client, "while :; do :; done", &[]).await?;
    while !matches!(next(&mut busy).await?.event, Some(PhaseBegun(phase)) if phase == Phase::Running as i32) {}
    let (mut ours, mut peer) = (Series::default(), Series::default());
    for round in 0..ROUNDS {
        // The first machine has gone to the busy build.
        daemon.running().wait_for_times(READY, round + 2);
        for (series, shown) in [(&mut ours, None), (&mut peer, Some("/shown"))] {
            let mut request = shell(&format!("echo {round} > out"), &["build/out"]);
            let constraints = request.constraints.as_mut().context("it names its system")?;
            constraints.available_ro_paths.extend(shown.map(str::to_owned));
            let begun = Instant::now();
            follow(submit(&mut client, request).await?).await?;
            series.times.push(begun.elapsed());
        }
    }
    report("trivial build, standby : boots", &ours, &peer, "≤ 0.30");
    Ok(())
}

/// The memory of the processes of a machine in stock.
fn idle_memory(cofferdam: &Cofferdam) {
    let helpers = cofferdam.processes().into_iter().filter(|process| process.is_walled);
    for (name, memory) in helpers.filter_map(|process| Some((process.name, Memory::of(process.pid)?))) {
        println!(
            "in stock: {name:<30} {:>5} MiB, of the machine's memory {:>5} MiB",
            memory.own >> 20,
            memory.shared >> 20
        );
    }
}
