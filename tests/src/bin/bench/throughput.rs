//! How many trivial builds a daemon does in a minute, and the processor time of each.

use std::{
    ffi::OsStr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use cofferdam_tests::{Cofferdam, Daemon, processes::processor_time};
use futures::future::try_join_all;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::{
    containers::Containers,
    measure::{Series, report},
    service::{Client, follow, start},
};

const BUILDS: u32 = 30;

/// Room for two builds, and for two standby machines beside them.
pub(super) const CONFIG: &str = "
    [budget]
    builds = 2
    cpus = 4
    memory = \"4G\"
    [build]
    memory = \"256M\"
    cpus = 1
";

const STANDBY: &str = "
    [standby]
    machines = 2
";

/// A daemon that takes less processor time than this in [`SETTLES`] boots no machine.
const IDLE: Duration = Duration::from_millis(100);
const SETTLES: Duration = Duration::from_secs(1);

pub(crate) fn throughput(directory: &TempDir) -> Result<()> {
    let runtime = Runtime::new()?;
    let _entered = runtime.enter();
    let containers = runtime.block_on(Containers::start(directory.path()))?;
    for (machines, config) in [("boots", CONFIG.to_owned()), ("standby", format!("{CONFIG}{STANDBY}"))] {
        let cofferdam = Cofferdam::new();
        let daemon = Daemon::start_with(&cofferdam, &config, &[("COFFERDAM_LOG", OsStr::new("warn"))]);
        for at_a_time in [1, 2] {
            let [ours, peer] = [
                Cost::of(|| settled_processor_time(&daemon), || runtime.block_on(builds(&daemon, at_a_time)))?,
                Cost::of(|| containers.processor_time(), || runtime.block_on(run(&containers, at_a_time)))?,
            ];
            let what = format!("{BUILDS} builds, {machines}, {at_a_time} at a time");
            let [our_wall, peer_wall, our_processor, peer_processor] =
                [ours.wall, peer.wall, ours.processor, peer.processor].map(|each| Series::of(vec![each]));
            report(&format!("{what} : {}", containers.name()), &our_wall, &peer_wall, "");
            println!(
                "{what:<40} {:>6.1} in a minute, containers {:.1}",
                60.0 / ours.wall.as_secs_f64(),
                60.0 / peer.wall.as_secs_f64()
            );
            report(&format!("{what}, processor time"), &our_processor, &peer_processor, "");
        }
        daemon.end().succeeds();
    }
    Ok(())
}

/// The mean cost of one.
struct Cost {
    wall: Duration,
    processor: Duration,
}

impl Cost {
    fn of(processor_time: impl Fn() -> Result<Duration>, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        let before = processor_time()?;
        let begun = Instant::now();
        work()?;
        let wall = begun.elapsed() / BUILDS;
        Ok(Self { wall, processor: processor_time()?.saturating_sub(before) / BUILDS })
    }
}

async fn builds(daemon: &Daemon, at_a_time: u32) -> Result<()> {
    let client = Client::new(daemon.peer().raw_channel());
    each(at_a_time, async |text| {
        follow(start(&mut client.clone(), &format!("echo {text} > out"), &["build/out"]).await?).await?;
        Ok(())
    })
    .await
}

async fn run(containers: &Containers<'_>, at_a_time: u32) -> Result<()> {
    each(at_a_time, async |text| containers.run(&text).await).await
}

/// Works through all builds, so many at a time, each with a text of its own.
async fn each(at_a_time: u32, work: impl AsyncFn(String) -> Result<()>) -> Result<()> {
    try_join_all((0..at_a_time).map(async |first| {
        for number in (first..BUILDS).step_by(at_a_time as usize) {
            work(format!("{at_a_time} {number}")).await?;
        }
        anyhow::Ok(())
    }))
    .await?;
    Ok(())
}

/// The daemon's processor time once it boots no machine.
fn settled_processor_time(daemon: &Daemon) -> Result<Duration> {
    let pid = daemon.running().pid();
    let begun = Instant::now();
    let mut before = processor_time(pid);
    loop {
        thread::sleep(SETTLES);
        let now = processor_time(pid);
        if now.saturating_sub(before) < IDLE {
            return Ok(now);
        }
        ensure!(begun.elapsed() < Duration::from_secs(120), "the daemon was busy for two minutes without a build");
        before = now;
    }
}
