//! The common part of `run` and `build`: from a request to its outputs on stdout.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use clap::{Args, ValueEnum};
use cofferdam_castore::{
    Node, PathComponent, Store,
    export::{Existing, ExportError},
};
use cofferdam_images::{Image, used_dir};
use cofferdam_proto::cofferdam::v1 as wire;
use serde_json::json;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::{
    CliError, ClientArgs, Exit,
    export::existing,
    network::NetworkArgs,
    node_text, print,
    progress::Progress,
    quantity::{self, millis, show_duration, show_size},
    remote::{AGAIN, Daemon, Submitted},
    secrets, state_dir, terminal,
};
use crate::{
    build::{BuildError, Builder, Built, Options, Settings, Times, compare::compare, secrets::Secrets},
    limits::{Asked, Limits},
    machine::vmm,
    request::{Admitted, BuildRequest, BuildResult, Host, RelativePath, admit},
};

/// How a build runs, and where its outputs go.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Machine")]
pub(super) struct ExecuteArgs {
    #[command(flatten)]
    pub(super) asked: Asked,
    /// Maximum time until the guest has booted and connected [default: 1m]
    #[arg(long, value_name = "DUR", value_parser = quantity::duration)]
    connect_timeout: Option<Duration>,
    /// CPU model that the build sees, by QEMU's name for it, such as Nehalem-v1 or EPYC-v1: the same on every host. A host
    /// that can't provide it is an error. Implies --vmm qemu
    #[arg(long, value_name = "MODEL", env = "COFFERDAM_CPU_MODEL", hide_env_values = true)]
    cpu_model: Option<String>,
    /// Use the host's huge pages for the guest's memory (sysctl vm.nr_hugepages)
    #[arg(long, env = "COFFERDAM_HUGEPAGES", hide_env_values = true)]
    hugepages: bool,
    /// Let the build make user namespaces, as bubblewrap, Bazel's sandbox and rootless containers need. Inside the machine they
    /// reach more of its kernel
    #[arg(long)]
    user_namespaces: bool,
    /// The VMM [default: the best that this host can run, see `cofferdam doctor`]
    #[arg(long, value_enum)]
    vmm: Option<VmmArg>,
    /// The guest image [default: $COFFERDAM_IMAGE, ~/.cache/cofferdam/image or the package's]
    #[arg(long, value_name = "DIR")]
    image: Option<PathBuf>,
    /// With a daemon: build even if the daemon has built the same before
    #[arg(long)]
    rebuild: bool,
    /// Build twice, or once more what the daemon has built before, and fail if the outputs differ
    #[arg(long, conflicts_with_all = ["interactive", "detach"])]
    check: bool,
    /// Run the command on this terminal, as a shell that one types into. -it is the same
    ///
    /// stdin and stderr must be a terminal. The exit code is the command's. Ctrl-C goes to the command. There is no log, and
    /// --silence doesn't count
    #[arg(
        long,
        short = 'i',
        visible_short_alias = 't',
        overrides_with = "interactive",
        conflicts_with_all = ["shell_on_failure", "detach"]
    )]
    interactive: bool,
    #[command(flatten)]
    pub(super) network: NetworkArgs,
    /// Show the command this file as /run/secrets/NAME. It is in no store, digest, record or log, unless the command writes it
    /// there. At most 1 MiB each, and 16 of them
    #[arg(long = "secret", value_name = "NAME=FILE", value_parser = clap::value_parser!(OsString), help_heading = "Secrets")]
    secrets: Vec<OsString>,

    /// Write the outputs below DIR, each at its own path (--output build/out: DIR/build/out)
    #[arg(long, value_name = "DIR", help_heading = "Results")]
    pub(super) out: Option<PathBuf>,
    /// Begin each line of what the command writes with the time when it comes to this host, as in 2026-01-31T12:00:00.000Z
    #[arg(long, help_heading = "Results")]
    timestamps: bool,
    /// With a daemon: print the build's id and let the build go on without this command. See `cofferdam builds`
    #[arg(long, conflicts_with_all = ["out", "shell_on_failure", "timestamps"], help_heading = "Results")]
    detach: bool,
    /// Replace what is already at the outputs' paths below --out, whatever it is
    #[arg(long, requires = "out", help_heading = "Results")]
    force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum VmmArg {
    CloudHypervisor,
    Qemu,
}

