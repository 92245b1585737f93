//! `soak`: many builds by one daemon, whose processes are killed at random.
//!
//! ```text
//!   in a row ──▶ at once, while clients cancel and leave, helper processes are killed, and once the daemon is ──▶ the end
//!   result of each            result of each that somebody waited for                       nothing is left, or has grown
//! ```
//!
//! The clients' actions are drawn from a seed, which is printed. So a run can be repeated, except for its timing.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use blake3::OutputReader;
use clap::Parser;
use cofferdam_castore::{
    B3Digest,
    grpc::{Peer, PeerOptions},
    proto::entry::Entry as Node,
};
use cofferdam_proto::{
    EncodedRequest,
    cofferdam::v1::{self as ours, build_service_client::BuildServiceClient, done::Outcome, event::Event},
};
use cofferdam_tests::{
    Cofferdam, Daemon,
    request::{encoded, shell},
    stretched,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{task::JoinSet, time::sleep};
use tonic::{Code, Status, Streaming, transport::Channel};

/// Most by which the daemon's memory may grow between the first tenth of the builds in a row and the last one, in bytes.
const MAX_GROWTH_BYTES: u64 = 32 << 20;

/// How long a client retries one build.
const PATIENCE: Duration = Duration::from_secs(60 * 60);

/// A client's pause before it retries.
const RETRY: Duration = Duration::from_millis(500);

/// Interval between two kills of helper processes.
const KILL_EVERY: Duration = Duration::from_secs(10);

const CONFIG: &str = "
    [budget]
    builds = 4
    [build]
    memory = \"256M\"
    [queue]
    max = 1000
    max_per_client = 1000
";

/// Have a daemon run many builds, kill its processes at random, and check for leftovers.
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
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    println!("seed {}", arguments.seed);
    let mounts = fs::read("/proc/self/mounts")?;
    let cofferdam = Arc::new(Cofferdam::new());
    let daemon = Daemon::start(&cofferdam, CONFIG);
    in_a_row(&daemon, arguments.in_a_row).await?;
    let daemon = at_once(&cofferdam, daemon, &arguments).await?;
    nothing_runs(&daemon).await?;
    daemon.end().succeeds();
    cofferdam.processes_are_gone_within(Duration::from_secs(10));
    let left = cofferdam.leftovers();
    ensure!(left.is_empty(), "files are left: {left:?}");
    ensure!(fs::read("/proc/self/mounts")? == mounts, "mounts are left");
    cofferdam.command(["store", "verify"]).succeeds();
    println!("the store is sound, and no process, file, mount or descriptor is left");
    Ok(())
}

/// Runs builds one after the other. The daemon must not grow.
async fn in_a_row(daemon: &Daemon, builds: usize) -> Result<()> {
    let begun = Instant::now();
    let warm = builds.div_ceil(10);
    let mut before = None;
    for number in 0..builds {
        let outcome = Watched::start(&daemon.addr(), &format!("row-{number}")).await?.outcome().await?;
        check(&outcome, &format!("row-{number}"))?;
        if number + 1 == warm {
            before = Some(Use::of(daemon.running().pid())?);
        }
    }
    let Some(before) = before else { return Ok(()) };
    // The daemon closes the last connection some time after its client does.
    let deadline = Instant::now() + stretched(Duration::from_secs(10));
    let after = loop {
        let now = Use::of(daemon.running().pid())?;
        if now.descriptors <= before.descriptors || Instant::now() > deadline {
            break now;
        }
        sleep(Duration::from_millis(50)).await;
    };
    println!(
        "{builds} builds in a row in {:.0} s: {before:?} after {warm}, {after:?} at the end",
        begun.elapsed().as_secs_f64()
    );
    ensure!(after.resident_bytes < before.resident_bytes + MAX_GROWTH_BYTES, "the daemon has grown");
    ensure!(after.descriptors <= before.descriptors && after.threads <= before.threads + 8, "the daemon keeps some");
    Ok(())
}

