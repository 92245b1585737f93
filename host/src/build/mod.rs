//! One build, from admission to result; the owner of its VM's life.
//!
//! ```text
//!   Builder::build(request)
//!     admit ──▶ resolve inputs ──▶ boot: run directory, devices, VMM, until the guest connects
//!                                       │
//!                                 bind: the inputs' tree
//!                                       ▼
//!                    session (a thread): specification ─▶ logs ─▶ report ─▶ outputs
//!                                       │                            └▶ failed: its remains, a shell
//!     whichever comes first: the session's end · a death · a limit on time · cancellation, see `ending`
//!                                       ▼
//!            kill what is left ──▶ remove the run directory ──▶ Built or BuildError
//! ```
//!
//! Nothing outlives [`Builder::build`]: dropping its future kills the processes and removes the run directory too.

mod conversation;
mod ending;
mod environment;
mod error;
mod exchange;
pub(crate) mod failure;
mod guest;
mod interruption;
mod line;
mod options;
mod phase;
mod progress;
mod remains;
mod session;
mod shell;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use cofferdam_castore::{B3Digest, Store, blobservice::Lease, refscan::ReferencePattern};
use cofferdam_images::Image;
use cofferdam_protocol::{Sample, Specification, Stream, Usage};
use tokio_util::sync::CancellationToken;

use crate::{
    devices::inputs,
    machine::jail::Spawner,
    machine::vmm,
    machine::{FileError, sweep},
    request::{self, AbsolutePath, Admitted, BuildRequest, BuildResult, Host, RequestError, RequestErrorKind},
};

use conversation::Conversation;
use ending::{Ending, HangUp};
pub(crate) use error::{BuildError, ExecutorError, Failed, Kept, Limit, ProtocolError, Reason};
use guest::Size;
use interruption::Interruptions;
pub(crate) use options::Options;
pub(crate) use phase::Phase;
use progress::Progress;
pub(crate) use shell::{Terminal, TerminalInput};

/// How long the other side of a broken connection has to explain itself.
const AFTERMATH: Duration = Duration::from_secs(2);

/// How this host runs its builds.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The guest image.
    pub image: Image,
    /// The VMM that runs every build.
    pub vmm: vmm::Choice,
    /// Where run directories are made; private to this user.
    pub run_dir: PathBuf,
    /// The model of CPU that builds see, see [`vmm::Config::cpu_model`].
    pub cpu_model: Option<String>,
    /// Whether guests' memory is made of huge pages, see [`vmm::Config::hugepages`].
    pub hugepages: bool,
    /// Time that a guest has to boot and connect.
    pub connect_timeout: Duration,
    /// What builds may be shown of the host if they ask for it, see [`Host::ro_paths`].
    pub ro_paths: BTreeMap<AbsolutePath, PathBuf>,
    /// See [`Host::withholds_network`].
    pub withhold_network: bool,
    /// See [`Host::nested`].
    pub nested: bool,
}

impl Settings {
    /// Time to boot by default; emulation on a busy host is slow.
    pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

    /// The defaults, for one image, VMM and place for run directories.
    pub fn new(image: Image, vmm: vmm::Choice, run_dir: PathBuf) -> Self {
        Self {
            image,
            vmm,
            run_dir,
            cpu_model: None,
            hugepages: false,
            connect_timeout: Self::CONNECT_TIMEOUT,
            ro_paths: BTreeMap::new(),
            withhold_network: false,
            nested: false,
        }
    }
}

/// Watches a build. Called from the build's own threads; a slow observer holds the build back, it loses nothing.
pub(crate) trait Observer: Send + Sync {
    /// A phase begins.
    fn phase(&self, phase: Phase);
    /// The command wrote these bytes: any bytes at all, at any boundary, meant by an untrusted build.
    fn log(&self, stream: Stream, bytes: &[u8]);
    /// What the build uses while its command runs, about once a second and never more often than twice, as its guest
    /// claims.
    fn sample(&self, _sample: &Sample) {}
    /// The build has failed, and its machine is still there: a terminal for a shell in it. Asked for only if
    /// [`Options::shell`] is set, and not to be waited for: a client may come to its ends of the channels later.
    fn terminal(&self, _reason: &Reason) -> Option<Terminal> {
        None
    }
}

/// A successful build.
#[derive(Debug, Clone)]
pub(crate) struct Built {
    /// The outputs, in the request's order.
    pub result: BuildResult,
    /// What the build used inside its guest.
    pub usage: Usage,
    /// The time of each phase.
    pub times: Times,
}

/// How long each phase took.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Times {
    /// Resolving the inputs.
    pub resolve: Duration,
    /// From the VMM's start to the guest's first message.
    pub boot: Duration,
    /// From the specification to the end of the command's last process.
    pub run: Duration,
    /// Receiving, scanning and storing the outputs.
    pub ingest: Duration,
}

/// Runs builds on this host, any number at a time.
pub(crate) struct Builder {
    store: Store,
    settings: Settings,
    spawner: Spawner,
    host: Host,
    image_digest: environment::ImageDigest,
}

