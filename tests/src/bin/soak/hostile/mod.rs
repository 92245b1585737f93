//! A daemon with an honest tenant and hostile ones.
//!
//! Each bound is checked here and nowhere else, since it is a time. The tenants share the machine with the daemon, though hostile
//! ones have what is left of it (see [`Kind`]).

mod attacks;
mod tenant;
mod times;

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use cofferdam_castore::{
    B3Digest,
    proto::{BlobChunk, StatBlobRequest, blob_service_client::BlobServiceClient},
};
use cofferdam_proto::{
    EncodedRequest,
    cofferdam::v1::{BuildInfo, GetRequest, ListRequest, build_service_client::BuildServiceClient, done::Outcome},
};
use cofferdam_tests::{
    Cofferdam, Daemon,
    request::{encoded, shell},
    stretched,
};
use futures::stream;
use tokio::time::sleep;
use tonic::{Code, transport::Channel};

use self::{
    attacks::{Attack, Silence, leave_record, read_log, reuse},
    tenant::{Kind, Tenant},
    times::Times,
};
use super::{
    MAX_GROWTH_BYTES, RETRY, nothing_runs,
    usage::Use,
    watched::{Watched, check, request},
};

/// Most by which requests for earlier results delay another tenant's acceptance.
const REUSE_BOUND: Duration = Duration::from_secs(1);

/// Most by which reading logs delays another tenant's Stat.
const LOG_BOUND: Duration = Duration::from_millis(100);

/// How long connecting takes at most, a first call included, while others hold as many connections as they get.
const CONNECT_BOUND: Duration = Duration::from_secs(1);

/// Most that a build takes beside all attacks, measured in the same build alone.
const SLOWDOWN_BOUND: f64 = 1.5;

/// Silent connections that are open before anybody else connects: all that the daemon's listener has, but for those in use.
const SILENT: usize = 500;

/// Calls of the honest tenant before an attack.
const ALONE: usize = 50;

/// How often the daemon's memory is looked at.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);

/// Connections that are made while others are silent.
const NEWCOMERS: usize = 10;

/// A record has some hundred bytes. With one CPU each, two builds run at a time on a host with two.
const CONFIG: &str = "
    socket_mode = 0o666
    [budget]
    builds = 2
    [build]
    cpus = 1
    memory = \"256M\"
    log_limit = \"2G\"
    [records]
    max_size = \"2M\"
";

/// How much the hostile tenants do.
#[derive(Debug, Args)]
pub(crate) struct Scale {
    /// Builds of an honest tenant alone, and as many beside hostile tenants; 0 for no hostile tenants
    #[arg(long = "honest-builds", default_value_t = 15)]
    pub(crate) builds: usize,
    /// Requests that are answered with an earlier result
    #[arg(long, default_value_t = 40_000)]
    reuse_requests: usize,
    /// Files in this result
    #[arg(long, default_value_t = 2_000)]
    reuse_files: usize,
    /// Reads near the end of a log
    #[arg(long, default_value_t = 10_000)]
    log_reads: usize,
    /// Size of this log, in MiB
    #[arg(long, default_value_t = 1024)]
    log_mib: u64,
    /// Records of builds that fail at once: enough that the daemon can't keep them all
    #[arg(long, default_value_t = 10_000)]
    records: usize,
}

/// Everybody on one daemon.
struct Scene {
    daemon: Daemon,
    honest: Tenant,
    /// Asks for earlier results, and reads logs.
    greedy: Tenant,
    /// Leaves records.
    flooder: Tenant,
    silent: [Tenant; 2],
    /// The digest of a blob that the honest tenant has put.
    blob: B3Digest,
    /// The greedy tenant's request for many files, which has succeeded.
    many_files: EncodedRequest,
    /// Its build with a long log.
    long_log: String,
    log_bytes: u64,
}

/// Runs all attacks, and checks what they do to the honest tenant.
pub(crate) async fn run(cofferdam: &Arc<Cofferdam>, scale: &Scale) -> Result<()> {
    let scene = Scene::new(cofferdam, scale).await?;
    let attacked = scene.attack(scale).await;
    let Scene { daemon, .. } = scene;
    daemon.end().succeeds();
    attacked
}

