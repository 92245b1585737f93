//! The daemon's configuration file.

use std::{
    collections::BTreeMap,
    error::Error,
    fmt, fs,
    io::Read as _,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use cofferdam_protocol::tree;
use nix::sys::socket::UnixAddr;
use serde::{Deserialize, Deserializer, de};
use tonic::transport::Uri;

use crate::{
    build::{
        MAX_SCRATCH_BYTES, Options, SHELL_TIMEOUT, Settings,
        failure::{Failure, blames_path},
    },
    machine::vmm,
    quantity,
    records::Retention,
    request::{AbsolutePath, Host},
    scheduler::queue::{Bounds, Budget},
    state::StoreAddrs,
};

/// Bytes of the largest file that is read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Share of the host's memory that builds may use by default, in percent.
const DEFAULT_MEMORY_PERCENT: u64 = 75;

/// How a daemon is set up. What is left out has a default.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where it was read.
    #[serde(skip)]
    file: Option<PathBuf>,
    /// Where to listen, as with `--listen`.
    pub(crate) listen: Vec<ListenAddr>,
    /// Listen on TCP addresses other than loopback without client certificates.
    pub(super) allow_anonymous_tcp: bool,
    /// The permissions of Unix sockets.
    pub(super) socket_mode: SocketMode,
    /// Run builds without hardware virtualisation.
    pub(crate) allow_emulation: bool,
    /// Whether an earlier success answers an equal request.
    pub(super) reuse: Option<bool>,
    pub(super) image: Option<PathBuf>,
    pub(super) vmm: Option<VmmName>,
    pub(super) cpu_model: Option<String>,
    pub(super) hugepages: bool,
    /// Run builds that ask for the network without it, instead of refusing them.
    pub(super) withhold_network: bool,
    /// Let builds that ask for `/dev/kvm` run VMs of their own.
    pub(super) nested: bool,
    /// What builds may be shown, read-only: where they see it, and what it is on the host.
    pub(super) host_paths: BTreeMap<GuestPath, PathBuf>,
    pub(super) connect_timeout: Option<Time>,
    /// How long running builds may go on after SIGTERM.
    pub(super) drain_timeout: Option<Time>,
    pub(crate) tls: Option<TlsConfig>,
    #[serde(deserialize_with = "store_addrs")]
    pub(crate) store: StoreAddrs,
    pub(super) budget: BudgetConfig,
    pub(super) queue: QueueConfig,
    pub(super) build: BuildConfig,
    pub(super) records: RecordsConfig,
    pub(super) metrics: Option<MetricsConfig>,
    pub(super) traces: Option<TracesConfig>,
}

/// The daemon's certificate and key, and the CAs of its clients.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
    pub(crate) client_ca: Option<PathBuf>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct StoreConfig {
    blob_service_addr: Option<String>,
    directory_service_addr: Option<String>,
}

fn store_addrs<'de, D: Deserializer<'de>>(deserializer: D) -> Result<StoreAddrs, D::Error> {
    let StoreConfig { blob_service_addr, directory_service_addr } = StoreConfig::deserialize(deserializer)?;
    Ok(StoreAddrs { blobs: blob_service_addr, directories: directory_service_addr })
}

/// What all builds may use together.
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

/// Where Prometheus asks.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MetricsConfig {
    pub(super) listen: SocketAddr,
}

/// Where OpenTelemetry's spans go, by OTLP over gRPC.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TracesConfig {
    pub(super) endpoint: Endpoint,
}

/// What is kept of finished builds.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RecordsConfig {
    max_age: Option<Time>,
    max_size: Option<Size>,
}

/// What one build may use.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct BuildConfig {
    memory: Option<Size>,
    cpus: Option<Count>,
    scratch_size: Option<Size>,
    timeout: Option<Time>,
    silence: Option<Time>,
    processes: Option<Count>,
    log_limit: Option<Size>,
    output_limit: Option<Size>,
    output_files: Option<Count>,
    keep_failed: bool,
    shell_timeout: Option<Time>,
}

/// A path in builds.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct GuestPath(AbsolutePath);

impl TryFrom<String> for GuestPath {
    type Error = String;

