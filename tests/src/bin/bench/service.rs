//! The costs of a daemon for its clients.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use cofferdam_proto::cofferdam::v1::{
    BuildRequest, Event, ListRequest, Phase,
    build_service_client::BuildServiceClient,
    done::Outcome,
    event::Event::{Accepted, Done, Log, Phase as PhaseBegun, Queued},
};
use cofferdam_proto::snix::build::v1 as proto;
use cofferdam_tests::{
    Cofferdam, Daemon,
    request::{encoded, shell},
};
use futures::future::try_join_all;
use tempfile::TempDir;
use tonic::{Streaming, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::measure::{LARGE_ROUNDS, ROUNDS, Series, report};

const LOG_BYTES: u64 = 64 * 1024 * 1024;

const QUEUED: usize = 1000;

/// Open requests of one client, fewer than a server allows.
const QUEUED_PER_CONNECTION: usize = 100;

const CONFIG: &str = "
    [build]
    memory = \"256M\"
    log_limit = \"256M\"
    [queue]
    max = 2000
    max_per_client = 2000
";

pub(super) type Client = BuildServiceClient<Channel>;

pub(crate) fn service(_: &TempDir) -> Result<()> {
    with_daemon(own_cost)
}

pub(crate) fn log(_: &TempDir) -> Result<()> {
    with_daemon(log_cost)
}

pub(crate) fn queue(_: &TempDir) -> Result<()> {
    with_daemon(queue_cost)
}

fn with_daemon(measure: impl AsyncFnOnce(&Daemon) -> Result<()>) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let _entered = runtime.enter();
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, CONFIG);
    runtime.block_on(measure(&daemon))?;
    daemon.end().succeeds();
    Ok(())
}

/// The time from the call to the result, without the machine's.
async fn own_cost(daemon: &Daemon) -> Result<()> {
    let mut client = Client::new(daemon.peer().raw_channel());
    let (mut ours, mut machine) = (Series::default(), Series::default());
    for round in 0..ROUNDS {
        let begun = Instant::now();
        let build = follow(start(&mut client, &format!("echo {round} > out"), &["build/out"]).await?).await?;
        let lived = build.ingesting.context("it never began to ingest")? - build.booting.context("it never booted")?;
        ours.times.push(begun.elapsed() - lived);
        machine.times.push(lived);
    }
    report("build over gRPC, less its VM : its VM", &ours, &machine, "");
    Ok(())
}

/// The times of a command that writes to the log, and of one that writes to a pipe in its guest.
async fn log_cost(daemon: &Daemon) -> Result<()> {
    let mut client = Client::new(daemon.peer().raw_channel());
    let (mut ours, mut pipe) = (Series::default(), Series::default());
    for round in 0..LARGE_ROUNDS {
        let write = format!("yes 'round {round}: a line as compilers write it' | head -c {LOG_BYTES}");
        for (series, to, expected) in [(&mut ours, "", LOG_BYTES), (&mut pipe, " | cat > /dev/null", 0)] {
            let build = follow(start(&mut client, &format!("{write}{to}"), &[]).await?).await?;
            ensure!(build.log_bytes == expected, "of the log, {} bytes came", build.log_bytes);
            let ended = build.ingesting.unwrap_or(build.done);
            series.times.push(ended - build.running.context("it never ran")?);
        }
    }
    report("64 MiB to the log : to a pipe in the VM", &ours, &pipe, "");
    Ok(())
}

/// The time until so many clients know their place in the queue.
async fn queue_cost(daemon: &Daemon) -> Result<()> {
    let channels: Vec<_> = (0..QUEUED / QUEUED_PER_CONNECTION).map(|_| daemon.peer().raw_channel()).collect();
    let channel = |number: usize| channels[number / QUEUED_PER_CONNECTION].clone();
    let mut client = Client::new(channel(0));
    let mut running = start(&mut client, "sleep 3600", &[]).await?;
    while !matches!(next(&mut running).await?.event, Some(PhaseBegun(phase)) if phase == Phase::Running as i32) {}
    let (mut ours, mut peer) = (Series::default(), Series::default());
    for round in 0..ROUNDS {
        let begun = Instant::now();
        let waiting = try_join_all((0..QUEUED).map(async |number| {
            let mut events = start(&mut Client::new(channel(number)), &format!(": {round} {number}"), &[]).await?;
            while !matches!(next(&mut events).await?.event, Some(Queued(_))) {}
            anyhow::Ok(events)
        }));
        let waiting = waiting.await?;
        ours.times.push(begun.elapsed());
        drop(waiting);
        let begun = Instant::now();
        while client.list(ListRequest { active: true, limit: 2 }).await?.into_inner().builds.len() > 1 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        ensure!(begun.elapsed() < Duration::from_secs(60), "it took a minute to leave the queue");
        let begun = Instant::now();
        try_join_all((0..QUEUED).map(async |number| {
            let health = HealthCheckRequest { service: "cofferdam.v1.BuildService".to_owned() };
            HealthClient::new(channel(number)).check(health).await
        }))
        .await?;
        peer.times.push(begun.elapsed());
    }
    report("1,000 requests queued : health checks", &ours, &peer, "");
    Ok(())
}

pub(super) async fn start(client: &mut Client, script: &str, outputs: &[&str]) -> Result<Streaming<Event>> {
    submit(client, shell(script, outputs)).await
}

/// Has a request accepted.
pub(super) async fn submit(client: &mut Client, request: proto::BuildRequest) -> Result<Streaming<Event>> {
    let request = BuildRequest { request: Some(encoded(request)), ..Default::default() };
    let mut events = client.build(request).await?.into_inner();
    match next(&mut events).await?.event {
        Some(Accepted(accepted)) if !accepted.from_record => Ok(events),
        event => bail!("the first event is {event:?}"),
    }
}

pub(super) async fn next(events: &mut Streaming<Event>) -> Result<Event> {
    events.message().await?.context("the events end before the build")
}

/// When the client got each event of a build.
pub(super) struct Told {
    booting: Option<Instant>,
    pub(super) running: Option<Instant>,
    /// When the first piece of the log came.
    pub(super) logged: Option<Instant>,
    ingesting: Option<Instant>,
    done: Instant,
    log_bytes: u64,
}

/// Reads the events of a build until it has succeeded.
pub(super) async fn follow(mut events: Streaming<Event>) -> Result<Told> {
    let mut told =
        Told { booting: None, running: None, logged: None, ingesting: None, done: Instant::now(), log_bytes: 0 };
    loop {
        let event = next(&mut events).await?.event;
        let now = Some(Instant::now());
        match event {
            Some(PhaseBegun(phase)) => match Phase::try_from(phase) {
                Ok(Phase::Booting) => told.booting = now,
                Ok(Phase::Running) => told.running = now,
                Ok(Phase::Ingesting) => told.ingesting = now,
                _ => {}
            },
            Some(Log(chunk)) => {
                told.logged = told.logged.or(now);
                told.log_bytes += chunk.data.len() as u64;
            }
            Some(Done(done)) => {
                ensure!(matches!(done.outcome, Some(Outcome::Success(_))), "the build failed: {done:?}");
                return Ok(Told { done: Instant::now(), ..told });
            }
            _ => {}
        }
    }
}
