//! How many trivial builds a daemon does in a minute, and the processor time of each.

use std::{
    ffi::OsStr,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use cofferdam_tests::{Cofferdam, Daemon, processes::processor_time};
use futures::future::try_join_all;
use nix::sys::{
    resource::{UsageWho, getrusage},
    time::{TimeVal, TimeValLike as _},
};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::{
    measure::{Series, report},
    service::{Client, follow, start},
};

const BUILDS: u32 = 30;

const CONFIG: &str = "
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

/// Namespaces as a container runtime makes them, without an image to mount.
const CONTAINER: [&str; 10] =
    ["--user", "--map-root-user", "--mount", "--pid", "--fork", "--mount-proc", "--ipc", "--uts", "--net", "--cgroup"];

pub(crate) fn throughput(directory: &TempDir) -> Result<()> {
    let runtime = Runtime::new()?;
    let _entered = runtime.enter();
    for (machines, config) in [("boots", CONFIG.to_owned()), ("standby", format!("{CONFIG}{STANDBY}"))] {
        let cofferdam = Cofferdam::new();
        let daemon = Daemon::start_with(&cofferdam, &config, &[("COFFERDAM_LOG", OsStr::new("warn"))]);
        for at_a_time in [1, 2] {
            let [ours, peer] = [
                Cost::of(|| settled_processor_time(&daemon), || runtime.block_on(builds(&daemon, at_a_time)))?,
                Cost::of(|| Ok(processor_time_of_children()?), || containers(directory, at_a_time))?,
            ];
            let what = format!("{BUILDS} builds, {machines}, {at_a_time} at a time");
            let [our_wall, peer_wall, our_processor, peer_processor] =
                [ours.wall, peer.wall, ours.processor, peer.processor].map(|each| Series::of(vec![each]));
            report(&format!("{what} : containers"), &our_wall, &peer_wall, "");
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
    try_join_all((0..at_a_time).map(async |first| {
        let mut client = client.clone();
        for number in (first..BUILDS).step_by(at_a_time as usize) {
            let script = format!("echo {at_a_time} {number} > out");
            follow(start(&mut client, &script, &["build/out"]).await?).await?;
        }
        anyhow::Ok(())
    }))
    .await?;
    Ok(())
}

fn containers(directory: &TempDir, at_a_time: u32) -> Result<()> {
    let run = |number: u32| {
        let mut command = Command::new("unshare");
        command.args(CONTAINER).args(["sh", "-c", &format!("echo {number} > {number}")]);
        let status = command.current_dir(directory).stdin(Stdio::null()).status()?;
        ensure!(status.success(), "a container failed: {status}");
        Ok(())
    };
    let worker = |first: u32| (first..BUILDS).step_by(at_a_time as usize).try_for_each(run);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..at_a_time).map(|first| scope.spawn(move || worker(first))).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
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

/// The processor time of the children that this process has waited for.
fn processor_time_of_children() -> nix::Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let micros = |time: TimeVal| u64::try_from(time.num_microseconds()).unwrap_or(0);
    Ok(Duration::from_micros(micros(usage.user_time()) + micros(usage.system_time())))
}
