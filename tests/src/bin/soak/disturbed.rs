//! Builds in a row and at once, while clients cancel and leave, and processes are killed.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use blake3::OutputReader;
use cofferdam_proto::cofferdam::v1::{self as ours, done::Outcome};
use cofferdam_tests::{Cofferdam, Daemon, stretched};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{task::JoinSet, time::sleep};
use tonic::{Code, Status};

use super::{
    Arguments, CONFIG, MAX_GROWTH_BYTES, RETRY,
    usage::Use,
    watched::{Watched, check},
};

/// How long a client retries one build.
const PATIENCE: Duration = Duration::from_secs(60 * 60);

/// Interval between two kills of helper processes.
const KILL_EVERY: Duration = Duration::from_secs(10);

/// Runs builds one after the other. The daemon must not grow.
pub(crate) async fn in_a_row(daemon: &Daemon, builds: usize) -> Result<()> {
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
pub(crate) async fn at_once(cofferdam: &Arc<Cofferdam>, daemon: Daemon, arguments: &Arguments) -> Result<Daemon> {
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