impl Builder {
    /// A builder for one store; first cleans up after builds whose host process was killed.
    ///
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// The place for run directories can't be made private or cleaned, or no thread can be started.
    pub(crate) fn new(store: Store, settings: Settings) -> Result<Self, ExecutorError> {
        sweep(&settings.run_dir)?;
        let spawner = Spawner::new(tokio::runtime::Handle::current()).map_err(|source| FileError {
            action: "start the thread that forks, for",
            path: settings.run_dir.clone(),
            source,
        })?;
        let host = Host {
            ro_paths: settings.ro_paths.clone(),
            withholds_network: settings.withhold_network,
            nested: settings.nested,
            ..Host::this()
        };
        Ok(Self { store, settings, spawner, host, image_digest: environment::ImageDigest::default() })
    }

    /// The digest of all that builds on this host can see beside their request and its limits: equal requests give equal
    /// builds only where it is equal, too. It changes with the image, even while this builder is there.
    ///
    /// # Errors
    ///
    /// The image can't be read.
    pub(crate) fn environment(&self) -> std::io::Result<B3Digest> {
        environment::digest(&self.settings, &self.image_digest)
    }

    /// Admits a request if this host can build it.
    ///
    /// # Errors
    ///
    /// The first constraint that it can't meet.
    pub(crate) fn admit(&self, request: BuildRequest) -> Result<Admitted, RequestError> {
        request::admit(request, &self.host)
    }

    /// Runs one build.
    ///
    /// # Errors
    ///
    /// See [`BuildError`]; its variants differ in who has to act.
    pub(crate) async fn build(
        &self,
        request: &Admitted,
        options: &Options,
        observer: Arc<dyn Observer>,
        cancel: &CancellationToken,
    ) -> Result<Built, BuildError> {
        let ending = Arc::new(Ending::new());
        let _at_the_end = HangUp(Arc::clone(&ending));
        let progress = Arc::new(Progress::new(observer, options, Arc::clone(&ending)));
        let interruptions = Interruptions { cancel, progress: &progress };
        let Prepared { needles, tree, lease: _lease } = interruptions.before(self.prepare(request)).await??;
        progress.enter(Phase::Booting);
        let size = Size::of(request, options);
        let booted = guest::boot(self, &size, &interruptions).await?;
        let host_paths = booted.host_paths.clone();
        let (mut machine, stream) = booted.bind(tree);
        let conversation = Conversation {
            specification: Specification { host_paths, ..specification(request, options) },
            store: self.store.clone(),
            needles,
            options: options.clone(),
            memory_bytes: size.memory_bytes,
            progress: Arc::clone(&progress),
            ending,
        };
        match conversation.hold(&mut machine, stream, &interruptions).await {
            Ok((result, usage)) => {
                machine.finish().await;
                Ok(Built { result, usage, times: progress.times() })
            }
            Err(error) => Err(guest::end(machine, error).await),
        }
    }

    /// Gets ready what a build needs beside its machine.
    async fn prepare(&self, request: &BuildRequest) -> Result<Prepared, BuildError> {
        let needles = request.refscan_needles.clone();
        let needles = tokio::task::spawn_blocking(move || ReferencePattern::new(needles))
            .await
            .map_err(|error| BuildError::Executor(ExecutorError::Thread(error.into())))?
            .map_err(|error| {
                let rule = "must fit into memory";
                BuildError::Request(RequestError::new(RequestErrorKind::Invalid, "refscan_needles", rule).got(error))
            })?;
        let nodes: Vec<_> = request.inputs.values().cloned().collect();
        // Before anything is looked for, so that what is found stays to the end.
        let lease =
            self.store.blobs.lease(&nodes).map_err(|error| BuildError::Executor(ExecutorError::Store(error)))?;
        let tree = inputs::resolve(&self.store, &request.inputs).await.map_err(|error| match error.missing() {
            Some(wrong) => BuildError::Request(wrong),
            None => BuildError::Executor(ExecutorError::Resolve(error)),
        })?;
        Ok(Prepared { needles, tree, lease })
    }
}

/// What a build needs beside its machine.
struct Prepared {
    needles: ReferencePattern,
    tree: inputs::Tree,
    /// Keeps the inputs in the store.
    lease: Lease,
}

/// What a session ends with.
type Outcome = Result<(BuildResult, Usage), BuildError>;

fn specification(request: &BuildRequest, options: &Options) -> Specification {
    let paths = |paths: &[request::RelativePath]| paths.iter().map(|path| path.as_str().to_owned()).collect();
    Specification {
        command_args: request.command_args.clone(),
        environment: request
            .environment_vars
            .iter()
            .map(|variable| (variable.key.clone(), variable.value.to_vec().into()))
            .collect(),
        working_dir: request.working_dir.as_str().to_owned(),
        inputs_dir: request.inputs_dir.as_str().to_owned(),
        scratch_paths: paths(&request.scratch_paths),
        additional_files: request
            .additional_files
            .iter()
            .map(|file| (file.path.as_str().to_owned(), file.contents.to_vec().into()))
            .collect(),
        outputs: paths(&request.outputs),
        provide_bin_sh: request.constraints.as_ref().is_some_and(|constraints| constraints.provide_bin_sh),
        host_paths: Vec::new(),
        kvm: guest::wants_kvm(request),
        processes: options.limits.processes,
    }
}
