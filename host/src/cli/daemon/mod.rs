//! `daemon`: builds and the store over gRPC, until the first signal.
//!
//! ```text
//!   flags ─┐
//!   file ──┴▶ Config ─check─▶ state directory locked ─▶ store, VMM, image ─▶ farm ─▶ listening, READY=1
//!                                                                              │
//!   SIGTERM ─▶ no new builds or connections; builds that wait are refused ─▶ those that run end, or are cancelled when
//!              `drain_timeout` is over ─▶ connections close
//! ```

mod config;
mod sockets;
mod systemd;

use std::{
    convert::Infallible,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clap::Args;
use cofferdam_castore::{
    Store, blobservice, directoryservice,
    grpc::{self, Certificate, Identity, Listener, RoutesBuilder, ServeOptions, Tls, serve_routes},
    is_addr,
};
use cofferdam_images::{Image, default_dir};
use cofferdam_proto::{BUILD_DESCRIPTOR_SET, CASTORE_DESCRIPTOR_SET};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::transport::{Server, ServerTlsConfig};

use self::{
    config::{Config, ListenAddr, TlsConfig, VmmName},
    sockets::Sockets,
};
use super::{CliError, StoreArgs, print, store::state_dir};
use crate::{
    build::{Builder, Settings},
    jail::allow_descriptors,
    records::{Machine, Records},
    service::{self, Allowed, Crew, Farm, FarmSettings, Metrics, Service, Traces},
    vmm,
};

/// Descriptors that a daemon may need: for its connections, and for what builds and readers have open.
const MAX_DESCRIPTORS: u64 = 65_536;

/// How long the connections of builds that were cancelled may take to be told so.
const AFTER_DRAIN: Duration = Duration::from_secs(10);

const EXAMPLES: &str = "\
Examples:
  For this user, on a socket in the state directory:
    cofferdam daemon
    cofferdam run --daemon grpc+unix://$HOME/.local/state/cofferdam/daemon.sock --bin-sh -- /bin/sh -c 'echo hello'
  For other machines that have a certificate of ours:
    cofferdam daemon --listen '[::]:8000' --tls-certificate host.pem --tls-key host.key --tls-client-ca clients.pem
  As a service (docs/daemon.md):
    cofferdam daemon --config /etc/cofferdam/daemon.toml";

/// Builds for others, and serves the store, over gRPC
///
/// Speaks snix.build.v1, tvix.build.v1, cofferdam.v1, snix.castore.v1 and tvix.castore.v1. Prints one line for each address
/// that it listens on, as clients write it. The first signal lets running builds end.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct DaemonArgs {
    /// The configuration (TOML); flags have precedence
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Check the configuration and end
    #[arg(long, requires = "config")]
    check_config: bool,
    /// Where to listen: HOST:PORT, or the path of a Unix socket, which begins with a slash [default: sockets that systemd
    /// passes on, or daemon.sock in the state directory]
    #[arg(long, value_name = "ADDR")]
    listen: Vec<ListenAddr>,
    /// The chain of certificates (PEM) to serve every HOST:PORT with TLS
    #[arg(long, requires = "tls_key", value_name = "FILE")]
    tls_certificate: Option<PathBuf>,
    /// The key (PEM) of the first certificate
    #[arg(long, requires = "tls_certificate", value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Let in only clients with a certificate of these authorities (PEM)
    #[arg(long, requires = "tls_certificate", value_name = "FILE")]
    tls_client_ca: Option<PathBuf>,
    /// Run builds by emulation where KVM doesn't work, though that is no security boundary
    #[arg(long)]
    allow_emulation: bool,
}

