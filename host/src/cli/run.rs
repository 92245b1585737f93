//! `run`: a request from flags.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::PathBuf,
    sync::Arc,
};

use bytes::Bytes;
use clap::Args;
use cofferdam_castore::{Node, PathComponent, Store};
use cofferdam_proto::snix::build::v1::{
    self as proto,
    build_request::{BuildConstraints, EnvVar},
};
use tokio_util::sync::CancellationToken;

use super::{
    CliError, ClientArgs,
    execute::{ExecuteArgs, Ready},
    import,
    node_text::{self, Reference},
    roots::{self, Composed, ImageArgs, Roots},
    source_tree::SourceTree,
    store,
};
use crate::request::{BuildRequest, RelativePath, RequestError, RequestErrorKind, SYSTEM};

/// The directory that is always writable, and the default working directory.
const SCRATCH: &str = "build";

/// The `PATH` of a build with a root. GNU make finds no command without one.
const ROOT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

const EXAMPLES: &str = "\
Examples:
  A file from a shell:
    cofferdam run --bin-sh --output build/out -- /bin/sh -c 'echo hello > out'
  A directory in, a program out, exported to ./result/build/lua:
    cofferdam run --input src=./lua-5.4 --input gcc=dir:blake3-…:1234 --env PATH=/inputs/gcc/bin \\
        --output build/lua --out result -- /inputs/gcc/bin/make -C /inputs/src
  Your own project, in a Debian root:
    cofferdam run --root docker-archive:debian.tar --source . --output build/hello --out result -- make
  A token from a file, as /run/secrets/token in the build alone:
    cofferdam run --secret token=$HOME/.token --bin-sh --network --allow-host api.example -- /bin/sh -c './fetch'
  A shell to type into, in a Debian root:
    cofferdam run -it --root tar:debian.tar -- /bin/bash
  A Debian root, and one from a registry:
    cofferdam run --root tar:debian.tar -- /bin/sh -c 'cat /etc/debian_version'
    cofferdam run --root oci://registry.example/debian:12 -- /bin/sh -c 'whoami'";

/// Runs a command in a clean, sealed machine
///
/// The command can read its inputs and write to its scratch directories (`build`, and those of --scratch). It has exactly
/// the given environment, with --root also the usual PATH, and no network unless --network is given. Paths are relative to the
/// build's root and begin without a slash; the empty path is the root.
///
/// The command's stdout and stderr go to stderr as they come. stdout gets one line for each output: path, node and, with
/// --needle, the needles found; tabs between. With --json it gets a snix.build.v1.BuildResponse in ProtoJSON. With a
/// daemon, the line before that has the build's id: {"build":ID}.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, after_long_help = format!("{}\n\n{}\n\n{EXAMPLES}", roots::HELP, node_text::HELP))]
pub(super) struct RunArgs {
    /// The build's root: a named one, a node, a directory, an archive or an image; see Roots in --help
    #[arg(long, value_name = "ROOT", value_parser = clap::value_parser!(OsString))]
    root: Option<OsString>,
    /// Copy DIR to where the command starts, writable and owned by the build's user. DIR itself is not changed
    #[arg(long, value_name = "DIR")]
    source: Option<PathBuf>,
    /// Leave out of --source what git ignores
    #[arg(long, requires = "source")]
    gitignore: bool,
    /// Add an input NAME: a PATH, which is imported first, through symbolic links; or a NODE or DIGEST of the store
    #[arg(long = "input", value_name = "NAME=PATH|NODE|DIGEST", value_parser = clap::value_parser!(OsString))]
    inputs: Vec<OsString>,
    /// The directory of the inputs; '' for the build's root
    #[arg(long, value_name = "DIR", default_value = "inputs")]
    inputs_dir: String,
    /// Set an environment variable; the environment has no others, and the last value of a name counts
    #[arg(long = "env", value_name = "K=V", value_parser = clap::value_parser!(OsString))]
    environment: Vec<OsString>,
    /// The working directory
    #[arg(long, value_name = "DIR", default_value = SCRATCH)]
    workdir: String,
    /// Another writable directory, beside `build`
    #[arg(long, value_name = "DIR")]
    scratch: Vec<String>,
    /// An output: a file, directory or symbolic link that the command must make
    #[arg(long = "output", value_name = "PATH")]
    outputs: Vec<String>,
    /// Report the outputs that contain this text, in files, names or link targets
    #[arg(long = "needle", value_name = "STR")]
    needles: Vec<String>,
    /// Provide a /bin/sh
    #[arg(long)]
    bin_sh: bool,
    /// Give the build a network, on which it can connect to what --allow-host and --allow-address say; with a daemon and
    /// without these flags, to what the daemon's configuration says
    #[arg(long)]
    network: bool,
    /// The command and its arguments, as the build sees them
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
    #[command(flatten, next_help_heading = "Images")]
    images: ImageArgs,
    #[command(flatten)]
    execute: ExecuteArgs,
}