/// A build that is ready to start: everything that can be checked before any work is done has been checked.
pub(super) struct Ready<'a> {
    args: &'a ExecuteArgs,
    client: &'a ClientArgs,
    place: Place,
    secrets: Secrets,
    pub(super) store: Store,
    pub(super) progress: Arc<Progress>,
}

/// Where the build runs.
enum Place {
    Here(Box<(Settings, Options)>, Admitted),
    Daemon(Box<Daemon>, BuildRequest),
}

impl Place {
    fn request(&self) -> &BuildRequest {
        match self {
            Self::Here(_, request) => request,
            Self::Daemon(_, request) => request,
        }
    }
}

impl ExecuteArgs {
    /// What is asked for, and the defaults for everything else.
    pub(super) fn new(asked: Asked, network: NetworkArgs) -> Self {
        Self { asked, network, ..Self::default() }
    }

    /// Checks everything that needs no work: that the host can build the request, the image, the VMM, the store, and that
    /// no output exists yet.
    pub(super) fn prepare<'a>(&'a self, client: &'a ClientArgs, request: BuildRequest) -> Result<Ready<'a>, CliError> {
        if self.interactive && !terminal::is_there() {
            return Err(CliError::wrong("--interactive needs a terminal for stdin and stderr")
                .try_this("leave out --interactive; a file for the command is an --input"));
        }
        if self.asked.shell_on_failure && !terminal::is_there() {
            return Err(CliError::wrong("--shell-on-failure needs a terminal for stdin and stderr")
                .try_this("--keep-failed, which needs none"));
        }
        if let (Some(out), false) = (&self.out, self.force) {
            for (_, dest) in exports(out, &request.outputs) {
                refuse_existing(&dest)?;
            }
        }
        let secrets = secrets::read(&self.secrets)?;
        let store = client.store_addrs();
        if let Some(addr) = client.daemon() {
            let daemon = self.daemon(addr)?;
            let place = Place::Daemon(Box::new(daemon), request);
            return Ok(Ready {
                args: self,
                client,
                place,
                secrets,
                store: store.open()?,
                progress: self.progress(client),
            });
        }
        let request = self.admit(request)?;
        let image = Image::open(&self.image.clone().unwrap_or_else(used_dir))
            .map_err(|error| CliError::failed("there is no guest image to boot", error))?;
        let asked = match (self.vmm, &self.cpu_model) {
            (Some(VmmArg::CloudHypervisor), Some(_)) => {
                return Err(CliError::wrong("cloud-hypervisor has no CPU models: builds see the host's CPU")
                    .try_this("--vmm qemu, or leave out --cpu-model and COFFERDAM_CPU_MODEL"));
            }
            (Some(VmmArg::CloudHypervisor), None) => Some(vmm::Kind::CloudHypervisor),
            (Some(VmmArg::Qemu), _) | (None, Some(_)) => Some(vmm::Kind::Qemu),
            (None, None) => None,
        };
        let choice = vmm::choose(asked)
            .map_err(|error| CliError::failed("no virtual machine can run here", error).try_this("cofferdam doctor"))?;
        tracing::info!(kind = %choice.kind, accelerator = %choice.accelerator, reason = choice.reason, "VMM chosen");
        let emulated = choice.accelerator == vmm::Accelerator::Tcg;
        let network = self.network.grant()?;
        let (secrets_of_build, interactive) = (secrets.clone(), self.interactive);
        let options = Options {
            network,
            secrets: secrets_of_build,
            interactive,
            ..Options::new(&Limits::default(), &self.asked)
        };
        let (settings, store) = (self.settings(image, choice)?, store.open()?);
        let progress = self.progress(client);
        if emulated {
            progress.note("running under emulation (QEMU TCG), which is no security boundary");
        }
        let place = Place::Here(Box::new((settings, options)), request);
        Ok(Ready { args: self, client, place, secrets, store, progress })
    }

