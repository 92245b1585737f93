//! `nix-external-builder`: one build of a Nix on this host.
//!
//! ```text
//!   Nix ──build.json──▶ this process ──▶ a worker in a process group of its own ──▶ cofferdam's build ──▶ realStoreDir
//!       ◀──── log ─────              ◀──
//! ```
//!
//! Nix kills its helper's process group with SIGKILL. The worker isn't in that group: it gets SIGTERM when this process dies, and
//! ends the build in order.

mod description;
mod known_paths;

use std::{
    collections::BTreeMap,
    env,
    ffi::OsStr,
    io::{self, Write as _},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::PathBuf,
    process::{self, Command, Stdio},
    sync::Arc,
};

use clap::Args;
use cofferdam_castore::{Node, PathComponent, export::Existing};
use nix::{
    sys::{prctl, signal::Signal},
    unistd::getppid,
};
use tokio_util::sync::CancellationToken;

use super::{
    CliError, ClientArgs, Exit,
    execute::{ExecuteArgs, Ready},
    export, import,
    interrupt::until_interrupted,
    network::NetworkArgs,
};
use crate::{
    limits::Asked,
    request::{BuildRequest, RequestErrorKind},
};
use description::Description;
use known_paths::KnownPaths;

/// Tells Nix that the log begins. What comes before it is taken for an error while the build is prepared.
const READY: &[u8] = b"\x02\n";

/// Stands for a program that a signal has killed in its exit code, as in a shell's.
const KILLED: i32 = 128;

const EXAMPLES: &str = "\
Examples:
  In nix.conf, for builds without a daemon:
    extra-experimental-features = external-builders
    external-builders = [{\"systems\":[\"x86_64-linux\"],\"program\":\"/usr/bin/cofferdam\",\"args\":[\"nix-external-builder\"]}]
  The same with a daemon:
    … \"args\":[\"nix-external-builder\",\"--daemon\",\"grpc+unix:///run/cofferdam/daemon.sock\"]}]";

/// Runs one local build of Nix in a microVM: a program for external-builders in nix.conf
///
/// Nix 2.34 and later start it with the path of a build.json. The log goes to stderr, and the outputs are left in Nix's store. The
/// exit code is that of the derivation's builder, or 128 and the signal that killed it; 2 and 3 with an error on stderr as
/// elsewhere. Builds whose outputs are fixed get the network of --allow-host and --allow-address, or the daemon's.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct ExternalBuilderArgs {
    /// The description of the build that Nix writes
    #[arg(value_name = "BUILD.JSON")]
    file: PathBuf,
    #[command(flatten)]
    asked: Asked,
    #[command(flatten)]
    network: NetworkArgs,
    /// Build, as a child of the process with this id
    #[arg(long, hide = true, value_name = "PID")]
    worker_of: Option<i32>,
}

impl ExternalBuilderArgs {
    pub(super) fn execute(self, client: &ClientArgs) -> Result<(), CliError> {
        match self.worker_of {
            Some(parent) => until_interrupted(|cancel| async move {
                die_with(parent, &cancel)?;
                self.build(client, &cancel).await.map_err(CliError::of_interactive)
            }),
            None => supervise(),
        }
    }

    async fn build(&self, client: &ClientArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        let description = Description::read(&self.file)?;
        let execute = ExecuteArgs::new(self.asked.clone(), self.network.clone());
        let has_network = client.daemon().is_some() || self.network.is_given();
        let request = BuildRequest::try_from(description.request(has_network)?)?;
        let mut known = KnownPaths::open(client)?;
        let mut ready = self.with_inputs(&execute, client, request.clone(), &description, &mut known, cancel).await?;
        let mut built = ready.build(cancel).await;
        let is_missing = |error: &CliError| error.failure().reason == RequestErrorKind::Missing.code();
        if known.has_found() && built.as_ref().is_err_and(is_missing) {
            // The store has collected what it had.
            known.forget();
            ready = self.with_inputs(&execute, client, request, &description, &mut known, cancel).await?;
            built = ready.build(cancel).await;
        }
        let Some(built) = built? else { return Ok(()) };
        for (path, output) in description.outputs.iter().zip(&built.result.outputs) {
            let dest = description.real_path(path);
            export::write(&ready.store, &output.node, dest, Existing::Refused, cancel)
                .await
                .map_err(|error| error.about(format!("the build succeeded, but its output {path} can't be written")))?;
        }
        Ok(())
    }

    /// Imports the inputs that aren't known.
    async fn with_inputs<'a>(
        &self,
        execute: &'a ExecuteArgs,
        client: &'a ClientArgs,
        request: BuildRequest,
        description: &Description,
        known: &mut KnownPaths,
        cancel: &CancellationToken,
    ) -> Result<Ready<'a>, CliError> {
        let ready = execute.prepare(client, request)?;
        let progress = Arc::clone(&ready.progress);
        let mut inputs: BTreeMap<PathComponent, Node> = BTreeMap::new();
        for path in &description.inputs {
            let name = PathComponent::try_from(path.base_name().as_bytes())
                .map_err(|error| CliError::wrong_because(format!("{path} can't be the name of an input"), error))?;
            let real = description.real_path(path);
            let key = known.key(&real)?;
            let node = match known.find(&key) {
                Some(node) => node,
                None => {
                    let node = import::import(&ready.store, real, "importing inputs", &progress, cancel).await?;
                    known.add(key, node.clone());
                    node
                }
            };
            inputs.insert(name, node);
        }
        known.save();
        ready.with_inputs(inputs)
    }
}

/// Cancels when the parent dies, or has died already.
fn die_with(parent: i32, cancel: &CancellationToken) -> Result<(), CliError> {
    prctl::set_pdeathsig(Signal::SIGTERM)
        .map_err(|errno| CliError::failed("can't be told of the parent's death", io::Error::from(errno)))?;
    if getppid().as_raw() != parent {
        cancel.cancel();
    }
    Ok(())
}

/// Starts a worker with these arguments, passes its log on, and exits as it does.
fn supervise() -> Result<(), CliError> {
    let failed = |error| CliError::failed("can't start the build", error);
    let mut stderr = io::stderr().lock();
    stderr.write_all(READY).map_err(|error| CliError::failed("can't write to stderr", error))?;
    let arguments = env::args_os().skip(1);
    let mut worker = Command::new("/proc/self/exe")
        .args(arguments)
        .args([OsStr::new("--worker-of"), OsStr::new(&process::id().to_string())])
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    if let Some(mut log) = worker.stderr.take() {
        // Without a reader the build goes on.
        let _ = io::copy(&mut log, &mut stderr);
    }
    let status = worker.wait().map_err(failed)?;
    let killed = || status.signal().map(|signal| KILLED + signal);
    process::exit(status.code().or_else(killed).unwrap_or_else(|| Exit::Executor.code().into()));
}
