//! The daemon: builds and the store over gRPC, until it is cancelled.
//!
//! ```text
//!   Config ─check─▶ state directory locked ─▶ store, VMM, image ─▶ scheduler ─▶ listening, READY=1
//!                                                                              │
//!   SIGTERM ─▶ no new builds or connections; builds that wait are refused ─▶ those that run end, or are cancelled when
//!              `drain_timeout` is over ─▶ connections close
//! ```

mod config;
mod sockets;
mod systemd;

use std::{convert::Infallible, fs, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use cofferdam_castore::{Store, blobservice, directoryservice, grpc, is_addr};
use cofferdam_images::{Image, default_dir};
use cofferdam_proto::{BUILD_DESCRIPTOR_SET, CASTORE_DESCRIPTOR_SET};
use cofferdam_rpc::{
    AnonymousTcp, Certificate, Identity, Listener, RoutesBuilder, Tls, forbid_anonymous_tcp, serve_routes,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::transport::{Server, ServerTlsConfig};

use self::sockets::Sockets;
use crate::{
    build::{Builder, Settings, failure::Failure},
    frontend::{self, Allowed, Frontends},
    machine::{jail::allow_descriptors, vmm},
    records::{Machine, Records},
    scheduler::{Backend, Scheduler, SchedulerSettings},
    state::{StateError, StoreAddrs, state_dir},
    telemetry::{Metrics, Traces},
};
pub use config::{Config, ListenAddr, TlsConfig};

/// Descriptors that a daemon may need: for its connections, and for what builds and readers have open.
const MAX_DESCRIPTORS: u64 = 65_536;

/// How long the connections of builds that were cancelled may take to be told so.
const AFTER_DRAIN: Duration = Duration::from_secs(10);

/// Whom a daemon tells where it listens, as clients write it.
pub type Listening<'a> = &'a (dyn Fn(&str) + Send + Sync);

/// Checks a configuration as far as that needs no work.
///
/// # Errors
///
/// What is wrong with it.
pub fn check(config: &Config) -> Result<(), Failure> {
    config.options()?;
    vmm_asked(config)?;
    check_addresses(&config.store)?;
    let tls = config.tls.as_ref().map(tls).transpose()?;
    let mut addrs = config.listen.iter().filter_map(|ListenAddr(addr)| addr.parse().ok());
    addrs.try_for_each(|addr| authenticated(config, forbid_anonymous_tcp(addr, tls.as_ref())))
}

/// Runs a daemon until `cancel`, and then until its builds have ended. It tells `listening` each of its addresses.
///
/// # Errors
///
/// It can't start, or can't go on.
pub async fn run(config: &Config, listening: Listening<'_>, cancel: &CancellationToken) -> Result<(), Failure> {
    let options = config.options()?;
    let asked = vmm_asked(config)?;
    allow_descriptors(MAX_DESCRIPTORS);
    let state = state_dir()?;
    let records = Records::open(&state.join("records"), config.retention())
        .map_err(|error| failed("can't keep records of builds", &error))?;
    let store = config.store.open()?;
    let settings = settings(config, asked, &state)?;
    let machine = Machine::from(&settings.vmm);
    let builder = Builder::new(store.clone(), settings).map_err(|error| failed("can't run builds here", &error))?;
    let mut sockets = Sockets::default();
    let listeners = listen(config, &state, &mut sockets, listening).await?;
    let metrics = Arc::new(Metrics::new(state.clone()));
    let traces = config.traces.as_ref().map(|traces| Traces::to(&traces.endpoint.0)).transpose();
    let traces = traces.map_err(|error| wrong("traces.endpoint can't be used", &error))?;
    let backend = Backend { store: store.clone(), builder, records, machine, metrics: Arc::clone(&metrics), traces };
    let scheduler_settings = SchedulerSettings {
        budget: config.budget(),
        bounds: config.bounds(),
        drain_timeout: config.drain_timeout(),
        reuse: config.reuse.unwrap_or(true),
    };
    let (scheduler, end) = Scheduler::start(backend, scheduler_settings, cancel.clone());
    let allowed = Allowed { options, max_memory_bytes: config.budget().memory_bytes, max_shell: config.max_shell() };
    let frontends = Frontends::new(scheduler.clone(), allowed);
    let _scraped = match &config.metrics {
        Some(at) => Some(serve_metrics(metrics, at.listen, listening).await?),
        None => None,
    };
    let _watched = systemd::ready(scheduler);
    let serving = async {
        let served = serve(&store, frontends, listeners, config.drain_timeout() + AFTER_DRAIN, cancel).await;
        // Only the scheduler knows of builds that nobody waits for. It never ends unless it is told to.
        cancel.cancel();
        served
    };
    let (served, ()) = tokio::join!(serving, systemd::stopping(cancel));
    end.await.map_err(|error| failed("the scheduler broke down", &error))?;
    served
}

/// This host can't do something.
fn failed(message: impl Into<String>, error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::executor_because("host", message, error)
}

/// The configuration asks for something that can't be.
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

/// What can be told of the store's addresses without opening it.
fn check_addresses(store: &StoreAddrs) -> Result<(), Failure> {
    let (blobs, directories) = store.resolve()?;
    let wrong = |error| Failure::from(StateError::Addr(error));
    // Nothing is opened at an address that is refused.
    if !is_addr(&blobs) || blobs.starts_with("redb:") {
        blobservice::from_addr(&blobs).map_err(wrong)?;
    }
    if !is_addr(&directories) || directories.starts_with("file:") {
        directoryservice::from_addr(&directories).map_err(wrong)?;
    }
    Ok(())
}

fn vmm_asked(config: &Config) -> Result<Option<vmm::Kind>, Failure> {
    match (config.vmm, &config.cpu_model) {
        (Some(config::VmmName::CloudHypervisor), Some(_)) => Err(Failure::wrong(
            "configuration",
            "cloud-hypervisor shows builds the host's CPU, whatever cpu_model says",
        )),
        (Some(config::VmmName::CloudHypervisor), None) => Ok(Some(vmm::Kind::CloudHypervisor)),
        (Some(config::VmmName::Qemu), _) | (None, Some(_)) => Ok(Some(vmm::Kind::Qemu)),
        (None, None) => Ok(None),
    }
}

fn settings(config: &Config, asked: Option<vmm::Kind>, state: &Path) -> Result<Settings, Failure> {
    let image = Image::open(&config.image.clone().unwrap_or_else(default_dir))
        .map_err(|error| failed("there is no guest image to boot", &error))?;
    let choice = vmm::choose(asked)
        .map_err(|error| failed("no virtual machine can run here", &error).advised("cofferdam doctor"))?;
    tracing::info!(kind = %choice.kind, accelerator = %choice.accelerator, reason = choice.reason, "VMM chosen");
    if choice.accelerator == vmm::Accelerator::Tcg && !config.allow_emulation {
        let why = "builds could only be emulated here (QEMU TCG), which is no security boundary";
        let advice =
            "`cofferdam doctor` tells what KVM lacks; or --allow-emulation, in the configuration allow_emulation";
        return Err(Failure::executor("emulation", why).advised(advice));
    }
    if config.nested && choice.accelerator == vmm::Accelerator::Kvm && !vmm::kvm_nests() {
        let why = "builds can run no VMs of their own here: this host's KVM has `nested` off";
        let advice =
            "`modprobe -r kvm_intel; modprobe kvm_intel nested=1`, or the same with kvm_amd; or nested = false";
        return Err(Failure::wrong("configuration", why).advised(advice));
    }
    let mut settings = Settings::new(image, choice, state.join("run"));
    config.apply(&mut settings);
    Ok(settings)
}

/// Listeners wherever it is said, or at the default.
async fn listen(
    config: &Config,
    state: &Path,
    sockets: &mut Sockets,
    listening: Listening<'_>,
) -> Result<Vec<Listener>, Failure> {
    let tls = config.tls.as_ref().map(tls).transpose()?;
    let mut listeners = sockets::inherited(tls.as_ref())
        .map_err(|error| failed("can't listen on the sockets that systemd passes on", &error))?;
    let mut addrs: Vec<_> = config.listen.iter().map(|ListenAddr(addr)| addr.clone()).collect();
    if addrs.is_empty() && listeners.is_empty() {
        addrs.push(state.join("daemon.sock").display().to_string());
    }
    // systemd's sockets may be named in the configuration, too.
    addrs.retain(|addr| !listeners.iter().any(|(_, reached_at)| reached_at.ends_with(&format!("://{addr}"))));
    for addr in &addrs {
        let bound = sockets.bind(addr, tls.as_ref(), config.socket_mode.0).await;
        listeners.push(bound.map_err(|error| failed(format!("can't listen on {addr:?}"), &error))?);
    }
    for (listener, _) in &listeners {
        authenticated(config, listener.forbid_anonymous_tcp())?;
    }
    listeners.iter().for_each(|(_, reached_at)| listening(reached_at));
    Ok(listeners.into_iter().map(|(listener, _)| listener).collect())
}

/// Refuses a listener that anyone may use, unless the configuration asks for it.
fn authenticated(config: &Config, checked: Result<(), AnonymousTcp>) -> Result<(), Failure> {
    match checked {
        Err(error) if !config.allow_anonymous_tcp => Err(Failure::wrong("configuration", error.to_string()).advised(
            "require client certificates (client_ca in [tls]), listen on a Unix socket or a loopback address, or set \
             allow_anonymous_tcp = true",
        )),
        _ => Ok(()),
    }
}

/// Until what is returned is dropped.
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

fn tls(files: &TlsConfig) -> Result<Tls, Failure> {
    let read = |path: &Path| fs::read(path).map_err(|error| wrong(format!("can't read {}", path.display()), &error));
    let usable = |tls: ServerTlsConfig, what: String| match Server::builder().tls_config(tls) {
        Err(error) => Err(wrong(format!("{what} can't be used for TLS"), &error)),
        Ok(_) => Ok(()),
    };
    let identity = Identity::from_pem(read(&files.certificate)?, read(&files.key)?);
    let tls = ServerTlsConfig::new().identity(identity.clone());
    usable(tls.clone(), format!("the certificate {:?} with the key {:?}", files.certificate, files.key))?;
    let Some(path) = &files.client_ca else { return Ok(Tls { identity, client_ca: None }) };
    let client_ca = Certificate::from_pem(read(path)?);
    usable(tls.client_ca_root(client_ca.clone()), format!("the authorities' certificates {path:?}"))?;
    Ok(Tls { identity, client_ca: Some(client_ca) })
}

async fn serve(
    store: &Store,
    frontends: Frontends,
    listeners: Vec<Listener>,
    drain: Duration,
    shutdown: &CancellationToken,
) -> Result<(), Failure> {
    let rpc = cofferdam_rpc::ServeOptions { drain, ..cofferdam_rpc::ServeOptions::default() };
    let (options, stop) = (grpc::ServeOptions { rpc, ..grpc::ServeOptions::default() }, CancellationToken::new());
    let mut routes = RoutesBuilder::default();
    grpc::add_services(&mut routes, store, &options, stop.clone());
    frontends.add_to(&mut routes);
    let services = [&grpc::SERVICES[..], &frontend::SERVICES].concat();
    let described = [CASTORE_DESCRIPTOR_SET, BUILD_DESCRIPTOR_SET];
    let served = serve_routes(routes, &services, &described, listeners, &options.rpc, shutdown.clone(), stop).await;
    served.map_err(|error| failed("can't serve", &error))
}
