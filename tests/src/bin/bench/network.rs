//! The costs of a build's network, beside those of its machine's loopback interface.
//!
//! The servers are on this host, in another network namespace, see `bin/network-lab`.

use std::{collections::BTreeSet, fs, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use cofferdam_tests::{
    Build, Cofferdam, Daemon, Lab, Outcome, guest,
    processes::{Process, memory_bytes},
};
use nix::{
    sys::signal::Signal,
    unistd::{SysconfVar, sysconf},
};
use tempfile::TempDir;

use super::measure::{ROUNDS, Series, report};

/// Bytes that are moved at a time.
const BYTES: usize = 256 << 20;

/// Connections of which each has a request.
const REQUESTS: usize = 500;

/// Connections before the memory is looked at for the first time, and for the second.
const FEW: usize = 500;
const MANY: usize = 10_000;

/// Each round takes a second or two, and a machine that is started beside it.
const FLOOD_ROUNDS: usize = 9;

/// How long a neighbour's processor time is taken.
const WHILE: Duration = Duration::from_secs(3);

/// Servers of HTTP and of uploads.
const HTTP: &str = "93.184.215.14:80";
const UPLOADS: &str = "93.184.215.14:7";

/// No datagram gets through to it.
const REFUSED: &str = "93.184.215.14:9";

const CONFIG: &str = "
    [build]
    memory = \"512M\"
    cpus = 2
    [budget]
    builds = 2
    cpus = 4
    [network]
    allow_addresses = [\"93.184.215.14/32:80\", \"93.184.215.14/32:7\"]
    resolvers = [\"10.0.0.53:53\"]
    sent = \"16G\"
    opens = 10000
";

pub(crate) fn network(_: &TempDir) -> Result<()> {
    let lab = Lab::compiled();
    let cofferdam = lab.cofferdam();
    let daemon = Daemon::start(&cofferdam, CONFIG);
    // Clients need no network.
    let client = Cofferdam::new();
    let with_cpus = |cpus| client.build().on(&daemon).memory("512M").flag("--cpus", cpus);
    let build = || with_cpus("2");
    throughput(build())?;
    processor_time(&cofferdam, &daemon, || with_cpus("1"))?;
    flood(with_cpus)?;
    many(&cofferdam, &daemon, build())?;
    trivial(build)?;
    daemon.end().succeeds();
    Ok(())
}

/// Gives a build a network and the program that measures it.
fn networked(build: Build<'_>) -> Build<'_> {
    build.switch("--network").input("traffic", guest::traffic())
}

/// The times of these steps of the program, in each of some rounds.
fn steps<const N: usize>(build: Build<'_>, rounds: usize, steps: &[String; N]) -> Result<[Series; N]> {
    let quoted: Vec<_> = steps.iter().map(|step| format!("'{step}'")).collect();
    let script = format!("/inputs/traffic {}", vec![quoted.join(" "); rounds].join(" "));
    let outcome = networked(build).shell(&script).succeeds();
    let mut all = [const { Vec::new() }; N];
    for (all, step) in all.iter_mut().zip(steps) {
        *all = times(&outcome, step)?;
        ensure!(all.len() == rounds, "{step} was done {} times: {outcome}", all.len());
    }
    Ok(all.map(Series::of))
}

fn times(outcome: &Outcome, step: &str) -> Result<Vec<Duration>> {
    let told = outcome.stderr.lines().filter_map(|line| line.strip_prefix(step)?.strip_prefix(": "));
    told.map(|time| Ok(Duration::from_micros(time.parse().context("it is no time")?))).collect()
}

fn throughput(build: Build<'_>) -> Result<()> {
    let all = [
        format!("loopback {BYTES}"),
        format!("down {HTTP} {BYTES}"),
        format!("up {UPLOADS} {BYTES}"),
        format!("ask-loopback {REQUESTS}"),
        format!("ask {HTTP} {REQUESTS}"),
    ];
    let [loopback, down, up, ask_loopback, ask] = steps(build, ROUNDS, &all)?;
    report("256 MiB to a build : its loopback", &down, &loopback, "≤ 1.0");
    report("256 MiB from a build : its loopback", &up, &loopback, "≤ 2.5");
    report("500 requests of a build : its loopback", &ask, &ask_loopback, "");
    Ok(())
}

/// What a build does that sends datagrams as fast as it can, and one that only keeps its processor busy.
fn neighbours() -> [String; 2] {
    [format!("/inputs/traffic 'flood {REFUSED}'"), "echo flooding; while :; do :; done".to_owned()]
}

/// The processor time that each of the neighbours takes of this host in a while: of its machine, its devices and the daemon.
fn processor_time<'a>(cofferdam: &Cofferdam, daemon: &Daemon, build: impl Fn() -> Build<'a>) -> Result<()> {
    let mut all = [Series::default(), Series::default()];
    for _ in 0..ROUNDS {
        for (series, neighbour) in all.iter_mut().zip(neighbours()) {
            let neighbour = networked(build()).start_shell(&neighbour);
            neighbour.wait_for("flooding");
            let pids = cofferdam.processes().into_iter().map(|process| process.pid);
            let pids: BTreeSet<_> = pids.chain([daemon.running().pid()]).collect();
            let used = || pids.iter().map(|pid| processor_ticks(*pid)).sum::<Result<u64>>();
            let before = used()?;
            thread::sleep(WHILE);
            let ticks = used()? - before;
            series.times.push(Duration::from_secs(1) * u32::try_from(ticks)? / u32::try_from(ticks_per_second()?)?);
            neighbour.signal(Signal::SIGINT);
            neighbour.end();
        }
    }
    let [ours, peer] = all;
    report("processor time of a flood : of a busy build", &ours, &peer, "≤ 1.1");
    Ok(())
}

fn ticks_per_second() -> Result<i64> {
    sysconf(SysconfVar::CLK_TCK)?.context("the kernel doesn't say what a tick is")
}

/// The processor time of a process, in ticks.
fn processor_ticks(pid: i32) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, after_name) = stat.rsplit_once(')').context("it has a name")?;
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}

/// Bytes to a build beside another that sends datagrams as fast as it can, and beside one that only keeps its processor busy.
/// Either has one processor, so that only its devices can take more than that.
fn flood<'a>(build: impl Fn(&'static str) -> Build<'a>) -> Result<()> {
    let step = [format!("down {HTTP} {BYTES}")];
    let (mut ours, mut peer) = (Series::default(), Series::default());
    for _ in 0..FLOOD_ROUNDS {
        for (series, neighbour) in [&mut ours, &mut peer].into_iter().zip(neighbours()) {
            let neighbour = networked(build("1")).start_shell(&neighbour);
            neighbour.wait_for("flooding");
            let [times] = steps(build("2"), 1, &step)?;
            series.times.extend(times.times);
            neighbour.signal(Signal::SIGINT);
            neighbour.end();
        }
    }
    report("256 MiB to a build beside a flood : beside a busy build", &ours, &peer, "≤ 1.1");
    Ok(())
}

