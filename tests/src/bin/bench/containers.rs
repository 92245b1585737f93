//! Containers that do what a trivial build does: snix's with runc, or plain namespaces.

use std::{
    env,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use cofferdam_proto::snix::build::v1::build_service_client::BuildServiceClient;
use cofferdam_tests::{
    processes::processor_time,
    request::{encoded, shell},
};
use nix::sys::{
    resource::{UsageWho, getrusage},
    time::{TimeVal, TimeValLike as _},
};
use tonic::transport::Channel;

use super::vm::Stopped;

/// The program `snix-build`. It must have been compiled with a static shell as `SNIX_BUILD_SANDBOX_SHELL`, and needs runc,
/// `newuidmap`, FUSE, a terminal, and a line for root in `/etc/subuid` and in `/etc/subgid`.
const SETTING: &str = "COFFERDAM_BENCH_SNIX_BUILD";

const STARTS_WITHIN: Duration = Duration::from_secs(20);

/// Namespaces as a container runtime makes them, without an image to mount.
const NAMESPACES: [&str; 10] =
    ["--user", "--map-root-user", "--mount", "--pid", "--fork", "--mount-proc", "--ipc", "--uts", "--net", "--cgroup"];

/// What makes containers.
pub(super) enum Containers<'d> {
    Snix { daemon: Stopped, client: BuildServiceClient<Channel> },
    Unshare { directory: &'d Path },
}

impl<'d> Containers<'d> {
    /// What [`SETTING`] names, or else `unshare`.
    pub(super) async fn start(directory: &'d Path) -> Result<Self> {
        let Some(program) = env::var_os(SETTING) else { return Ok(Self::Unshare { directory }) };
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        let at = |scheme: &str, name: &str| format!("{scheme}://{}", directory.join(name).display());
        std::fs::create_dir_all(directory.join("bundles"))?;
        let mut command = Command::new(&program);
        command
            .args(["daemon", "--listen-address", &address.to_string()])
            .args(["--blob-service-addr", &at("objectstore+file", "blobs")])
            .args(["--directory-service-addr", &at("redb", "directories.redb")])
            .args(["--build-service-addr", &at("oci", "bundles")])
            .env("RUST_LOG", "error")
            .stdin(Stdio::null());
        let daemon =
            Stopped(command.spawn().with_context(|| format!("can't start {program:?}, which {SETTING} names"))?);
        let endpoint = Channel::from_shared(format!("http://{address}"))?;
        let begun = Instant::now();
        let client = loop {
            match endpoint.connect().await {
                Ok(channel) => break BuildServiceClient::new(channel),
                Err(error) => ensure!(begun.elapsed() < STARTS_WITHIN, "{program:?} doesn't listen: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        Ok(Self::Snix { daemon, client })
    }

    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Snix { .. } => "snix with runc",
            Self::Unshare { .. } => "containers",
        }
    }

    /// Runs a shell that writes this text to a file.
    pub(super) async fn run(&self, text: &str) -> Result<()> {
        match self {
            Self::Snix { client, .. } => {
                let request = encoded(shell(&format!("echo {text} > out"), &["build/out"]));
                client.clone().do_build(request).await?;
            }
            Self::Unshare { directory } => {
                let mut command = tokio::process::Command::new("unshare");
                command.args(NAMESPACES).args(["sh", "-c", &format!("echo {text} > out")]);
                let status = command.current_dir(directory).stdin(Stdio::null()).status().await?;
                ensure!(status.success(), "a container failed: {status}");
            }
        }
        Ok(())
    }

    /// The processor time of all that ran so far.
    pub(super) fn processor_time(&self) -> Result<Duration> {
        match self {
            Self::Snix { daemon, .. } => Ok(processor_time(i32::try_from(daemon.0.id())?)),
            Self::Unshare { .. } => {
                let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
                let micros = |time: TimeVal| u64::try_from(time.num_microseconds()).unwrap_or(0);
                Ok(Duration::from_micros(micros(usage.user_time()) + micros(usage.system_time())))
            }
        }
    }
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}
