//! The daemon's configuration file.

mod cgroups;
mod network;
mod nix;
mod source;
#[cfg(test)]
mod tests;
mod values;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use cofferdam_castore::local_path;
use serde::Deserialize;

pub(super) use self::cgroups::CgroupsConfig;
pub(super) use self::network::{ClientConfig, NetworkConfig};
pub(super) use self::nix::{NixCacheConfig, NixConfig};
pub(super) use self::source::Key;
use self::source::Source;
pub(crate) use self::values::ListenAddr;
pub(super) use self::values::{
    CertificateName, ClientName, Endpoint, FreeSpace, GuestPath, Isolation, Machines, NixKey, NixToken, SharedRoot,
    SocketMode, TenantName, UserName, VmmName, WeaknessName, Weight,
};
use super::{
    collector::Collection,
    problem::{Place, Problem},
};
use crate::{
    build::{Footprint, Options, Settings, failure::Failure},
    disk::Disk,
    limits::{Asked, Limits},
    machine::{
        hardening::{self, Weakness},
        jail::{Rules, Walls},
    },
    quantity::{Count, Size, Time},
    records::Retention,
    request::Host,
    scheduler::{
        Reuse, StockBounds,
        queue::{Bounds, Budget},
    },
    state::{StateError, StoreAddrs, state_dir},
    tenants::{Tenant, Tenants, Terms},
};

/// Share of the host's memory that builds may use by default, in percent.
const DEFAULT_MEMORY_PERCENT: u64 = 75;

/// Most of the budget that a build's inputs may reserve by default: one part in so many.
const INPUTS_SHARE: u64 = 8;

/// The time from one garbage collection to the next by default.
const GC_EVERY: Duration = Duration::from_secs(24 * 60 * 60);

/// How long contents are kept by default.
const GC_KEEP: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// The same while the disk is too full.
const GC_LOW_KEEP: Duration = Duration::from_secs(60 * 60);

/// How long a standby machine is kept by default.
const STANDBY_AGE: Duration = Duration::from_secs(60 * 60);

/// The settings of a daemon. Every setting has a default.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    /// The file that it was read from.
    #[serde(skip)]
    source: Option<Source>,
    /// Settings of the file that couldn't be read, and so have their defaults here.
    #[serde(skip)]
    unread: Vec<(Key, Problem)>,
    /// Settings that flags or variables have overridden.
    #[serde(skip)]
    overridden: Vec<Key>,
    /// Addresses to listen on; see `--listen`.
    pub(crate) listen: Vec<ListenAddr>,
    /// The permissions of Unix sockets that the daemon creates.
    pub(super) socket_mode: SocketMode,
    /// Listen beyond loopback without requiring client certificates.
    pub(super) allow_anonymous_tcp: bool,
    /// Run builds without hardware virtualisation.
    pub(crate) allow_emulation: bool,
    pub(super) reuse: Reuse,
    pub(super) image: Option<PathBuf>,
    pub(super) vmm: Option<VmmName>,
    pub(super) cpu_model: Option<String>,
    pub(super) hugepages: bool,
    /// Run builds that ask for the network without it; otherwise they are refused.
    pub(super) withhold_network: bool,
    /// Give `/dev/kvm` to builds that ask for it.
    pub(super) nested: bool,
    /// Let builds make user namespaces.
    pub(super) user_namespaces: bool,
    /// What builds may ask to see, read-only: the path in the build, and the path on this host.
    pub(super) host_paths: BTreeMap<GuestPath, PathBuf>,
    pub(super) connect_timeout: Option<Time>,
    /// How long running builds may take to finish after SIGTERM.
    pub(super) drain_timeout: Option<Time>,
    pub(crate) tls: Option<TlsConfig>,
    pub(super) store: StoreConfig,
    pub(super) operators: OperatorsConfig,
    /// Without this table everyone who can connect is a tenant.
    pub(super) tenants: Option<BTreeMap<TenantName, TenantConfig>>,
    pub(super) nix: NixConfig,
    pub(super) disk: DiskConfig,
    pub(super) gc: Option<GcConfig>,
    pub(super) budget: BudgetConfig,
    pub(super) queue: QueueConfig,
    pub(super) build: Asked,
    pub(super) standby: StandbyConfig,
    pub(super) records: RecordsConfig,
    pub(super) jail: JailConfig,
    pub(super) cgroups: CgroupsConfig,
    pub(super) host: HostConfig,
    pub(super) network: Option<NetworkConfig>,
    pub(super) provenance: ProvenanceConfig,
    pub(super) metrics: Option<MetricsConfig>,
    pub(super) traces: Option<TracesConfig>,
    pub(super) web: Option<WebConfig>,
}