/// Many connections in a row, and what the daemon and the network device have more of after them than before.
fn many(cofferdam: &Cofferdam, daemon: &Daemon, build: Build<'_>) -> Result<()> {
    // The first look is over by the time that the rest begins.
    let script =
        format!("/inputs/traffic 'ask {HTTP} {FEW}'; sleep 5; /inputs/traffic 'ask {HTTP} {MANY}'; sleep 1000");
    let running = networked(build).start_shell(&script);
    running.wait_for(&format!("ask {HTTP} {FEW}: "));
    let device = device(cofferdam)?;
    let before = [Held::by(device.pid)?, Held::by(daemon.running().pid())?];
    running.wait_for(&format!("ask {HTTP} {MANY}: "));
    for (who, pid, before) in [("device", device.pid, before[0]), ("daemon", daemon.running().pid(), before[1])] {
        let after = Held::by(pid)?;
        println!(
            "{MANY} connections : {who:<18} {:>6} KiB more than {}, {} descriptors more than {}",
            after.kib - before.kib,
            before.kib,
            after.descriptors - before.descriptors,
            before.descriptors
        );
    }
    running.signal(Signal::SIGINT);
    running.end();
    Ok(())
}

fn device(cofferdam: &Cofferdam) -> Result<Process> {
    let mut processes = cofferdam.processes().into_iter();
    let found = processes.find(|process| process.command_line.starts_with("cofferdam: network device in "));
    found.context("there is no network device")
}

/// What a process holds.
#[derive(Clone, Copy)]
struct Held {
    kib: i64,
    descriptors: i64,
}

impl Held {
    fn by(pid: i32) -> Result<Self> {
        // The guest's memory is in RssShmem.
        let bytes = memory_bytes(pid.cast_unsigned(), "RssAnon");
        let bytes = bytes.context("the kernel does not say how much memory a process has")?;
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.count() as i64;
        Ok(Self { kib: bytes.cast_signed() >> 10, descriptors })
    }
}

/// A trivial build with a network, and one without.
fn trivial<'a>(build: impl Fn() -> Build<'a>) -> Result<()> {
    let (mut ours, mut peer) = (Series::default(), Series::default());
    for round in 0..ROUNDS {
        // No result is an answer to another.
        let script = format!("echo {round} > out");
        let with = build().switch("--network").output("build/out").shell(&script).succeeds();
        let without = build().output("build/out").shell(&script).succeeds();
        ours.times.push(with.took);
        peer.times.push(without.took);
    }
    report("trivial build with network : without", &ours, &peer, "≤ 1.05");
    Ok(())
}