impl Scene {
    async fn new(cofferdam: &Arc<Cofferdam>, scale: &Scale) -> Result<Self> {
        let (files, started) = (cofferdam.files(), Arc::clone(cofferdam));
        let daemon = tokio::task::spawn_blocking(move || Daemon::start(&started, CONFIG)).await?;
        // So that other users reach the socket.
        for directory in [files.parent().context("it is in the test's directory")?, &files] {
            fs::set_permissions(directory, Permissions::from_mode(0o755))?;
        }
        let tenant = |user, kind| Tenant::new(files.join("daemon.sock"), user, kind);
        let (honest, greedy) = (tenant(1001, Kind::Honest)?, tenant(1002, Kind::Hostile)?);
        let flooder = tenant(1003, Kind::Hostile)?;
        let silent = [tenant(1004, Kind::Hostile)?, tenant(1005, Kind::Hostile)?];
        let blob = honest.spawn(put_blob(honest.channel()?)).await??;
        let many_files = many_files(scale.reuse_files);
        built(&greedy, many_files.clone()).await?;
        let long_log = built(&greedy, encoded(shell(&format!("yes | head -c {}", scale.log_mib << 20), &[]))).await?;
        let log_bytes = scale.log_mib << 20;
        Ok(Self { daemon, honest, greedy, flooder, silent, blob, many_files, long_log, log_bytes })
    }

    async fn attack(&self, scale: &Scale) -> Result<()> {
        let (first, half) = (Instant::now(), scale.builds.div_ceil(2));
        let (mut alone, mut ids) = self.builds(0..half, "alone").await?;
        println!("set up, and built {half} times alone in {:.0} s", first.elapsed().as_secs_f64());
        self.reuse(scale).await?;
        self.read_logs(scale).await?;
        self.keep_out().await?;
        self.flood_records(scale, &ids).await?;
        let (beside, beside_ids) = self.all_at_once(scale).await?;
        let (alone_again, again_ids) = self.builds(half..scale.builds, "alone").await?;
        alone.extend(alone_again);
        ids.extend(beside_ids.into_iter().chain(again_ids));
        self.has_records(&ids).await?;
        let (alone, beside) = (Times::of(alone), Times::of(beside));
        let ratio = beside.median().as_secs_f64() / alone.median().as_secs_f64();
        println!(
            "honest builds beside all attacks: {beside}; alone: {alone}; {ratio:.2} of at most {SLOWDOWN_BOUND} times"
        );
        ensure!(ratio <= SLOWDOWN_BOUND, "honest builds are too slow");
        nothing_runs(&self.daemon).await
    }

    /// Honest builds, one after the other, each over a connection of its own: their times and ids.
    async fn builds(
        &self,
        numbers: std::ops::Range<usize>,
        word: &'static str,
    ) -> Result<(Vec<Duration>, Vec<String>)> {
        let (mut times, mut ids) = (Vec::new(), Vec::new());
        for number in numbers {
            let (begun, channel) = (Instant::now(), self.honest.channel()?);
            let build = self.honest.spawn(async move {
                let text = format!("{word}-{number}");
                let mut build = Watched::over(channel, request(&text)).await?;
                check(&build.outcome().await?, &text)?;
                anyhow::Ok(build.id)
            });
            ids.push(build.await?.with_context(|| format!("honest build {word}-{number}"))?);
            times.push(begun.elapsed());
        }
        Ok((times, ids))
    }

    async fn reuse(&self, scale: &Scale) -> Result<()> {
        let channel = self.honest.channel()?;
        let own = move || reuse(channel.clone(), request("alone-0"));
        let alone = self.honest.spawn(Times::measure(own.clone(), |calls| calls == ALONE)).await??;
        let attack = self.start_reuse(scale.reuse_requests)?;
        let (begun, watched) = (Instant::now(), attack.watch());
        let beside = self.honest.spawn(Times::measure(own, move |_| watched.is_finished())).await??;
        attack.finished().await?;
        let what = format!(
            "acceptance beside {} requests for a result of {} files in {:.0} s",
            scale.reuse_requests,
            scale.reuse_files,
            begun.elapsed().as_secs_f64()
        );
        beside.are_delayed_by_less(REUSE_BOUND, &alone, &what)
    }