    /// Refuses what this host doesn't have.
    fn admit(&self, request: BuildRequest) -> Result<Admitted, CliError> {
        let for_daemons = [
            (self.rebuild, "--rebuild is for daemons: without one, every build runs"),
            (self.detach, "--detach is for daemons: without one, a build ends with this command"),
        ];
        if let Some((_, message)) = for_daemons.into_iter().find(|(is_given, _)| *is_given) {
            let flag = message.split(' ').next().unwrap_or_default();
            return Err(CliError::wrong(message)
                .try_this(format!("leave out {flag}, or name a daemon with --daemon or COFFERDAM_DAEMON")));
        }
        let host = Host { network: self.network.is_given(), ..Host::this() };
        if let Some(memory) = self.asked.memory.map(u64::from).filter(|&memory| memory > host.memory_bytes) {
            let (asked, there) = (show_size(memory), show_size(host.memory_bytes));
            return Err(CliError::wrong(format!("--memory {asked} is more than this host has: {there}")));
        }
        let there =
            thread::available_parallelism().map_or(vmm::MAX_CPUS, |cpus| u32::try_from(cpus.get()).unwrap_or(u32::MAX));
        if let Some(cpus) = self.asked.cpus.map(u32::from).filter(|&cpus| cpus > there) {
            return Err(CliError::wrong(format!("--cpus {cpus} is more than this host has: {there}")));
        }
        Ok(admit(request, &host)?)
    }

    /// The daemon, which checks a request itself.
    fn daemon(&self, addr: &str) -> Result<Daemon, CliError> {
        let of_this_host = [
            ("--cpu-model", self.cpu_model.is_some()),
            ("--hugepages", self.hugepages),
            ("--user-namespaces", self.user_namespaces),
            ("--vmm", self.vmm.is_some()),
            ("--image", self.image.is_some()),
            ("--connect-timeout", self.connect_timeout.is_some()),
        ];
        let given = of_this_host.into_iter().find(|(_, is_given)| *is_given).map(|(flag, _)| flag);
        match given.or(self.network.flag()) {
            Some(flag) => Err(CliError::wrong(format!(
                "{flag} is for builds on this host; the daemon's configuration decides there"
            ))
            .try_this(format!("leave out {flag} and the variable of its name, or --daemon and COFFERDAM_DAEMON"))),
            None => Daemon::at(addr),
        }
    }

    fn progress(&self, client: &ClientArgs) -> Arc<Progress> {
        let progress = client.progress();
        let progress = if self.timestamps { progress.stamp_log() } else { progress };
        let lends = self.asked.shell_on_failure || self.interactive;
        Arc::new(if lends { progress.lend_terminal(Handle::current()) } else { progress })
    }

    /// The message to a daemon.
    fn message(&self, request: &BuildRequest, secrets: &Secrets) -> wire::BuildRequest {
        wire::BuildRequest {
            request: Some(request.into()),
            limits: Some((&self.asked).into()),
            keep_failed: self.asked.keep_failed,
            rebuild: self.rebuild,
            detached: self.detach,
            interactive: self.interactive,
            shell_ms: self.asked.shell().map_or(0, millis),
            network: self.network.message(),
            secrets: secrets::message(secrets),
            ..wire::BuildRequest::default()
        }
    }

    fn settings(&self, image: Image, choice: vmm::Choice) -> Result<Settings, CliError> {
        let mut settings = Settings::new(image, choice, state_dir()?.join("run"));
        settings.cpu_model.clone_from(&self.cpu_model);
        settings.hugepages = self.hugepages;
        settings.user_namespaces = self.user_namespaces;
        settings.network = self.network.is_given();
        settings.connect_timeout = self.connect_timeout.unwrap_or(settings.connect_timeout);
        Ok(settings)
    }
}