    fn try_from(path: String) -> Result<Self, String> {
        let wrong = |rule| format!("the path {path:?} {rule}");
        if ["/dev", "/proc"].iter().any(|taken| Path::new(&path).starts_with(taken)) {
            return Err(wrong("lies in /dev or /proc, which are the guest's own; /dev/kvm comes with `nested = true`"));
        }
        AbsolutePath::new(&path).map(Self).map_err(wrong)
    }
}

/// HOST:PORT, or the path of a Unix socket.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "String")]
pub struct ListenAddr(pub(super) String);

impl TryFrom<String> for ListenAddr {
    type Error = String;

    fn try_from(addr: String) -> Result<Self, String> {
        let is_host_port =
            |(host, port): (&str, &str)| !host.is_empty() && !host.contains([':', '/']) && port.parse::<u16>().is_ok();
        let is_tcp = || addr.parse::<SocketAddr>().is_ok() || addr.rsplit_once(':').is_some_and(is_host_port);
        if if addr.starts_with('/') { UnixAddr::new(Path::new(&addr)).is_ok() } else { is_tcp() } {
            return Ok(Self(addr));
        }
        Err(format!(
            "{addr:?} is neither HOST:PORT nor the path of a Unix socket, which begins with a slash and has at most 107 \
             bytes"
        ))
    }
}

impl FromStr for ListenAddr {
    type Err = String;

    fn from_str(addr: &str) -> Result<Self, String> {
        addr.to_owned().try_into()
    }
}

/// Of a collector.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Endpoint(pub(super) String);

impl TryFrom<String> for Endpoint {
    type Error = String;

    fn try_from(endpoint: String) -> Result<Self, String> {
        match endpoint.parse::<Uri>() {
            Ok(uri) if uri.scheme_str() == Some("http") => Ok(Self(endpoint)),
            _ => Err(format!("{endpoint:?} is no address to send spans to, in clear: write http://HOST:PORT")),
        }
    }
}

/// A file's permissions.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "u32")]
pub(super) struct SocketMode(pub(super) u32);

impl Default for SocketMode {
    fn default() -> Self {
        Self(0o600)
    }
}

impl TryFrom<u32> for SocketMode {
    type Error = String;

    fn try_from(mode: u32) -> Result<Self, String> {
        let wrong = || format!("0o{mode:o} is no mode of a socket: write 0o600, 0o660 or 0o666");
        if mode & !0o666 == 0 && mode & 0o600 == 0o600 { Ok(Self(mode)) } else { Err(wrong()) }
    }
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum VmmName {
    CloudHypervisor,
    Qemu,
}

/// Bytes: a number, or text such as "2G".
#[derive(Debug, Clone, Copy)]
pub(super) struct Size(u64);

/// A time with its unit, such as "10m".
#[derive(Debug, Clone, Copy)]
pub(super) struct Time(pub(super) Duration);

/// A number that is not 0.
#[derive(Debug, Clone, Copy)]
pub(super) struct Count(u32);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text_or_number(deserializer, "a size, such as \"2G\"", quantity::size).map(Self)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text_or_number(deserializer, "a time with its unit, such as \"10m\"", quantity::duration).map(Self)
    }
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let count = |text: &str| match text.parse() {
            Ok(0) => Err("must not be 0".to_owned()),
            Ok(count) => Ok(count),
            Err(error) => Err(format!("{error}")),
        };
        text_or_number(deserializer, "a number greater than 0", count).map(Self)
    }
}

/// What `parse` makes of a text, or of a number as text.
fn text_or_number<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    expected: &'static str,
    parse: fn(&str) -> Result<T, String>,
) -> Result<T, D::Error> {
    struct Visitor<T>(&'static str, fn(&str) -> Result<T, String>);
    impl<T> de::Visitor<'_> for Visitor<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
            (self.1)(text).map_err(|rule| E::custom(format!("{text:?} is not {}: {rule}", self.0)))
        }

        fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
            self.visit_str(&number.to_string())
        }
    }
    deserializer.deserialize_any(Visitor(expected, parse))
}