impl DaemonArgs {
    pub(super) async fn execute(mut self, store: &StoreArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        let config = self.configuration()?;
        let options = config.options().map_err(|error| config::wrong(self.config.as_deref(), error))?;
        let asked = vmm_asked(&config)?;
        let store = with_config(store, &config);
        if self.check_config {
            check_addresses(&store)?;
            return config.tls.as_ref().map_or(Ok(()), |files| tls(files).map(drop));
        }
        allow_descriptors(MAX_DESCRIPTORS);
        let state = state_dir()?;
        let records = Records::open(&state.join("records"), config.retention())
            .map_err(|error| CliError::failed("can't keep records of builds", error))?;
        let store = store.open()?;
        let settings = settings(&config, asked, &state)?;
        let machine = Machine::from(&settings.vmm);
        let builder =
            Builder::new(store.clone(), settings).map_err(|error| CliError::failed("can't run builds here", error))?;
        let mut sockets = Sockets::default();
        let listeners = listen(&config, &state, &mut sockets).await?;
        let metrics = Arc::new(Metrics::new(state.clone()));
        let traces = config.traces.as_ref().map(|traces| Traces::to(&traces.endpoint.0)).transpose();
        let traces = traces.map_err(|error| CliError::wrong_because("traces.endpoint can't be used", error))?;
        let crew = Crew { store: store.clone(), builder, records, machine, metrics: Arc::clone(&metrics), traces };
        let farm_settings = FarmSettings {
            budget: config.budget(),
            bounds: config.bounds(),
            drain_timeout: config.drain_timeout(),
            reuse: config.reuse.unwrap_or(true),
        };
        let (farm, end) = Farm::start(crew, farm_settings, cancel.clone());
        let allowed =
            Allowed { options, max_memory_bytes: config.budget().memory_bytes, max_shell: config.max_shell() };
        let service = Service::new(farm.clone(), allowed);
        let _scraped = match &config.metrics {
            Some(at) => Some(serve_metrics(metrics, at.listen).await?),
            None => None,
        };
        let _watched = systemd::ready(farm);
        let serving = async {
            let served = serve(&store, service, listeners, config.drain_timeout() + AFTER_DRAIN, cancel).await;
            // Of builds that nobody waits for, only the farm knows. It never ends while nothing has told it to.
            cancel.cancel();
            served
        };
        let (served, ()) = tokio::join!(serving, systemd::stopping(cancel));
        end.await.map_err(|error| CliError::failed("the keeper of the builds broke down", error))?;
        served
    }

    fn configuration(&mut self) -> Result<Config, CliError> {
        let mut config = self.config.as_deref().map_or_else(|| Ok(Config::default()), Config::read)?;
        if !self.listen.is_empty() {
            config.listen = std::mem::take(&mut self.listen);
        }
        if let (Some(certificate), Some(key)) = (self.tls_certificate.take(), self.tls_key.take()) {
            config.tls = Some(TlsConfig { certificate, key, client_ca: self.tls_client_ca.take() });
        }
        config.allow_emulation |= self.allow_emulation;
        Ok(config)
    }
}

/// Flags and variables first.
fn with_config(args: &StoreArgs, config: &Config) -> StoreArgs {
    let first = |given: &Option<String>, configured: &Option<String>| {
        given.clone().filter(|addr| !addr.is_empty()).or_else(|| configured.clone())
    };
    StoreArgs {
        blob_service_addr: first(&args.blob_service_addr, &config.store.blob_service_addr),
        directory_service_addr: first(&args.directory_service_addr, &config.store.directory_service_addr),
    }
}

/// What can be told of the store's addresses without opening it.
fn check_addresses(store: &StoreArgs) -> Result<(), CliError> {
    let (blobs, directories) = store.addresses()?;
    let wrong = |error| CliError::wrong_because("the store's address is wrong", error);
    // Nothing is opened at an address that is refused.
    if !is_addr(&blobs) || blobs.starts_with("redb:") {
        blobservice::from_addr(&blobs).map_err(wrong)?;
    }
    if !is_addr(&directories) || directories.starts_with("file:") {
        directoryservice::from_addr(&directories).map_err(wrong)?;
    }
    Ok(())
}

fn vmm_asked(config: &Config) -> Result<Option<vmm::Kind>, CliError> {
    match (config.vmm, &config.cpu_model) {
        (Some(VmmName::CloudHypervisor), Some(_)) => {
            Err(CliError::wrong("cloud-hypervisor shows builds the host's CPU, whatever cpu_model says"))
        }
        (Some(VmmName::CloudHypervisor), None) => Ok(Some(vmm::Kind::CloudHypervisor)),
        (Some(VmmName::Qemu), _) | (None, Some(_)) => Ok(Some(vmm::Kind::Qemu)),
        (None, None) => Ok(None),
    }
}