    async fn read_logs(&self, scale: &Scale) -> Result<()> {
        let (channel, blob) = (self.honest.channel()?, self.blob);
        let own = move || stat(channel.clone(), blob);
        let alone = self.honest.spawn(Times::measure(own.clone(), |calls| calls == ALONE)).await??;
        let attack = self.start_log_reads(scale.log_reads)?;
        let (begun, watched) = (Instant::now(), attack.watch());
        let beside = self.honest.spawn(Times::measure(own, move |_| watched.is_finished())).await??;
        attack.finished().await?;
        let what = format!(
            "Stat beside {} reads near the end of a log of {} MiB in {:.0} s",
            scale.log_reads,
            scale.log_mib,
            begun.elapsed().as_secs_f64()
        );
        beside.are_delayed_by_less(LOG_BOUND, &alone, &what)
    }

    /// Two tenants hold as many connections as they get, while others connect.
    async fn keep_out(&self) -> Result<()> {
        let silence = Silence::of(&self.silent);
        silence.wait_for(SILENT).await?;
        let mut operators = Vec::new();
        for _ in 0..NEWCOMERS {
            let begun = Instant::now();
            let peer = tonic::transport::Endpoint::from_shared(format!("unix:{}", self.honest.socket.display()))?;
            let mut operator = BuildServiceClient::new(peer.connect().await?);
            let list = operator.list(ListRequest { limit: 1, ..Default::default() }).await.context("an operator")?;
            ensure!(list.into_inner().of_all_clients, "it is no operator");
            operators.push(begun.elapsed());
        }
        let mut tenants = Vec::new();
        for _ in 0..NEWCOMERS {
            let begun = Instant::now();
            self.honest.spawn(stat(self.honest.channel()?, self.blob)).await?.context("another tenant")?;
            tenants.push(begun.elapsed());
        }
        silence.end().await;
        for (who, times) in [("an operator", Times::of(operators)), ("another tenant", Times::of(tenants))] {
            println!(
                "{who} connects while {SILENT} silent connections are open: {times}, of at most {CONNECT_BOUND:?}"
            );
            ensure!(times.longest() < CONNECT_BOUND, "{who} connects too slowly");
        }
        Ok(())
    }

    async fn flood_records(&self, scale: &Scale, ids: &[String]) -> Result<()> {
        let begun = Instant::now();
        let first = self.flooder.spawn(leave_record(self.flooder.channel()?, usize::MAX)).await??;
        record(&self.flooder, &first).await?.context("its first record was never there")?;
        self.start_flood(scale.records)?.finished().await?;
        println!("{} records were left in {:.0} s", scale.records, begun.elapsed().as_secs_f64());
        let evicted = record(&self.flooder, &first).await?.is_none();
        ensure!(evicted, "this tests nothing: the daemon keeps all records of the flood");
        self.has_records(ids).await
    }

    /// All attacks at the same time, beside honest builds.
    async fn all_at_once(&self, scale: &Scale) -> Result<(Vec<Duration>, Vec<String>)> {
        let before = Use::of(self.daemon.running().pid())?;
        let attacks = [self.start_reuse(usize::MAX)?, self.start_log_reads(usize::MAX)?, self.start_flood(usize::MAX)?];
        let silence = Silence::of(&self.silent);
        silence.wait_for(SILENT).await?;
        let samples = Arc::new(Mutex::new(Vec::new()));
        let (pid, taken, begun) = (self.daemon.running().pid(), Arc::clone(&samples), Instant::now());
        let sampling = tokio::spawn(async move {
            while let Ok(used) = Use::of(pid) {
                taken.lock().expect("nobody panics with it").push(used.resident_bytes);
                sleep(SAMPLE_EVERY).await;
            }
        });
        let built = self.builds(0..scale.builds, "beside").await?;
        sampling.abort();
        let mut answered = Vec::new();
        for attack in attacks {
            answered.push(attack.stop().await?);
        }
        silence.end().await;
        println!(
            "beside {} builds in {:.0} s, {answered:?} requests for results, reads of logs and records were answered",
            scale.builds,
            begun.elapsed().as_secs_f64()
        );
        ensure!(answered.iter().all(|answered| *answered > 0), "an attack did nothing");
        is_flat(&samples.lock().expect("nobody panics with it"))?;
        self.gives_back(&before).await?;
        Ok(built)
    }