/// The daemon's certificate and key, and the CAs of its clients.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TlsConfig {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
    pub(crate) client_ca: Option<PathBuf>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct StoreTable {
    blob_service_addr: Option<String>,
    directory_service_addr: Option<String>,
    isolation: Option<Isolation>,
    shared: Vec<SharedRoot>,
}

/// Where the store is, and what its tenants see of it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(from = "StoreTable")]
pub(super) struct StoreConfig {
    pub(super) addrs: StoreAddrs,
    /// By default it depends on who can connect.
    pub(super) isolation: Option<Isolation>,
    /// Roots that all tenants see.
    pub(super) shared: Vec<SharedRoot>,
}

impl From<StoreTable> for StoreConfig {
    fn from(table: StoreTable) -> Self {
        let StoreTable { blob_service_addr: blobs, directory_service_addr: directories, isolation, shared } = table;
        Self { addrs: StoreAddrs { blobs, directories }, isolation, shared }
    }
}

/// Who may see and cancel the builds of all clients, beside root.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct OperatorsConfig {
    pub(super) users: Vec<UserName>,
    pub(super) certificates: Vec<CertificateName>,
}

/// What a tenant may have.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct TenantConfig {
    share: Option<Weight>,
    running: Option<Count>,
    queued: Option<Count>,
    pub(super) stored: Option<Size>,
    pub(super) disk: Option<Size>,
    records: Option<Size>,
}

impl TenantConfig {
    pub(super) fn tenant(&self) -> Tenant {
        let default = Terms::default();
        let terms = Terms {
            share: self.share.map_or(default.share, |Weight(share)| share),
            running: self.running.map(|Count(builds)| builds),
            queued: self.queued.map(|Count(builds)| builds as usize),
            disk: self.disk.map(|Size(bytes)| bytes),
        };
        let bytes = |size: Option<Size>| size.map(|Size(bytes)| bytes);
        Tenant { terms, stored: bytes(self.stored), records: bytes(self.records) }
    }
}

/// How statements about builds are signed.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct ProvenanceConfig {
    /// A file with an Ed25519 key; otherwise the daemon makes one in its state directory.
    pub(super) key: Option<PathBuf>,
}

/// The disks that the daemon writes to.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct DiskConfig {
    /// Free space below which nothing new is stored and no build starts.
    pub(super) min_free: Option<FreeSpace>,
}

/// Garbage collection of the store.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct GcConfig {
    every: Option<Time>,
    keep: Option<Time>,
    low_keep: Option<Time>,
}

/// For all running builds together.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct BudgetConfig {
    memory: Option<Size>,
    cpus: Option<Count>,
    builds: Option<Count>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct QueueConfig {
    max: Option<Count>,
    max_per_client: Option<Count>,
}

/// Machines that boot before there is a request for them.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct StandbyConfig {
    machines: Option<Machines>,
    memory: Option<Size>,
    age: Option<Time>,
}

/// What separates helper processes from the daemon and from each other.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct JailConfig {
    /// The daemon refuses to start with less.
    require: Walls,
}

/// What is known of the host and accepted.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct HostConfig {
    /// Weaknesses that nobody needs to be told of.
    waive: Vec<WeaknessName>,
}

/// Where metrics are served.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MetricsConfig {
    pub(super) listen: SocketAddr,
}

/// Where the page is served.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WebConfig {
    pub(super) listen: SocketAddr,
}

/// Where spans are sent, by OTLP over gRPC.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TracesConfig {
    pub(super) endpoint: Endpoint,
}

/// How long finished builds are remembered.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RecordsConfig {
    max_age: Option<Time>,
    max_size: Option<Size>,
}

/// Flags and variables of the environment. They take precedence over the file.
#[derive(Debug, Default)]
pub(crate) struct Overrides {
    /// Addresses to listen on. Empty leaves those of the file.
    pub listen: Vec<ListenAddr>,
    /// Certificates for TCP.
    pub tls: Option<TlsConfig>,
    /// Listen beyond loopback without requiring client certificates.
    pub allow_anonymous_tcp: bool,
    /// Run builds without hardware virtualisation.
    pub allow_emulation: bool,
    /// The store.
    pub store: StoreAddrs,
}

