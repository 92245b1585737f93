//! The daemon: serves builds and the store over gRPC until it is cancelled.
//!
//! It checks its configuration and this host first. Then it locks the state directory, opens the store and listens. After
//! SIGTERM it accepts no new connections or builds and refuses builds that wait. Running builds may end within
//! `drain_timeout`; then they are cancelled and the connections closed.
//!
//! ```text
//!   Config ─check─▶ state directory locked ─▶ store ─▶ listening ─▶ scheduler ─▶ READY=1
//!                                                                                  │ SIGTERM
//!                                connections closed ◀─ drain_timeout at most ◀─ draining
//! ```

mod check;
mod collector;
mod config;
mod problem;
mod serving;
mod sockets;
mod systemd;
mod views;

use std::{convert::Infallible, fs, io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use cofferdam_castore::{
    Views,
    grpc::{self, Puts},
};
use cofferdam_proto::{BUILD_DESCRIPTOR_SET, CASTORE_DESCRIPTOR_SET};
use cofferdam_rpc::{Listener, RoutesBuilder, ServeOptions, Tls, serve_routes};
use tokio::{net::TcpListener, runtime::Handle};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use self::{
    check::Checked,
    collector::Collector,
    config::{NixCacheConfig, NixKey},
    serving::ServingThreads,
    sockets::{ANONYMOUS_ADVICE, Sockets},
};
use crate::{
    build::{Builder, Footprint, Settings, failure::Failure},
    frontend::{self, Allowed, Cache, Door, Frontends, Keys, Nix, Site},
    machine::jail::{Best, Delegated, Walls, allow_descriptors, landlock_version},
    provenance::{Signer, SigningKey},
    quota::Quotas,
    records::{Machine, Records},
    request::node_text,
    scheduler::{Backend, Operators, Scheduler, SchedulerSettings, StandbySettings},
    state::{StateError, state_dir},
    store_paths::StorePaths,
    telemetry::{Metrics, Traces},
};
pub(crate) use check::NO_CGROUPS_ADVICE;
pub(crate) use config::{Config, ListenAddr, Overrides, TlsConfig};
pub(crate) use problem::{Problem, chain};

/// File descriptors for connections, builds and readers.
const MAX_DESCRIPTORS: u64 = 65_536;

/// How long clients of cancelled builds have to receive that answer.
const AFTER_DRAIN: Duration = Duration::from_secs(10);

/// Called with each address that the daemon listens on, as clients write it.
pub(crate) type Listening<'a> = &'a (dyn Fn(&str) + Send + Sync);

/// Checks a configuration without opening the store or a machine.
///
/// # Errors
///
/// All that is wrong with it, and all that this host lacks for it.
pub(crate) fn check(config: &Config) -> Result<(), Failure> {
    check::check(config).map(drop).map_err(problem::failure)
}

/// Everything that [`check`] finds.
pub(crate) fn problems(config: &Config) -> Vec<Problem> {
    check::check(config).err().unwrap_or_default()
}

/// Runs a daemon until `cancel`, and then until its builds have ended.
///
/// # Errors
///
/// The daemon can't start, or can't go on.
pub(crate) async fn run(config: &Config, listening: Listening<'_>, cancel: &CancellationToken) -> Result<(), Failure> {
    let Checked { options, image, vmm, tls, tenants, speakers, network, signing_key } =
        check::check(config).map_err(problem::failure)?;
    tracing::info!(kind = %vmm.kind, accelerator = %vmm.accelerator, reason = vmm.reason, "VMM chosen");
    let weaknesses = config.weaknesses(vmm.schedules_cores());
    if !weaknesses.is_empty() {
        let names: Vec<_> = weaknesses.iter().map(|weakness| weakness.name).collect();
        tracing::warn!("this host could be safer, see `cofferdam doctor`: {}", names.join(", "));
    }
    let footprint = Footprint::of(&vmm);
    let max_memory_bytes = footprint.largest_memory(&options.limits, config.budget().memory_bytes);
    if let Some(reduced) = config.standby_beyond_budget(&options.limits, footprint) {
        tracing::warn!("{reduced}");
    }
    for weakness in weak_walls() {
        tracing::warn!("machines could be walled off better, see `cofferdam doctor`: {weakness}");
    }
    allow_descriptors(MAX_DESCRIPTORS);
    let state = state_dir()?;
    let records = Records::open(&state.join("records"), config.retention(tenants.clone()))
        .map_err(|error| failed("can't keep records of builds", &error))?;
    let signer = signer(signing_key, &state)?;
    let collected = if config.collection().is_some() { config.store.addrs.open_local()? } else { None };
    let store = collected.as_ref().map_or_else(|| config.store.addrs.open(), |local| Ok(local.store()))?;
    let mut settings = Settings::new(image, vmm, state.join("run"));
    config.apply(&mut settings);
    settings.network = network.is_some();
    let machine = Machine::from(&settings.vmm);
    let builder = Builder::new(store.clone(), settings).map_err(|error| failed("can't run builds here", &error))?;
    let mut sockets = Sockets::default();
    let listeners = listen(config, &state, tls.as_ref(), &mut sockets, listening).await?;
    let (views, _shared) = views::of(&config.store, &store, &state, &listeners).await?;
    let metrics = Arc::new(Metrics::new(state.clone()));
    let disk = Arc::new(config.disk()?);
    let traces = config.traces.as_ref().map(|traces| Traces::to(&traces.endpoint.0)).transpose();
    let traces = traces.map_err(|error| wrong("traces.endpoint can't be used", &error))?;
    let backend = Backend {
        store,
        views: views.clone(),
        builder: Arc::new(builder),
        records,
        machine,
        operators: Operators::among(tenants.clients()),
        tenants: tenants.clone(),
        signer,
        disk: Arc::clone(&disk),
        metrics: Arc::clone(&metrics),
        traces,
    };
    let scheduler_settings = SchedulerSettings {
        budget: config.budget(),
        bounds: config.bounds(),
        drain_timeout: config.drain_timeout(),
        reuse: config.reuse,
        standby: StandbySettings { bounds: config.standby(), first: options.clone() },
    };
    let paths = StorePaths::open(&state.join("nix"));
    let paths = Arc::new(paths.map_err(|error| failed("can't keep the store paths of Nix", &error))?);
    let collector = collected.zip(config.collection()).map(|(local, settings)| {
        let (paths, disk, metrics) = (Arc::clone(&paths), Arc::clone(&disk), Arc::clone(&metrics));
        Collector::start(local, settings, state.join("collected"), paths, disk, metrics)
    });
    let _collector = collector.transpose().map_err(|error| failed("can't collect garbage", &error))?;
    let (scheduler, end) = Scheduler::start(backend, scheduler_settings, cancel.clone());
    let allowed = Allowed { options, max_memory_bytes, max_shell: config.max_shell(), network };
    let (theirs, measured) = (tenants.clone(), Arc::clone(&metrics));
    let quotas = Quotas { disk, views: views.clone(), tenants: theirs, metrics: measured };
    let puts = Puts::new(Arc::new(quotas));
    let keys = nix_keys(config, &state)?;
    let nix = Arc::new(Nix {
        speakers,
        finish_abandoned: config.nix.finish_abandoned,
        keep_alive: config.nix.keep_alive(),
        impure_env: config.nix.impure_env.clone(),
        keep_logs: config.nix.cache.is_some(),
        keys,
        paths,
        views: views.clone(),
        puts: puts.clone(),
    });
    let threads =
        ServingThreads::start().map_err(|error| failed("can't start the threads that serve clients", &error))?;
    let web = match &config.web {
        Some(at) => Some(listen_for_browsers(at.listen, tls.as_ref(), listening).await?),
        None => None,
    };
    let frontends = Frontends::new(scheduler.clone(), allowed, web.as_ref().map(|(_, door)| Arc::clone(door)));
    let _shown = web.map(|(listener, door)| {
        let (scheduler, measured) = (scheduler.clone(), Arc::clone(&metrics));
        let pages = Site::pages(scheduler, views.clone(), tenants.clients(), measured, door);
        AbortOnDropHandle::new(threads.handle().spawn(async move {
            if let Err(error) = listener.serve_pages(pages).await {
                tracing::error!(error = &error as &dyn std::error::Error, "the page is not served any more");
            }
        }))
    });
    let _scraped = match &config.metrics {
        Some(at) => Some(serve_metrics(metrics, at.listen, listening).await?),
        None => None,
    };
    let _cached = match &config.nix.cache {
        Some(cache) => {
            Some(serve_cache(cache, (Arc::clone(&nix), scheduler.clone()), listening, threads.handle(), cancel).await?)
        }
        None => None,
    };
    let _watched = systemd::ready(scheduler);
    let drain = config.drain_timeout() + AFTER_DRAIN;
    let rpc = ServeOptions { drain, clients: tenants.clients().clone(), ..ServeOptions::default() };
    let served = threads.handle().spawn(serve(views.clone(), frontends, nix, puts, listeners, rpc, cancel.clone()));
    let served = AbortOnDropHandle::new(served);
    let serving = async {
        let served = served.await;
        // The scheduler waits for detached builds, too. After an error nothing else would end it.
        cancel.cancel();
        served.unwrap_or_else(|error| Err(failed("serving has panicked", &error)))
    };
    let (served, ()) = tokio::join!(serving, systemd::stopping(cancel));
    end.await.map_err(|error| failed("the scheduler has panicked", &error))?;
    views.flush().map_err(|error| failed("can't write who may see what of the store", &error))?;
    served
}

/// Signs with this key, or with one that is made at the first start.
fn signer(key: Option<SigningKey>, state: &Path) -> Result<Signer, Failure> {
    let path = state.join("provenance.key");
    let key = match key {
        Some(key) => key,
        None => SigningKey::open_or_create(&path)
            .map_err(|error| failed(format!("can't sign what builds make with the key {}", path.display()), &error))?,
    };
    let host = nix::unistd::gethostname().unwrap_or_default();
    Ok(Signer { key, host: node_text::percent_encoded(host.as_encoded_bytes()) })
}

/// The keys of Nix's store paths. The public half of the daemon's own one is in a file beside it.
fn nix_keys(config: &Config, state: &Path) -> Result<Keys, Failure> {
    let path = state.join("nix").join("signing.key");
    let unusable = |error: &(dyn std::error::Error + 'static)| {
        failed(format!("can't sign the store paths of Nix with the key {}", path.display()), error)
    };
    let own = SigningKey::open_or_create(&path).map_err(|error| unusable(&error))?;
    let host = nix::unistd::gethostname().unwrap_or_default();
    let name = format!("cofferdam-{}-1", node_text::percent_encoded(host.as_encoded_bytes()));
    let trusted = config.nix.trusted_keys.iter().map(|NixKey(key)| key.clone()).collect();
    let keys = Keys::new(own, name, trusted, config.nix.require_signatures);
    let public = path.with_extension("pub");
    fs::write(&public, keys.public() + "\n").map_err(|error| unusable(&error))?;
    Ok(keys)
}

/// Which walls around helper processes this host lacks, and why.
fn weak_walls() -> impl Iterator<Item = String> {
    let Best { walls, reason, .. } = Best::of_this_host();
    let user =
        (*walls == Walls::Namespaces).then(|| format!("their helper processes have the daemon's user id: {reason}"));
    let cgroup = match Delegated::find().map(|delegated| delegated.bounds().1) {
        Err(reason) => Some(format!("they have no cgroups of their own: {reason}")),
        Ok(free) if free.is_empty() => None,
        Ok(free) => Some(format!("their cgroups don't bound {}: controllers are missing", free.join(" and "))),
    };
    let landlock = (landlock_version() == 0).then(|| "this kernel has no Landlock".to_owned());
    [user, cgroup, landlock].into_iter().flatten()
}

/// This host can't do its part.
fn failed(message: impl Into<String>, error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::executor_because("host", message, error)
}

/// The configuration is wrong.
fn wrong(message: impl Into<String>, error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::wrong_because("configuration", message, error)
}

impl From<StateError> for Failure {
    fn from(error: StateError) -> Self {
        let failure = if error.blames_host() {
            Self::executor("host", error.to_string())
        } else {
            Self::wrong("configuration", error.to_string())
        };
        let advice = error.advice();
        let failure = failure.caused_by(&error);
        match advice {
            Some(advice) => failure.advised(advice),
            None => failure,
        }
    }
}

/// Listens on systemd's sockets and on the configured addresses, or on the default socket.
async fn listen(
    config: &Config,
    state: &Path,
    tls: Option<&Tls>,
    sockets: &mut Sockets,
    listening: Listening<'_>,
) -> Result<Vec<Listener>, Failure> {
    let mut listeners =
        sockets::inherited(tls).map_err(|error| failed("can't listen on the sockets that systemd passes", &error))?;
    let mut addrs: Vec<_> = config.listen.iter().map(|ListenAddr(addr)| addr.clone()).collect();
    if addrs.is_empty() && listeners.is_empty() {
        addrs.push(state.join("daemon.sock").display().to_string());
    }
    // The configuration may name systemd's sockets, too.
    addrs.retain(|addr| !listeners.iter().any(|(_, reached_at)| reached_at.ends_with(&format!("://{addr}"))));
    for addr in &addrs {
        let bound = sockets.bind(addr, tls, config.socket_mode.0).await;
        listeners.push(bound.map_err(|error| failed(format!("can't listen on {addr:?}"), &error))?);
    }
    // The check didn't see systemd's sockets, and host names may resolve to other addresses by now.
    let anonymous = listeners.iter().find_map(|(listener, _)| listener.forbid_anonymous_tcp().err());
    if let Some(error) = anonymous.filter(|_| !config.allow_anonymous_tcp) {
        return Err(Failure::wrong("configuration", error.to_string()).advised(ANONYMOUS_ADVICE));
    }
    listeners.iter().for_each(|(_, reached_at)| listening(reached_at));
    Ok(listeners.into_iter().map(|(listener, _)| listener).collect())
}

/// Serves metrics until the handle is dropped.
async fn serve_metrics(
    metrics: Arc<Metrics>,
    addr: SocketAddr,
    listening: Listening<'_>,
) -> Result<AbortOnDropHandle<Infallible>, Failure> {
    let served = metrics.serve(addr).await;
    let (addr, serving) = served.map_err(|error| failed(format!("can't serve metrics on {addr}"), &error))?;
    listening(&format!("http://{addr}/metrics"));
    Ok(AbortOnDropHandle::new(tokio::spawn(serving)))
}

/// Serves paths of Nix over HTTP until `shutdown`, and then what is asked for already until the handle is dropped.
async fn serve_cache(
    config: &NixCacheConfig,
    (nix, scheduler): (Arc<Nix>, Scheduler),
    listening: Listening<'_>,
    threads: &Handle,
    shutdown: &CancellationToken,
) -> Result<AbortOnDropHandle<()>, Failure> {
    let unusable = |error: io::Error| failed(format!("can't serve paths of Nix on {}", config.listen), &error);
    let listener = TcpListener::bind(config.listen).await.map_err(unusable)?;
    listening(&format!("http://{}", listener.local_addr().map_err(unusable)?));
    let cache = Cache::new(nix, scheduler, config.access(), config.compression);
    Ok(AbortOnDropHandle::new(threads.spawn(cache.serve(listener, shutdown.clone()))))
}

/// Listens for the page's visitors.
async fn listen_for_browsers(
    addr: SocketAddr,
    tls: Option<&Tls>,
    listening: Listening<'_>,
) -> Result<(Listener, Arc<Door>), Failure> {
    let bound = async {
        let listener = TcpListener::bind(addr).await?;
        let at = listener.local_addr()?;
        Ok::<_, std::io::Error>(match tls {
            Some(tls) => (Listener::Tls(listener, tls.clone()), format!("https://{at}")),
            None => (Listener::Tcp(listener), format!("http://{at}")),
        })
    };
    let (listener, address) = bound.await.map_err(|error| failed(format!("can't serve the page on {addr}"), &error))?;
    let door = Door::new(address).map_err(|error| failed("can't make a key for the page's tokens", &error))?;
    listening(&door.address);
    Ok((listener, Arc::new(door)))
}

async fn serve(
    views: Views,
    frontends: Frontends,
    nix: Arc<Nix>,
    puts: Puts,
    listeners: Vec<Listener>,
    rpc: ServeOptions,
    shutdown: CancellationToken,
) -> Result<(), Failure> {
    let (options, stop) = (grpc::ServeOptions { rpc, puts, ..grpc::ServeOptions::default() }, CancellationToken::new());
    let mut routes = RoutesBuilder::default();
    grpc::add_services(&mut routes, &views, &options, stop.clone());
    frontends.add_to(&mut routes, nix, &options.rpc.clients);
    let services = [&grpc::SERVICES[..], &frontend::SERVICES].concat();
    let described = [CASTORE_DESCRIPTOR_SET, BUILD_DESCRIPTOR_SET];
    let served = serve_routes(routes, &services, &described, listeners, &options.rpc, shutdown, stop).await;
    served.map_err(|error| failed("can't serve", &error))
}
