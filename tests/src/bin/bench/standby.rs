//! The time of builds that take a machine from the stock.

use std::{ffi::OsStr, time::Instant};

use anyhow::{Context as _, Result};
use cofferdam_proto::cofferdam::v1::{Phase, event::Event::Phase as PhaseBegun};
use cofferdam_tests::{Cofferdam, Daemon, processes::Memory, request::shell};
use tempfile::TempDir;

use super::{
    containers::Containers,
    measure::{ROUNDS, Series, report},
    service::{Client, follow, next, start, submit},
    throughput::CONFIG,
    vm,
};

/// The memory of a usual build, as [`CONFIG`] says.
const MEMORY_BYTES: u64 = 256 << 20;

const STANDBY: &str = "
    [standby]
    machines = 1
";

pub(crate) fn standby(directory: &TempDir) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let _entered = runtime.enter();
    let containers = runtime.block_on(Containers::start(directory.path()))?;
    let cofferdam = Cofferdam::new();
    let daemon =
        Daemon::start_with(&cofferdam, &format!("{CONFIG}{STANDBY}"), &[("COFFERDAM_LOG", OsStr::new("info"))]);
    daemon.running().wait_for_times(READY, 1);
    idle_memory(&cofferdam);
    let (sent, speaks) = runtime.block_on(beside_containers(&daemon, &containers))?;
    let round_trips = vm::vsock_round_trips(directory)?;
    report("request to guest, standby : vsock", &sent, &round_trips, "≤ 20");
    report("request to first line, standby : vsock", &speaks, &round_trips, "");
    runtime.block_on(beside_boots(&daemon))?;
    daemon.end().succeeds();
    Ok(())
}

const READY: &str = "a standby machine is ready";

/// Compares with containers. Returns the times until the guest had the request, and until its command's first line came.
async fn beside_containers(daemon: &Daemon, containers: &Containers<'_>) -> Result<(Series, Series)> {
    let mut client = Client::new(daemon.peer().raw_channel());
    let [mut ours, mut sent, mut speaks, mut peer] = [const { Series::of(Vec::new()) }; 4];
    for round in 0..ROUNDS {
        // No machine boots at the side.
        daemon.running().wait_for_times(READY, round + 1);
        let begun = Instant::now();
        containers.run(&format!("alone {round}")).await?;
        peer.times.push(begun.elapsed());
        let begun = Instant::now();
        let script = format!("echo runs; echo alone {round} > out");
        let told = follow(start(&mut client, &script, &["build/out"]).await?).await?;
        ours.times.push(begun.elapsed());
        sent.times.push(told.running.context("it never ran")? - begun);
        speaks.times.push(told.logged.context("it wrote no line")? - begun);
    }
    report(&format!("trivial build, standby : {}", containers.name()), &ours, &peer, "≤ 3");
    Ok((sent, speaks))
}

/// Compares with machines that boot, beside a build that keeps a processor busy.
async fn beside_boots(daemon: &Daemon) -> Result<()> {
    daemon.running().wait_for_times(READY, ROUNDS + 1);
    let mut client = Client::new(daemon.peer().raw_channel());
    let mut busy = start(&mut client, "while :; do :; done", &[]).await?;
    while !matches!(next(&mut busy).await?.event, Some(PhaseBegun(phase)) if phase == Phase::Running as i32) {}
    let (mut ours, mut peer) = (Series::default(), Series::default());
    for round in 0..ROUNDS {
        // The one before has gone to the busy build.
        daemon.running().wait_for_times(READY, ROUNDS + round + 2);
        // A build of a size that no other had finds nothing in stock.
        let unusual = MEMORY_BYTES + ((round as u64 + 1) << 20);
        for (series, memory) in [(&mut ours, MEMORY_BYTES), (&mut peer, unusual)] {
            let mut request = shell(&format!("echo {round} > out"), &["build/out"]);
            request.constraints.as_mut().context("it names its system")?.min_memory = memory;
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
