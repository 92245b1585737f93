//! Metrics for Prometheus. docs/daemon.md lists their names.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Method, Request, Response, StatusCode, header, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::{
    encoding::text::encode,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};
use tokio::{net::TcpListener, sync::Semaphore};

use crate::{
    build::failure::Failure,
    disk::Space,
    network::Connection,
    records::{Outcome, Record},
};

/// Scrapes at a time; more wait.
const MAX_CONNECTIONS: usize = 16;

/// How long a scrape may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Pause after `accept` failed, for want of descriptors for example.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

type Label<const N: usize> = [(&'static str, String); N];

/// Amounts of the resources in the budget.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Amounts {
    pub(crate) memory_bytes: u64,
    pub(crate) cpus: u32,
    pub(crate) builds: u32,
}

/// Some metrics as they stand.
#[derive(Debug)]
pub(crate) struct Gauges {
    /// Each resource of the budget: what is in use, and how much there is.
    pub(crate) budget: [(&'static str, i64, i64); 3],
    /// Builds that wait, by what for.
    pub(crate) waiting: Vec<(&'static str, i64)>,
    /// Standby machines that boot, and that are ready.
    pub(crate) standby: (i64, i64),
    /// The space of the state directory's file system, if that can be reached.
    pub(crate) space: Option<Space>,
}

/// All metrics.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    ended: Family<Label<2>, Counter>,
    refused: Family<Label<1>, Counter>,
    joined: Counter,
    reused: Counter,
    phases: Family<Label<1>, Histogram>,
    puts: Histogram,
    waiting: Family<Label<1>, Gauge>,
    running: Gauge,
    standby: Family<Label<1>, Gauge>,
    standby_uses: Family<Label<1>, Counter>,
    log_bytes: Counter,
    connections: Family<Label<1>, Counter>,
    connection_bytes: Family<Label<1>, Counter>,
    collections: Family<Label<2>, Counter>,
    collected_bytes: Counter,
    used: Family<Label<1>, Gauge>,
    budget: Family<Label<1>, Gauge>,
    free_bytes: Gauge,
    state_dir: std::path::PathBuf,
}

impl Metrics {
    /// The metrics of a daemon with this state directory.
    pub(crate) fn new(state_dir: std::path::PathBuf) -> Self {
        // From 10 ms to some two hours.
        let histogram: fn() -> Histogram = || Histogram::new(exponential_buckets(0.01, 2.5, 16));
        let this = Self {
            registry: Registry::with_prefix("cofferdam"),
            ended: Family::default(),
            refused: Family::default(),
            joined: Counter::default(),
            reused: Counter::default(),
            phases: Family::new_with_constructor(histogram),
            puts: histogram(),
            waiting: Family::default(),
            running: Gauge::default(),
            standby: Family::default(),
            standby_uses: Family::default(),
            log_bytes: Counter::default(),
            connections: Family::default(),
            connection_bytes: Family::default(),
            collections: Family::default(),
            collected_bytes: Counter::default(),
            used: Family::default(),
            budget: Family::default(),
            free_bytes: Gauge::default(),
            state_dir,
        };
        this.registered()
    }

    fn registered(mut self) -> Self {
        let to = &mut self.registry;
        to.register("builds", "Builds that ended, by outcome and reason", self.ended.clone());
        to.register("builds_refused", "Refused requests, by reason", self.refused.clone());
        to.register("builds_joined", "Requests that joined an equal active build", self.joined.clone());
        to.register("builds_reused", "Requests answered with an earlier success", self.reused.clone());
        let phases = "Duration of the phases of ended builds, by phase";
        to.register_with_unit("build_phase", phases, Unit::Seconds, self.phases.clone());
        let puts = "Duration of clients' puts of blobs, directories and Nix's paths";
        to.register_with_unit("put", puts, Unit::Seconds, self.puts.clone());
        to.register("builds_waiting", "Waiting builds, by what they wait for", self.waiting.clone());
        to.register("builds_running", "Running builds, each with one VM at most", self.running.clone());
        to.register("standby_machines", "Machines without a build, by state", self.standby.clone());
        to.register("builds_standby", "Builds that ended, by the use of a standby machine", self.standby_uses.clone());
        let log = "Size of the logs of ended builds, stdout and stderr together";
        to.register_with_unit("build_log", log, Unit::Bytes, self.log_bytes.clone());
        to.register("connections", "Connections of builds, by verdict", self.connections.clone());
        let carried = "Bytes on connections of builds, by direction";
        to.register_with_unit("connection", carried, Unit::Bytes, self.connection_bytes.clone());
        to.register("gc", "Garbage collections of the store, by cause and outcome", self.collections.clone());
        let collected = "Size of the blobs that garbage collections have removed";
        to.register_with_unit("gc_freed", collected, Unit::Bytes, self.collected_bytes.clone());
        to.register("budget_used", "Resources in use by running builds, by resource", self.used.clone());
        to.register("budget", "Resources for all running builds together, by resource", self.budget.clone());
        let free = "Free space on the file system of the state directory";
        to.register_with_unit("state_free", free, Unit::Bytes, self.free_bytes.clone());
        self
    }

    /// Counts a build that has ended.
    pub(crate) fn ended(&self, record: &Record) {
        let (outcome, reason) = match &record.outcome {
            Some(Outcome::Built(_)) => ("succeeded", ""),
            Some(Outcome::Failed(failure)) => (failure.kind.word(), failure.reason.as_str()),
            None => ("unknown", ""),
        };
        self.ended.get_or_create(&[("outcome", outcome.to_owned()), ("reason", reason.to_owned())]).inc();
        if let Some(standby) = record.standby {
            self.standby_uses.get_or_create(&[("standby", standby.word().to_owned())]).inc();
        }
        self.log_bytes.inc_by(record.log.bytes);
        for (phase, spent) in record.spans() {
            self.phases
                .get_or_create(&[("phase", phase.word().to_owned())])
                .observe((spent.end - spent.start).as_secs_f64());
        }
    }

    /// Counts a connection that has ended, or was denied.
    pub(crate) fn connection(&self, connection: &Connection) {
        self.connections.get_or_create(&[("verdict", connection.verdict.word().to_owned())]).inc();
        for (direction, bytes) in [("sent", connection.sent), ("received", connection.received)] {
            self.connection_bytes.get_or_create(&[("direction", direction.to_owned())]).inc_by(bytes);
        }
    }

    /// Counts a garbage collection that has freed so many bytes, or failed.
    pub(crate) fn collected(&self, cause: &str, bytes: Option<u64>) {
        let outcome = if bytes.is_some() { "succeeded" } else { "failed" };
        self.collections.get_or_create(&[("cause", cause.to_owned()), ("outcome", outcome.to_owned())]).inc();
        self.collected_bytes.inc_by(bytes.unwrap_or(0));
    }

    /// Counts a client's put that has succeeded or failed.
    pub(crate) fn put(&self, duration: Duration) {
        self.puts.observe(duration.as_secs_f64());
    }

    /// Counts a request that was refused.
    pub(crate) fn refused(&self, failure: &Failure) {
        self.refused.get_or_create(&[("reason", failure.reason.clone())]).inc();
    }

    pub(crate) fn joined(&self) {
        self.joined.inc();
    }

    pub(crate) fn reused(&self) {
        self.reused.inc();
    }

    /// Sets the numbers of waiting and running builds, and the used part of the budget.
    pub(crate) fn queue(&self, waiting: impl IntoIterator<Item = (&'static str, i64)>, used: Amounts, budget: Amounts) {
        for (word, count) in waiting {
            self.waiting.get_or_create(&[("for", word.to_owned())]).set(count);
        }
        self.running.set(used.builds.into());
        for (family, Amounts { memory_bytes, cpus, builds }) in [(&self.used, used), (&self.budget, budget)] {
            let resources = [("memory_bytes", memory_bytes), ("cpus", cpus.into()), ("builds", builds.into())];
            for (resource, amount) in resources {
                let amount = i64::try_from(amount).unwrap_or(i64::MAX);
                family.get_or_create(&[("resource", resource.to_owned())]).set(amount);
            }
        }
    }

    /// Sets the numbers of standby machines.
    pub(crate) fn standby(&self, booting: usize, ready: usize) {
        for (state, count) in [("booting", booting), ("ready", ready)] {
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            self.standby.get_or_create(&[("state", state.to_owned())]).set(count);
        }
    }

    fn look_at_disk(&self) {
        if let Ok(space) = Space::of(&self.state_dir) {
            self.free_bytes.set(i64::try_from(space.free).unwrap_or(i64::MAX));
        }
    }

    /// The state of the queue, where builds wait for these, of the stock and of the disk.
    pub(crate) fn gauges(&self, waiting_for: &[&'static str]) -> Gauges {
        let gauge = |family: &Family<Label<1>, Gauge>, label, value: &str| {
            family.get(&[(label, value.to_owned())]).map_or(0, |gauge| gauge.get())
        };
        let resources = [("Memory", "memory_bytes"), ("CPUs", "cpus"), ("Builds", "builds")];
        let amount = |(name, resource)| {
            (name, gauge(&self.used, "resource", resource), gauge(&self.budget, "resource", resource))
        };
        Gauges {
            budget: resources.map(amount),
            waiting: waiting_for.iter().map(|word| (*word, gauge(&self.waiting, "for", word))).collect(),
            standby: (gauge(&self.standby, "state", "booting"), gauge(&self.standby, "state", "ready")),
            space: Space::of(&self.state_dir).ok(),
        }
    }

    /// All metrics in the OpenMetrics text format.
    pub(crate) fn text(&self) -> String {
        self.look_at_disk();
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("a String takes all");
        text
    }

    /// Answers `GET /metrics` on `addr` until the returned future is dropped. Also returns the address that it listens on.
    ///
    /// # Errors
    ///
    /// The address can't be bound.
    pub(crate) async fn serve(
        self: Arc<Self>,
        addr: SocketAddr,
    ) -> io::Result<(SocketAddr, impl Future<Output = Infallible> + Send + 'static)> {
        let listener = TcpListener::bind(addr).await?;
        let addr = listener.local_addr()?;
        let turns = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        Ok((addr, async move {
            loop {
                let turn = turns.clone().acquire_owned().await;
                let Ok((connection, _)) = listener.accept().await else {
                    tokio::time::sleep(ACCEPT_RETRY).await;
                    continue;
                };
                let this = Arc::clone(&self);
                let service = service_fn(move |request| {
                    let answer = this.answer(&request);
                    async move { Ok::<_, Infallible>(answer) }
                });
                tokio::spawn(async move {
                    let _turn = turn;
                    let mut server = http1::Builder::new();
                    server.timer(TokioTimer::new()).header_read_timeout(REQUEST_TIMEOUT).keep_alive(false);
                    let served = server.serve_connection(TokioIo::new(connection), service);
                    // A client that disconnects or is too slow gets no answer.
                    let _ = tokio::time::timeout(REQUEST_TIMEOUT, served).await;
                });
            }
        }))
    }

    fn answer<B>(&self, request: &Request<B>) -> Response<Full<Bytes>> {
        let found = request.method() == Method::GET && request.uri().path() == "/metrics";
        let mut answer = Response::new(Full::from(if found { self.text() } else { "see /metrics\n".to_owned() }));
        if found {
            let format = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            answer.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(format));
        } else {
            *answer.status_mut() = StatusCode::NOT_FOUND;
        }
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boards_and_alerts_name_metrics_that_exist() {
        let metrics = Metrics::new("/".into());
        // A family without members isn't exposed.
        let one = [("label", String::new())];
        let two = [("label", String::new()), ("other", String::new())];
        for family in [&metrics.refused, &metrics.standby_uses, &metrics.connections, &metrics.connection_bytes] {
            drop(family.get_or_create(&one));
        }
        for family in [&metrics.waiting, &metrics.standby, &metrics.used, &metrics.budget] {
            drop(family.get_or_create(&one));
        }
        for family in [&metrics.ended, &metrics.collections] {
            drop(family.get_or_create(&two));
        }
        drop(metrics.phases.get_or_create(&one));
        let exposed = metrics.text();
        for kit in
            [include_str!("../../../docs/monitoring/grafana.json"), include_str!("../../../docs/monitoring/alerts.yml")]
        {
            let words = kit.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            let names: Vec<_> = words.filter(|word| word.starts_with("cofferdam_")).collect();
            assert!(!names.is_empty());
            for name in names {
                let (family, kind) = match (name.strip_suffix("_total"), name.strip_suffix("_bucket")) {
                    (Some(family), _) => (family, "counter"),
                    (_, Some(family)) => (family, "histogram"),
                    _ => (name, "gauge"),
                };
                assert!(exposed.contains(&format!("# TYPE {family} {kind}\n")), "{name}: {exposed}");
            }
        }
    }
}