impl Ready<'_> {
    /// Gives the request its inputs.
    pub(super) fn with_inputs(self, inputs: BTreeMap<PathComponent, Node>) -> Result<Self, CliError> {
        let place = match self.place {
            Place::Here(here, request) => Place::Here(here, request.with_inputs(inputs)?),
            Place::Daemon(daemon, request) => Place::Daemon(daemon, request.with_inputs(inputs)?),
        };
        Ok(Self { place, ..self })
    }

    /// Builds, prints the result, then exports: a failed export doesn't lose the result.
    pub(super) async fn execute(self, cancel: &CancellationToken) -> Result<(), CliError> {
        let Some(built) = self.build(cancel).await? else { return Ok(()) };
        let Self { args, client, place, store, progress, .. } = self;
        let request = place.request();
        match client.json {
            true => print(&format!("{}\n", built.result.to_json())),
            false => print(&lines(request, &built.result)),
        }?;
        let Some(out) = &args.out else { return Ok(()) };
        progress.step("exporting outputs");
        let written = write_outputs((&store, out), existing(args.force), request, &built.result, cancel).await;
        progress.clear();
        written.map_err(|error| CliError::AfterResult(Box::new(error)))
    }

    /// Builds, and shows how that goes. A detached build has no result.
    pub(super) async fn build(&self, cancel: &CancellationToken) -> Result<Option<Built>, CliError> {
        let Self { args, client, place, secrets, store, progress } = self;
        let built = match place {
            Place::Here(here, request) => {
                let (settings, options) = &**here;
                let build = || build_here(store, settings.clone(), request, options, progress, cancel);
                if args.check { build_twice(store, request, progress, build).await } else { build().await }
            }
            Place::Daemon(daemon, request) => {
                let text = |id: &str| if args.detach { format!("{id}\n") } else { String::new() };
                let accepted = |id: &str| client.print(&text(id), &json!({ "build": id }));
                let mut message = args.message(request, secrets);
                let earlier = match args.check {
                    true => daemon.build_before(&message, request, progress, cancel).await.map(Some),
                    false => Ok(None),
                };
                let submitted = match earlier {
                    Ok(earlier) => {
                        message.compare_with = earlier.unwrap_or_default();
                        daemon.build(message, request, progress, accepted, cancel).await
                    }
                    Err(error) => Err(error),
                };
                match submitted {
                    Ok(Submitted::Detached) => return Ok(None),
                    Ok(Submitted::Built(built)) => Ok(*built),
                    Err(error) => Err(error),
                }
            }
        };
        if args.interactive {
            // The person knows.
            progress.clear();
        }
        let built = built.map_err(|error| if args.interactive { error.of_interactive() } else { error });
        let built = built.inspect_err(|error| match error.exit() {
            Exit::BuildFailed if args.interactive => {}
            Exit::BuildFailed => progress.finish(&summary("failed after", &progress.times())),
            Exit::RequestWrong | Exit::Executor => progress.clear(),
        })?;
        tracing::info!(usage = ?built.usage, "built");
        if !args.interactive {
            progress.finish(&summary("built in", &built.times));
        }
        Ok(Some(built))
    }
}

async fn build_here(
    store: &Store,
    settings: Settings,
    request: &Admitted,
    options: &Options,
    progress: &Arc<Progress>,
    cancel: &CancellationToken,
) -> Result<Built, CliError> {
    let builder = Builder::new(store.clone(), settings).map_err(BuildError::Executor)?;
    let observer = Arc::clone(progress);
    let built = builder.build((request, options), store, observer, cancel, None).await;
    progress.terminal_returned().await;
    let (built, teardown) = built?;
    teardown.finish().await;
    Ok(built)
}

/// Builds twice, and compares.
async fn build_twice<F: Future<Output = Result<Built, CliError>>>(
    store: &Store,
    request: &BuildRequest,
    progress: &Progress,
    build: impl Fn() -> F,
) -> Result<Built, CliError> {
    let nodes = |built: &Built| built.result.outputs.iter().map(|output| output.node.clone()).collect::<Vec<_>>();
    let earlier = nodes(&build().await?);
    progress.note(AGAIN);
    let built = build().await?;
    compare(store, &request.outputs, &earlier, &nodes(&built)).await?;
    Ok(built)
}