/// The resources that a process might leak.
#[derive(Debug)]
struct Use {
    resident_bytes: u64,
    descriptors: usize,
    threads: usize,
}

impl Use {
    fn of(pid: i32) -> Result<Self> {
        let place = Path::new("/proc").join(pid.to_string());
        let status = fs::read_to_string(place.join("status"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("it has no VmRSS")?;
        let kib: u64 = resident.trim().trim_end_matches("kB").trim().parse()?;
        let count = |name| anyhow::Ok(fs::read_dir(place.join(name))?.count());
        Ok(Self { resident_bytes: kib << 10, descriptors: count("fd")?, threads: count("task")? })
    }
}

/// A client's action.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    /// It waits for the result, and retries if the executor fails.
    Waits,
    /// It cancels its build after so many events.
    Cancels(u8),
    /// It disconnects after so many events.
    Leaves(u8),
}

impl Fate {
    fn drawn(from: &mut OutputReader) -> Self {
        let mut bytes = [0; 2];
        from.fill(&mut bytes);
        let events = 1 + bytes[1] % 6;
        match bytes[0] % 5 {
            0..3 => Self::Waits,
            3 => Self::Cancels(events),
            _ => Self::Leaves(events),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Waits => "waited",
            Self::Cancels(_) => "cancelled",
            Self::Leaves(_) => "left",
        }
    }
}

/// Runs builds at once, and returns the daemon that runs at the end.
async fn at_once(cofferdam: &Arc<Cofferdam>, daemon: Daemon, arguments: &Arguments) -> Result<Daemon> {
    let begun = Instant::now();
    let mut random = blake3::Hasher::new().update(&arguments.seed.to_le_bytes()).finalize_xof();
    let mut clients = JoinSet::new();
    for number in 0..arguments.at_once {
        let (fate, addr) = (Fate::drawn(&mut random), daemon.addr());
        clients.spawn(async move {
            let text = format!("once-{number}");
            client(&addr, &text, fate).await.with_context(|| format!("{text}, whose client {}", fate.name()))
        });
    }
    let killed = Arc::new(AtomicUsize::new(0));
    let killer = tokio::spawn(kill_helpers(Arc::clone(cofferdam), random, Arc::clone(&killed)));
    let mut fates = BTreeMap::<_, usize>::new();
    while clients.len() > arguments.at_once / 2
        && let Some(client) = clients.join_next().await
    {
        *fates.entry(client??).or_default() += 1;
    }
    daemon.running().signal(Signal::SIGKILL);
    let cofferdam = Arc::clone(cofferdam);
    let restarted = tokio::task::spawn_blocking(move || {
        daemon.end_of();
        // Those that it has started end with it.
        cofferdam.processes_are_gone_within(Duration::from_secs(10));
        Daemon::start(&cofferdam, CONFIG)
    });
    let daemon = restarted.await?;
    while let Some(client) = clients.join_next().await {
        *fates.entry(client??).or_default() += 1;
    }
    killer.abort();
    let (killed, took) = (killed.load(Ordering::Relaxed), begun.elapsed().as_secs_f64());
    println!(
        "{} builds at once in {took:.0} s: {fates:?}; {killed} helpers and the daemon were killed",
        arguments.at_once
    );
    Ok(daemon)
}

/// Kills a helper process of some build now and then, for ever.
async fn kill_helpers(cofferdam: Arc<Cofferdam>, mut random: OutputReader, killed: Arc<AtomicUsize>) {
    loop {
        sleep(KILL_EVERY).await;
        let mut helpers = cofferdam.processes();
        helpers.retain(|process| process.is_walled);
        let mut byte = [0];
        random.fill(&mut byte);
        if let Some(helper) = helpers.get(usize::from(byte[0]) % helpers.len().max(1)) {
            // It may have ended by itself meanwhile.
            if kill(Pid::from_raw(helper.pid), Signal::SIGKILL).is_ok() {
                killed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// Runs one client to its end, and returns the name of its action.
async fn client(addr: &str, text: &str, fate: Fate) -> Result<&'static str> {
    let begun = Instant::now();
    loop {
        let failed = match attempt(addr, text, fate).await {
            Ok(None) => return Ok(fate.name()),
            Ok(Some(Outcome::Failure(failure))) if fate != Fate::Waits && failure.reason == "interrupted" => {
                return Ok(fate.name());
            }
            Ok(Some(Outcome::Failure(failure))) if failure.kind() == ours::failure::Kind::ExecutorFailed => {
                format!("{failure:?}")
            }
            Ok(Some(outcome)) => return check(&outcome, text).map(|()| fate.name()),
            Err(status) if status.code() == Code::NotFound => bail!("its build is not known: {status}"),
            Err(status) => status.to_string(),
        };
        ensure!(begun.elapsed() < PATIENCE, "it has been failing for too long: {failed}");
        sleep(RETRY).await;
    }
}

/// Submits a build once. Returns the outcome if the client waited for it.
async fn attempt(addr: &str, text: &str, fate: Fate) -> Result<Option<Outcome>, Status> {
    let mut watched = Watched::start(addr, text).await?;
    match fate {
        Fate::Waits => {}
        Fate::Leaves(events) => return watched.events(events).await.map(|_| None),
        Fate::Cancels(events) => {
            if let Some(outcome) = watched.events(events).await? {
                return Ok(Some(outcome));
            }
            let id = watched.id.clone();
            watched.client.cancel(ours::CancelRequest { id }).await?;
        }
    }
    watched.outcome().await.map(Some)
}

/// Checks that the outcome is the expected file.
fn check(outcome: &Outcome, text: &str) -> Result<()> {
    let contents = format!("{text}\n");
    let expected = B3Digest::of(contents.as_bytes());
    if let Outcome::Success(success) = outcome
        && let Some(response) = &success.response
        && let [output] = &response.outputs[..]
        && let Some(Node::File(file)) = output.output.as_ref().and_then(|node| node.entry.as_ref())
        && file.digest == expected.as_slice()
        && file.size == contents.len() as u64
    {
        return Ok(());
    }
    bail!("this is not the file {contents:?}: {outcome:?}")
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

/// A build that is watched, over a connection of its own.
struct Watched {
    id: String,
    client: BuildServiceClient<Channel>,
    events: Streaming<ours::Event>,
}

impl Watched {
    async fn start(addr: &str, text: &str) -> Result<Self, Status> {
        let peer = Peer::from_addr(addr, &PeerOptions::default()).expect("the daemon's address is right");
        let mut client = BuildServiceClient::new(peer.raw_channel());
        let request = ours::BuildRequest { request: Some(request(text)), ..Default::default() };
        let mut events = client.build(request).await?.into_inner();
        match events.message().await?.and_then(|event| event.event) {
            Some(Event::Accepted(accepted)) => Ok(Self { id: accepted.id, client, events }),
            event => panic!("the first event is {event:?}"),
        }
    }

    /// Waits for so many events, or for the last one, which has the outcome.
    async fn events(&mut self, count: u8) -> Result<Option<Outcome>, Status> {
        for _ in 0..count {
            match self.events.message().await? {
                Some(ours::Event { event: Some(Event::Done(done)) }) => return Ok(done.outcome),
                Some(_) => {}
                None => return Err(Status::unavailable("the events end before the build")),
            }
        }
        Ok(None)
    }

    async fn outcome(&mut self) -> Result<Outcome, Status> {
        while let Some(event) = self.events.message().await? {
            if let Some(Event::Done(done)) = event.event {
                return done.outcome.ok_or_else(|| Status::internal("the end tells no outcome"));
            }
        }
        Err(Status::unavailable("the events end before the build"))
    }
}

fn request(text: &str) -> EncodedRequest {
    encoded(shell(&format!("echo {text} | tee out"), &["build/out"]))
}