/// Where an input comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    Path(PathBuf),
    Store(Reference),
}

impl RunArgs {
    pub(super) async fn execute(self, client: &ClientArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        let built = self.build(client, cancel).await;
        let Some(option) = self.misplaced() else { return built };
        let hint = format!("{option} comes after `--`, so the command got it; options of cofferdam go before `--`");
        if built.is_ok() && option == "--out" && !self.outputs.is_empty() {
            client.progress().note(&format!("note: {hint}"));
        }
        built.map_err(|error| error.hint(&hint))
    }

    async fn build(&self, client: &ClientArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        let sources = self.sources()?;
        if self.network && client.daemon().is_none() && !self.execute.network.is_given() {
            return Err(CliError::wrong("--network by itself lets the build connect to nothing")
                .try_this("--allow-host NAME, once for each name; or leave out --network"));
        }
        // Importing is work, so everything else is checked first.
        let root = self.root.as_deref().map(roots::Source::parse).transpose()?;
        let mut request = BuildRequest::try_from(self.message()?)?;
        let is_composed = root.is_some() || self.source.is_some();
        if is_composed {
            // The root's entries are inputs, and the other inputs are in one of them.
            request.inputs_dir = RelativePath::default();
        }
        let source = self.source.as_deref().map(|path| SourceTree::of(path, self.gitignore)).transpose()?;
        let ready = self.execute.prepare(client, request)?;
        let mut inputs = BTreeMap::new();
        for (name, source) in sources {
            inputs.insert(name, load(&ready, source, client, cancel).await?);
        }
        if !is_composed {
            return ready.with_inputs(inputs)?.execute(cancel).await;
        }
        let (store, progress) = (ready.store.clone(), Arc::clone(&ready.progress));
        let root = match root {
            None => None,
            Some(root) => {
                let roots = Roots { args: &self.images, client, store: &store, progress: &progress, cancel };
                Some(roots.load(&root).await?)
            }
        };
        let source = match source {
            None => None,
            Some(source) => Some(source.import(&store, &progress, cancel).await.inspect_err(|_| progress.clear())?),
        };
        let inputs = self.composed(&store, root.as_ref(), source, inputs).await;
        let inputs = inputs.inspect_err(|_| progress.clear())?;
        let built = ready.with_inputs(inputs)?.execute(cancel).await;
        match (built, root) {
            (Err(error), Some(root)) if !self.bin_sh => Err(without_shell(error, &store, &root).await),
            (built, _) => built,
        }
    }

    /// An option of this command that was not given, but is among the arguments of the command to run.
    fn misplaced(&self) -> Option<&'static str> {
        let absent = [
            ("--out", self.execute.out.is_none()),
            ("--output", self.outputs.is_empty()),
            ("--input", self.inputs.is_empty()),
            ("--root", self.root.is_none()),
            ("--source", self.source.is_none()),
        ];
        let is_argument = |option: &str| {
            let is_it = |argument: &String| {
                argument.strip_prefix(option).is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
            };
            self.command.iter().skip(1).any(is_it)
        };
        absent.into_iter().find_map(|(option, is_absent)| (is_absent && is_argument(option)).then_some(option))
    }

    /// The entries of the build's root.
    async fn composed(
        &self,
        store: &Store,
        root: Option<&Node>,
        source: Option<Node>,
        inputs: BTreeMap<PathComponent, Node>,
    ) -> Result<BTreeMap<PathComponent, Node>, CliError> {
        let composed = match root {
            Some(root) => Composed::of(store, root).await?,
            None => Composed::empty(store),
        };
        let composed = composed.with_inputs(&inside(&self.inputs_dir), inputs).await?;
        let composed = match source {
            Some(source) => composed.with_source(&inside(&self.workdir), source).await?,
            None => composed,
        };
        Ok(composed.entries())
    }

    /// The source of each input, by name.
    fn sources(&self) -> Result<BTreeMap<PathComponent, Source>, CliError> {
        let mut sources = BTreeMap::new();
        for argument in &self.inputs {
            let (name, source) = source(argument)?;
            if sources.insert(name, source).is_some() {
                let rule = "must not have a duplicate name";
                return Err(RequestError::new(RequestErrorKind::Invalid, "inputs", rule)
                    .got(format!("{argument:?}"))
                    .into());
            }
        }
        Ok(sources)
    }

    /// The request without its inputs. If a variable is given twice, the last one counts.
    fn message(&self) -> Result<proto::BuildRequest, CliError> {
        let mut environment_vars = self.environment.iter().rev().map(variable).collect::<Result<Vec<_>, _>>()?;
        if self.root.is_some() {
            // Of two with one name, the first stays.
            environment_vars.push(EnvVar { key: "PATH".to_owned(), value: Bytes::from_static(ROOT_PATH.as_bytes()) });
        }
        environment_vars.sort_by(|one, other| one.key.cmp(&other.key));
        environment_vars.dedup_by(|second, first| second.key == first.key);
        let mut scratch_paths = vec![SCRATCH.to_owned()];
        scratch_paths.extend(self.scratch.iter().map(|path| inside(path)));
        // Over the inputs, it is a writable copy.
        scratch_paths.extend(self.source.iter().map(|_| inside(&self.workdir)));
        Ok(proto::BuildRequest {
            inputs: vec![],
            command_args: self.command.clone(),
            working_dir: inside(&self.workdir),
            scratch_paths: sorted(scratch_paths),
            inputs_dir: inside(&self.inputs_dir),
            outputs: sorted(self.outputs.iter().map(|path| inside(path)).collect()),
            environment_vars,
            constraints: Some(BuildConstraints {
                system: SYSTEM.to_owned(),
                min_memory: self.execute.asked.memory.map_or(0, u64::from),
                available_ro_paths: vec![],
                network_access: self.network,
                provide_bin_sh: self.bin_sh,
            }),
            additional_files: vec![],
            refscan_needles: self.needles.clone(),
        })
    }
}