impl Config {
    /// Reads a file. Settings with unusable values are reported by [`check`](super::check), together with all other
    /// problems.
    ///
    /// # Errors
    ///
    /// The file can't be read, or isn't TOML.
    pub(crate) fn read(path: &Path) -> Result<Self, Failure> {
        Self::from_source(Source::read(path)?)
    }

    #[cfg(test)]
    pub(super) fn of(text: &str) -> Self {
        Self::from_source(Source::of(text)).expect("tests write TOML")
    }

    fn from_source(source: Source) -> Result<Self, Failure> {
        let (mut config, unread) = source.parse::<Self>()?;
        (config.source, config.unread) = (Some(source), unread);
        Ok(config)
    }

    /// Takes in flags and variables.
    pub(crate) fn override_with(&mut self, overrides: Overrides) {
        let Overrides { listen, tls, allow_anonymous_tcp, allow_emulation, store } = overrides;
        if !listen.is_empty() {
            self.listen = listen;
            self.overridden.push("listen".into());
        }
        if tls.is_some() {
            self.tls = tls;
            self.overridden.push("tls".into());
        }
        self.allow_anonymous_tcp |= allow_anonymous_tcp;
        self.allow_emulation |= allow_emulation;
        for (addr, key) in
            [(&store.blobs, "store.blob_service_addr"), (&store.directories, "store.directory_service_addr")]
        {
            if addr.as_ref().is_some_and(|addr| !addr.is_empty()) {
                self.overridden.push(key.into());
            }
        }
        self.store.addrs = store.or(&self.store.addrs);
        let overridden = &self.overridden;
        self.unread.retain(|(key, _)| !overridden.iter().any(|by| key.is_in(by)));
    }

    /// Settings of the file that couldn't be read.
    pub(super) fn unread(&self) -> impl Iterator<Item = &Problem> {
        self.unread.iter().map(|(_, problem)| problem)
    }

    /// Whether this setting, and every setting in this table, could be read.
    pub(super) fn is_read(&self, key: &str) -> bool {
        let key = key.into();
        !self.unread.iter().any(|(unread, _)| unread.is_in(&key))
    }

    /// Where the file sets this key. A setting that isn't from the file has no place but its key.
    pub(super) fn place(&self, key: &Key) -> Place {
        let in_file = self.source.as_ref().filter(|_| !self.overridden.iter().any(|by| key.is_in(by)));
        let place = in_file.and_then(|source| source.find(key));
        place.unwrap_or_else(|| Place { line: None, text: key.to_string() })
    }

    /// The options of a build that asks for nothing.
    pub(super) fn options(&self, footprint: Footprint) -> Options {
        let (default, budget) = (Limits::default(), self.budget());
        let cpus = default.cpus.min(budget.cpus);
        let inputs_memory_bytes = default.inputs_memory_bytes.min(budget.memory_bytes / INPUTS_SHARE);
        // The memory depends on the other limits.
        let limits = Limits { cpus, inputs_memory_bytes, ..default }.with(&self.build);
        let memory_bytes = default.memory_bytes.min(footprint.largest_memory(&limits, budget.memory_bytes));
        Options::new(&Limits { memory_bytes, cpus, inputs_memory_bytes, ..default }, &self.build)
    }

    /// For all running builds together.
    pub(super) fn budget(&self) -> Budget {
        let cpus = std::thread::available_parallelism().map_or(1, |cpus| u32::try_from(cpus.get()).unwrap_or(u32::MAX));
        let memory = Host::this().memory_bytes / 100 * DEFAULT_MEMORY_PERCENT;
        Budget {
            memory_bytes: self.budget.memory.map_or(memory, |Size(bytes)| bytes),
            cpus: self.budget.cpus.map_or(cpus, |Count(cpus)| cpus),
            builds: self.budget.builds.map_or(u32::MAX, |Count(builds)| builds),
        }
    }