/// A number that can't be, here.
#[derive(Debug, thiserror::Error)]
#[error("{key} must be from {least} to {most}, and is {value}")]
pub(super) struct OutOfRange {
    key: &'static str,
    value: u64,
    least: u64,
    most: u64,
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// It can't be read, or it breaks a rule.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let mut text = String::new();
        let read = fs::File::open(path).and_then(|file| file.take(MAX_CONFIG_BYTES + 1).read_to_string(&mut text));
        let message = || format!("can't read the configuration {path:?}");
        read.map_err(|error| match blames_path(&error) {
            true => super::wrong(message(), &error),
            false => super::failed(message(), &error),
        })?;
        if text.len() as u64 > MAX_CONFIG_BYTES {
            let rule = format!("the configuration {path:?} is larger than {MAX_CONFIG_BYTES} bytes");
            return Err(Failure::wrong("configuration", rule));
        }
        let mut config = Self::parse(&text).map_err(|error| wrong(Some(path), &error))?;
        config.file = Some(path.to_owned());
        Ok(config)
    }

    fn parse(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }

    /// What one build may use.
    pub(super) fn options(&self) -> Result<Options, Failure> {
        self.checked_options().map_err(|error| wrong(self.file.as_deref(), &error))
    }

    fn checked_options(&self) -> Result<Options, OutOfRange> {
        let (default, build) = (Options::default(), &self.build);
        let bytes = |set: Option<Size>, default| set.map_or(default, |Size(bytes)| bytes);
        let budget = self.budget();
        let options = Options {
            memory_bytes: bytes(build.memory, default.memory_bytes.min(budget.memory_bytes)),
            cpus: build.cpus.map_or(default.cpus.min(budget.cpus), |Count(cpus)| cpus),
            scratch_bytes: bytes(build.scratch_size, default.scratch_bytes),
            timeout: build.timeout.map_or(default.timeout, |Time(time)| time),
            silence: build.silence.map(|Time(time)| time).or(default.silence),
            processes: build.processes.map_or(default.processes, |Count(processes)| processes),
            log_bytes: bytes(build.log_limit, default.log_bytes),
            outputs: tree::Limits {
                bytes: bytes(build.output_limit, default.outputs.bytes),
                entries: build.output_files.map_or(default.outputs.entries, |Count(files)| files.into()),
            },
            keep_failed: build.keep_failed,
            shell: None,
        };
        let within = |key, value, least, most| {
            if (least..=most).contains(&value) { Ok(()) } else { Err(OutOfRange { key, value, least, most }) }
        };
        within("build.memory", options.memory_bytes, vmm::MIN_MEMORY_BYTES, budget.memory_bytes)?;
        within("build.cpus", options.cpus.into(), 1, budget.cpus.min(vmm::MAX_CPUS).into())?;
        let scratch = (cofferdam_images::SCRATCH_TEMPLATE_BYTES, MAX_SCRATCH_BYTES);
        within("build.scratch_size", options.scratch_bytes, scratch.0, scratch.1)?;
        Ok(options)
    }

    /// What all builds may use.
    pub(super) fn budget(&self) -> Budget {
        let cpus = std::thread::available_parallelism().map_or(1, |cpus| u32::try_from(cpus.get()).unwrap_or(u32::MAX));
        let memory = Host::this().memory_bytes / 100 * DEFAULT_MEMORY_PERCENT;
        Budget {
            memory_bytes: self.budget.memory.map_or(memory, |Size(bytes)| bytes),
            cpus: self.budget.cpus.map_or(cpus, |Count(cpus)| cpus),
            builds: self.budget.builds.map_or(u32::MAX, |Count(builds)| builds),
        }
    }

    /// How many builds may wait.
    pub(super) fn bounds(&self) -> Bounds {
        let count = |set: Option<Count>, default| set.map_or(default, |Count(count)| count as usize);
        Bounds { queued: count(self.queue.max, 1000), queued_per_client: count(self.queue.max_per_client, 250) }
    }

    /// What is kept of finished builds.
    pub(super) fn retention(&self) -> Retention {
        let default = Retention::default();
        Retention {
            max_age: self.records.max_age.map_or(default.max_age, |Time(time)| time),
            max_bytes: self.records.max_size.map_or(default.max_bytes, |Size(bytes)| bytes),
        }
    }

    /// The settings of every build, once the rest is known.
    pub(super) fn apply(&self, settings: &mut Settings) {
        settings.cpu_model.clone_from(&self.cpu_model);
        settings.hugepages = self.hugepages;
        settings.withhold_network = self.withhold_network;
        settings.nested = self.nested;
        settings.ro_paths =
            self.host_paths.iter().map(|(GuestPath(seen), host)| (seen.clone(), host.clone())).collect();
        settings.connect_timeout = self.connect_timeout.map_or(settings.connect_timeout, |Time(time)| time);
    }

    /// How long somebody may look around in a failed build.
    pub(super) fn max_shell(&self) -> Duration {
        self.build.shell_timeout.map_or(SHELL_TIMEOUT, |Time(time)| time)
    }

    pub(super) fn drain_timeout(&self) -> Duration {
        self.drain_timeout.map_or(Duration::from_secs(10 * 60), |Time(time)| time)
    }
}