/// The reason of a failure because a command, or the interpreter of a script, was not found.
const NOT_FOUND: &str = "command_not_found";

/// The same failure, with what the root lacks.
async fn without_shell(error: CliError, store: &Store, root: &Node) -> CliError {
    let mut failure = error.failure();
    if failure.reason != NOT_FOUND || !matches!(roots::has(store, root, "bin/sh").await, Ok(false)) {
        return error;
    }
    failure.causes.push("the root has no /bin/sh".to_owned());
    failure.advised("--bin-sh, which provides one; or a program that the root has, by its path").into()
}

/// A path of a build as requests have it: `/build/./out/` is `build/out`. What leads out with `..` stays, and is refused.
fn inside(path: &str) -> String {
    path.split('/').filter(|part| !matches!(*part, "" | ".")).collect::<Vec<_>>().join("/")
}

fn sorted(mut paths: Vec<String>) -> Vec<String> {
    paths.sort();
    paths.dedup();
    paths
}

pub(super) fn split<'a>(flag: &str, form: &str, argument: &'a OsString) -> Result<(&'a [u8], &'a [u8]), CliError> {
    let bytes = argument.as_bytes();
    match bytes.iter().position(|&byte| byte == b'=') {
        Some(at) => Ok((&bytes[..at], &bytes[at + 1..])),
        None => Err(CliError::wrong(format!("{flag} {argument:?} has no \"=\"")).try_this(format!("{flag} {form}"))),
    }
}

fn source(argument: &OsString) -> Result<(PathComponent, Source), CliError> {
    let (name, rest) = split("--input", "NAME=PATH, NAME=NODE or NAME=DIGEST", argument)?;
    let wrong = |error: &dyn std::error::Error| CliError::wrong(format!("--input {argument:?}: {error}"));
    let name = PathComponent::try_from(name).map_err(|error| wrong(&error))?;
    let source = match str::from_utf8(rest) {
        Ok("") => return Err(CliError::wrong(format!("--input {argument:?} has nothing after \"=\""))),
        Ok(text) if node_text::is_reference(text) => Source::Store(text.parse().map_err(|error| wrong(&error))?),
        _ => Source::Path(OsString::from_vec(rest.to_vec()).into()),
    };
    Ok((name, source))
}

fn variable(argument: &OsString) -> Result<EnvVar, CliError> {
    let (key, value) = split("--env", "K=V", argument)?;
    match str::from_utf8(key) {
        Ok(key) => Ok(EnvVar { key: key.to_owned(), value: Bytes::copy_from_slice(value) }),
        Err(_) => Err(CliError::wrong(format!("--env {argument:?}: the name is not UTF-8"))),
    }
}

async fn load(
    ready: &Ready<'_>,
    source: Source,
    client: &ClientArgs,
    cancel: &CancellationToken,
) -> Result<Node, CliError> {
    match source {
        Source::Path(path) => {
            ready.progress.step("importing inputs");
            import::import(&ready.store, import::followed(path)?, "importing inputs", &ready.progress, cancel)
                .await
                .inspect_err(|_| ready.progress.clear())
        }
        Source::Store(reference) => store::find(&ready.store, &reference, client).await,
    }
}

#[cfg(test)]
mod tests;