fn settings(config: &Config, asked: Option<vmm::Kind>, state: &Path) -> Result<Settings, CliError> {
    let image = Image::open(&config.image.clone().unwrap_or_else(default_dir))
        .map_err(|error| CliError::failed("there is no guest image to boot", error))?;
    let choice = vmm::choose(asked)
        .map_err(|error| CliError::failed("no virtual machine can run here", error).try_this("cofferdam doctor"))?;
    tracing::info!(kind = %choice.kind, accelerator = %choice.accelerator, reason = choice.reason, "VMM chosen");
    if choice.accelerator == vmm::Accelerator::Tcg && !config.allow_emulation {
        let why = "builds could only be emulated here (QEMU TCG), which is no security boundary";
        let advice =
            "`cofferdam doctor` tells what KVM lacks; or --allow-emulation, in the configuration allow_emulation";
        return Err(CliError::damaged(why).try_this(advice));
    }
    if config.nested && choice.accelerator == vmm::Accelerator::Kvm && !vmm::kvm_nests() {
        return Err(CliError::wrong("builds can run no VMs of their own here: this host's KVM has `nested` off")
            .try_this(
                "`modprobe -r kvm_intel; modprobe kvm_intel nested=1`, or the same with kvm_amd; or nested = false",
            ));
    }
    let mut settings = Settings::new(image, choice, state.join("run"));
    config.apply(&mut settings);
    Ok(settings)
}

/// Listeners wherever it is said, or at the default.
async fn listen(config: &Config, state: &Path, sockets: &mut Sockets) -> Result<Vec<Listener>, CliError> {
    let tls = config.tls.as_ref().map(tls).transpose()?;
    let mut listeners = sockets::inherited(tls.as_ref())
        .map_err(|error| CliError::failed("can't listen on the sockets that systemd passes on", error))?;
    let mut addrs: Vec<_> = config.listen.iter().map(|ListenAddr(addr)| addr.clone()).collect();
    if addrs.is_empty() && listeners.is_empty() {
        addrs.push(state.join("daemon.sock").display().to_string());
    }
    // systemd's sockets may be named in the configuration, too.
    addrs.retain(|addr| !listeners.iter().any(|(_, reached_at)| reached_at.ends_with(&format!("://{addr}"))));
    for addr in &addrs {
        let bound = sockets.bind(addr, tls.as_ref(), config.socket_mode.0).await;
        listeners.push(bound.map_err(|error| CliError::failed(format!("can't listen on {addr:?}"), error))?);
    }
    listeners.into_iter().map(|(listener, reached_at)| print(&format!("{reached_at}\n")).map(|()| listener)).collect()
}

/// Until what is returned is dropped.
async fn serve_metrics(metrics: Arc<Metrics>, addr: SocketAddr) -> Result<AbortOnDropHandle<Infallible>, CliError> {
    let served = metrics.serve(addr).await;
    let (addr, serving) = served.map_err(|error| CliError::failed(format!("can't serve metrics on {addr}"), error))?;
    print(&format!("http://{addr}/metrics\n"))?;
    Ok(AbortOnDropHandle::new(tokio::spawn(serving)))
}

fn tls(files: &TlsConfig) -> Result<Tls, CliError> {
    let read = |path: &Path| {
        fs::read(path).map_err(|error| CliError::wrong_because(format!("can't read {}", path.display()), error))
    };
    let usable = |tls: ServerTlsConfig, what: String| match Server::builder().tls_config(tls) {
        Err(error) => Err(CliError::wrong_because(format!("{what} can't be used for TLS"), error)),
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
    service: Service,
    listeners: Vec<Listener>,
    drain: Duration,
    shutdown: &CancellationToken,
) -> Result<(), CliError> {
    let (options, stop) = (ServeOptions { drain, ..ServeOptions::default() }, CancellationToken::new());
    let mut routes = RoutesBuilder::default();
    grpc::add_services(&mut routes, store, &options, stop.clone());
    service.add_to(&mut routes);
    let services = [&grpc::SERVICES[..], &service::SERVICES].concat();
    let described = [CASTORE_DESCRIPTOR_SET, BUILD_DESCRIPTOR_SET];
    let served = serve_routes(routes, &services, &described, listeners, &options, shutdown.clone(), stop).await;
    served.map_err(|error| CliError::failed("can't serve", error))
}