/// What the configuration says, which has come from this file or from none, can't be.
fn wrong(file: Option<&Path>, error: &(dyn Error + 'static)) -> Failure {
    let file = file.map_or_else(String::new, |path| format!(" {path:?}"));
    super::wrong(format!("the configuration{file} is wrong"), error).advised("docs/daemon.md tells what can be set")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_configuration_is_read() {
        let text = r#"
            listen = ["/run/x", "[::1]:8000", "localhost:8000"]
            socket_mode = 0o660
            allow_emulation = true
            drain_timeout = "1m"
            vmm = "cloud-hypervisor"
            [tls]
            certificate = "c"
            key = "k"
            client_ca = "a"
            [budget]
            memory = "8G"
            cpus = 16
            builds = 4
            [queue]
            max = 10
            [build]
            memory = 1073741824
            cpus = 4
            timeout = "2h"
        "#;
        let config = Config::parse(text).unwrap();
        let options = config.options().unwrap();
        assert_eq!((options.memory_bytes, options.cpus), (1 << 30, 4));
        assert_eq!(options.timeout, Duration::from_secs(7200));
        assert_eq!(config.budget(), Budget { memory_bytes: 8 << 30, cpus: 16, builds: 4 });
        assert_eq!((config.bounds().queued, config.socket_mode.0), (10, 0o660));
        Config::parse("").unwrap().options().unwrap();
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line_and_its_value() {
        for (text, words) in [
            ("colour = 'red'", ["line 1", "colour"]),
            ("\n[build]\nmemory = 'lots'", ["line 3", "\"lots\" is not a size"]),
            ("[build]\ntimeout = 90", ["timeout = 90", "write it with its unit"]),
            ("[budget]\ncpus = 0", ["cpus = 0", "must not be 0"]),
            ("[budget]\ncpus = -1", ["cpus = -1", "invalid digit"]),
            ("socket_mode = 0o777", ["socket_mode", "0o600"]),
            ("listen = ['run/x']", ["line 1", "\"run/x\" is neither HOST:PORT"]),
            ("listen = ['host']", ["listen", "\"host\" is neither"]),
            ("listen = ['::1:99999']", ["listen", "\"::1:99999\" is neither"]),
            ("listen = [':80']", ["listen", "\":80\" is neither"]),
            ("[traces]\nendpoint = 'localhost:4317'", ["line 2", "http://HOST:PORT"]),
            ("[traces]\nendpoint = 'https://localhost:4317'", ["line 2", "in clear"]),
            ("vmm = 'firecracker'", ["firecracker", "qemu"]),
            ("[metrics]\nlisten = 'here'", ["here", "socket address"]),
            ("[tls]\nkey = 'k'", ["tls", "certificate"]),
        ] {
            let error = Config::parse(text).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{text}: {error}");
        }
        let options = |text| Config::parse(text).unwrap().options().unwrap_err().chain();
        assert!(options("[build]\nmemory = '1K'").contains("build.memory must be from"));
        assert!(options("[budget]\ncpus = 2\n[build]\ncpus = 3").contains("build.cpus must be from 1 to 2, and is 3"));
    }
}