fn summary(how: &str, times: &Times) -> String {
    let total = times.resolve + times.boot + times.run + times.ingest;
    let [total, boot, run, ingest] = [total, times.boot, times.run, times.ingest].map(show_duration);
    format!("{how} {total} (boot {boot}, run {run}, ingest {ingest})")
}

/// One line for each output: its path, its node and, if the request has needles, those found; tabs between.
fn lines(request: &BuildRequest, result: &BuildResult) -> String {
    let mut text = String::new();
    for (path, output) in request.outputs.iter().zip(&result.outputs) {
        text.push_str(&shown(path.as_str()));
        text.push('\t');
        text.push_str(&node_text::format(&output.node));
        let found =
            output.needles.iter().filter_map(|&index| request.refscan_needles.get(usize::try_from(index).ok()?));
        let found: Vec<_> = found.map(|needle| shown(needle)).collect();
        if !request.refscan_needles.is_empty() {
            text.push('\t');
            text.push_str(&found.join(" "));
        }
        text.push('\n');
    }
    text
}

/// The text, quoted if it could be mistaken for more than one word.
fn shown(text: &str) -> String {
    let quoted = format!("{text:?}");
    let plain = quoted.len() == text.len() + 2 && !text.contains(char::is_whitespace) && !text.is_empty();
    if plain { text.to_owned() } else { quoted }
}

/// The destination of each output. An output within another one is exported with that.
fn exports<'a>(out: &Path, outputs: &'a [RelativePath]) -> impl Iterator<Item = (usize, PathBuf)> + use<'a> {
    let mut outermost: Vec<_> = outputs.iter().enumerate().collect();
    // By components, so that everything within a path follows it directly.
    outermost.sort_unstable_by_key(|(_, path)| path.as_path());
    outermost.dedup_by(|(_, later), (_, earlier)| later.is_within(earlier));
    outermost.sort_unstable_by_key(|(index, _)| *index);
    let out = out.to_owned();
    outermost.into_iter().map(move |(index, path)| (index, out.join(path.as_path())))
}

fn refuse_existing(dest: &Path) -> Result<(), CliError> {
    match fs::symlink_metadata(dest) {
        Ok(_) => Err(CliError::wrong(format!("{dest:?} exists already; outputs are never written over anything"))
            .try_this("--force, which replaces it, or another directory with --out")),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound) => Ok(()),
        Err(error) => Err(CliError::at_path(format!("{dest:?} can't be written"), error)),
    }
}

/// Writes the outputs in turn, up to the first failure. Those written before stay.
async fn write_outputs(
    (store, out): (&Store, &Path),
    existing: Existing,
    request: &BuildRequest,
    result: &BuildResult,
    cancel: &CancellationToken,
) -> Result<(), CliError> {
    let mut exports = exports(out, &request.outputs);
    while let Some((index, dest)) = exports.next() {
        let (Some(path), Some(output)) = (request.outputs.get(index), result.outputs.get(index)) else { continue };
        if let Err(error) = write_output(store, &output.node, &dest, existing, cancel).await {
            let export =
                format!("cofferdam export {} {}", node_text::format(&output.node), shown(&dest.to_string_lossy()));
            let next = match exports.count() {
                0 => export,
                more => format!("{export}, and likewise with the outputs that were to follow ({more})"),
            };
            let what = format!("the build succeeded, but its output {:?} can't be written to {dest:?}", path.as_str());
            return Err(error.about(what).try_this(next));
        }
    }
    Ok(())
}

async fn write_output(
    store: &Store,
    node: &Node,
    dest: &Path,
    existing: Existing,
    cancel: &CancellationToken,
) -> Result<(), CliError> {
    if let Some(parent) = dest.parent() {
        fs::create_dir_all(parent).map_err(|source| ExportError::Write {
            path: parent.to_owned(),
            action: "make the directory",
            source,
        })?;
    }
    super::export::write(store, node, dest.to_owned(), existing, cancel).await
}

#[cfg(test)]
mod tests;