    /// The file systems of the state directory and of a local store, with their watermark.
    ///
    /// # Errors
    ///
    /// There is no state directory.
    pub(super) fn disk(&self) -> Result<Disk, StateError> {
        let (blobs, directories) = self.store.addrs.resolve()?;
        let file = local_path(&directories).filter(|path| !path.is_dir());
        let parent = file.as_deref().and_then(Path::parent).map(Path::to_owned);
        let places = [Some(state_dir()?), local_path(&blobs), parent];
        Ok(Disk::new(places.into_iter().flatten().collect(), self.disk.min_free.map(|FreeSpace(bytes)| bytes)))
    }

    /// When garbage is collected; `None` for never.
    pub(super) fn collection(&self) -> Option<Collection> {
        let GcConfig { every, keep, low_keep } = self.gc.as_ref()?;
        let time = |set: &Option<Time>, default| set.map_or(default, |Time(time)| time);
        let keep = time(keep, GC_KEEP);
        Some(Collection { every: time(every, GC_EVERY), keep, low_keep: time(low_keep, GC_LOW_KEEP.min(keep)) })
    }

    /// How many builds may wait.
    pub(super) fn bounds(&self) -> Bounds {
        let count = |set: Option<Count>, default| set.map_or(default, |Count(count)| count as usize);
        Bounds { queued: count(self.queue.max, 1000), queued_per_client: count(self.queue.max_per_client, 250) }
    }

    /// Bounds on the stock of standby machines.
    pub(super) fn standby(&self) -> StockBounds {
        let StandbyConfig { machines, memory, age } = &self.standby;
        StockBounds {
            machines: machines.map_or(0, |Machines(machines)| machines),
            memory_bytes: memory.map_or(self.budget().memory_bytes, |Size(bytes)| bytes),
            age: age.map_or(STANDBY_AGE, |Time(age)| age),
        }
    }

    /// Says so if the budget has no room for as many standby machines of the usual shape.
    pub(super) fn standby_beyond_budget(&self, limits: &Limits, footprint: Footprint) -> Option<String> {
        let StockBounds { machines, memory_bytes, .. } = self.standby();
        let Budget { cpus, builds, .. } = self.budget();
        let fit = (memory_bytes / footprint.bytes(limits)).min((cpus / limits.cpus.max(1)).min(builds).into());
        (fit < machines.into()).then(|| {
            format!("the budget has room for {fit} standby machines of the usual size, and not for [standby] machines = {machines}")
        })
    }

    /// How long finished builds are remembered.
    pub(super) fn retention(&self, tenants: Tenants) -> Retention {
        let default = Retention::default();
        Retention {
            max_age: self.records.max_age.map_or(default.max_age, |Time(time)| time),
            max_bytes: self.records.max_size.map_or(default.max_bytes, |Size(bytes)| bytes),
            tenants,
        }
    }

    /// Whether builds can make user namespaces.
    pub(crate) fn user_namespaces(&self) -> bool {
        self.user_namespaces
    }

    /// Completes the settings of builds.
    pub(super) fn apply(&self, settings: &mut Settings) {
        settings.cpu_model.clone_from(&self.cpu_model);
        settings.hugepages = self.hugepages;
        settings.withhold_network = self.withhold_network;
        settings.nested = self.nested;
        settings.user_namespaces = self.user_namespaces;
        let shares = self.cgroups.shares(&settings.run_dir);
        settings.jail = Rules { walls: self.walls(), cgroups: self.cgroups.require, shares };
        settings.ro_paths =
            self.host_paths.iter().map(|(GuestPath(seen), host)| (seen.clone(), host.clone())).collect();
        settings.connect_timeout = self.connect_timeout.map_or(settings.connect_timeout, |Time(time)| time);
    }

    /// The host's weaknesses that the operator hasn't waived. `core_scheduling` as in [`hardening::weaknesses`].
    pub(crate) fn weaknesses(&self, core_scheduling: bool) -> Vec<Weakness> {
        let mut found = hardening::weaknesses(core_scheduling);
        found.retain(|weakness| !self.host.waive.iter().any(|waived| waived.0 == weakness.name));
        found
    }

    /// What must separate helper processes.
    pub(super) fn walls(&self) -> Walls {
        self.jail.require
    }

    /// How long a client may use a shell in a failed build.
    pub(super) fn max_shell(&self) -> Duration {
        self.build.shell_timeout()
    }

    pub(super) fn drain_timeout(&self) -> Duration {
        self.drain_timeout.map_or(Duration::from_secs(10 * 60), |Time(time)| time)
    }
}