    /// The daemon has closed the connections and files of the attacks.
    async fn gives_back(&self, before: &Use) -> Result<()> {
        nothing_runs(&self.daemon).await?;
        let deadline = Instant::now() + stretched(Duration::from_secs(10));
        loop {
            let now = Use::of(self.daemon.running().pid())?;
            if now.descriptors <= before.descriptors {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "the daemon keeps descriptors: {before:?} before the attacks, {now:?} after"
            );
            sleep(RETRY).await;
        }
    }

    /// The honest tenant still has the records of these builds.
    async fn has_records(&self, ids: &[String]) -> Result<()> {
        for id in ids {
            record(&self.honest, id).await?.with_context(|| format!("the record of {id} is gone"))?;
        }
        println!("all {} records of the honest tenant are there", ids.len());
        Ok(())
    }

    fn start_reuse(&self, calls: usize) -> Result<Attack> {
        let request = self.many_files.clone();
        Attack::start(&self.greedy, calls, move |channel, _| reuse(channel, request.clone()))
    }

    fn start_log_reads(&self, calls: usize) -> Result<Attack> {
        let (id, end) = (self.long_log.clone(), self.log_bytes);
        Attack::start(&self.greedy, calls, move |channel, number| {
            read_log(channel, id.clone(), end - 1 - number as u64 % 1000)
        })
    }

    fn start_flood(&self, calls: usize) -> Result<Attack> {
        Attack::start(
            &self.flooder,
            calls,
            |channel, number| async move { leave_record(channel, number).await.map(drop) },
        )
    }
}

/// A request for a result of so many empty files, a hundred in each directory.
fn many_files(files: usize) -> EncodedRequest {
    let script = format!(
        "mkdir out; i=0; while [ $i -lt {files} ]; do [ $((i % 100)) = 0 ] && mkdir out/$((i / 100)); \
         : > out/$((i / 100))/$i; i=$((i + 1)); done"
    );
    encoded(shell(&script, &["build/out"]))
}

/// Has a tenant's request built, and returns the build's id.
async fn built(tenant: &Tenant, request: EncodedRequest) -> Result<String> {
    let channel = tenant.channel()?;
    let build = tenant.spawn(async move {
        let mut build = Watched::over(channel, request).await?;
        let outcome = build.outcome().await?;
        ensure!(matches!(outcome, Outcome::Success(_)), "it has failed: {outcome:?}");
        Ok(build.id)
    });
    build.await?
}

/// A tenant's record of a build, if it is there.
async fn record(tenant: &Tenant, id: &str) -> Result<Option<BuildInfo>> {
    let (channel, id) = (tenant.channel()?, id.to_owned());
    let got = tenant.spawn(async move { BuildServiceClient::new(channel).get(GetRequest { id }).await });
    match got.await? {
        Ok(info) => Ok(Some(info.into_inner())),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(status.into()),
    }
}

async fn put_blob(channel: Channel) -> Result<B3Digest> {
    let contents = b"what the honest tenant has";
    let chunk = BlobChunk { data: contents[..].into() };
    BlobServiceClient::new(channel).put(stream::iter([chunk])).await?;
    Ok(B3Digest::of(contents))
}

async fn stat(channel: Channel, blob: B3Digest) -> Result<()> {
    let request = StatBlobRequest { digest: blob.as_slice().to_vec().into(), ..Default::default() };
    BlobServiceClient::new(channel).stat(request).await?;
    Ok(())
}

/// The daemon uses no more memory at the end than at the begin: the medians of the first and of the last third of the samples.
fn is_flat(samples: &[u64]) -> Result<()> {
    let third = samples.len() / 3;
    ensure!(third > 0, "this tests nothing: there are {} samples of the daemon's memory", samples.len());
    let median = |samples: &[u64]| {
        let mut samples = samples.to_vec();
        samples.sort_unstable();
        samples[samples.len() / 2]
    };
    let (first, last) = (median(&samples[..third]), median(&samples[samples.len() - third..]));
    println!("the daemon's memory: {} MiB in the first third, {} MiB in the last", first >> 20, last >> 20);
    ensure!(last < first + MAX_GROWTH_BYTES, "the daemon has grown");
    Ok(())
}
