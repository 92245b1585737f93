//! One build, from admission to result; the owner of its VM's life.
//!
//! ```text
//!   Builder::build(request)
//!     admit ──▶ resolve inputs ──▶ run directory: sockets, scratch copy
//!                                       │
//!              inputs' device ◀─────────┼──────────▶ VMM
//!                                       ▼
//!                  the guest dials ──▶ session (a thread): specification ─▶ logs ─▶ report ─▶ outputs
//!                                       │
//!     whichever comes first: the session's end · a death · the deadline · cancellation
//!                                       ▼
//!            kill what is left ──▶ remove the run directory ──▶ Built or BuildError
//! ```
//!
//! Nothing outlives [`Builder::build`]: dropping its future kills the processes and removes the run directory too.

mod error;
mod guest;
mod progress;
mod run_dir;
mod session;

use std::{
    os::unix::net::UnixStream,
    path::PathBuf,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use cofferdam_castore::{Store, refscan::Needles};
use cofferdam_images::Image;
use cofferdam_protocol::{Specification, Stream, Usage, tree};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::{
    inputs,
    jail::Spawner,
    request::{self, BuildRequest, BuildResult, Host, RequestError, RequestErrorKind},
    vmm,
};

pub use error::{BuildError, ExecutorError, Failed, Limit, ProtocolError, Reason};
use guest::Guest;
use progress::Progress;
use run_dir::RunDir;
pub use run_dir::sweep;
use session::Session;

/// How often a guest may boot for one build, see [`Builder::boot`].
const MAX_BOOTS: u32 = 2;

/// How long the other side of a broken connection has to explain itself.
const AFTERMATH: Duration = Duration::from_secs(2);

/// What every build on this host gets, unless its request asks for more.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The guest image.
    pub image: Image,
    /// The VMM that runs every build.
    pub vmm: vmm::Choice,
    /// Where run directories are made; private to this user.
    pub run_dir: PathBuf,
    /// Memory that a build finds, in bytes, when it asks for less.
    pub memory_bytes: u64,
    /// Virtual CPUs.
    pub cpus: u32,
    /// The model of CPU that builds see, see [`vmm::Machine::cpu_model`].
    pub cpu_model: Option<String>,
    /// Whether guests' memory is made of huge pages, see [`vmm::Machine::hugepages`].
    pub hugepages: bool,
    /// Size of the scratch disk, in bytes.
    pub scratch_bytes: u64,
    /// Wall-clock time from the VM's start to the last output.
    pub timeout: Duration,
    /// Time that a guest has to boot and connect.
    pub connect_timeout: Duration,
    /// Most bytes of stdout and stderr together.
    pub log_bytes: u64,
    /// Bounds of all outputs together.
    pub outputs: tree::Limits,
}

impl Settings {
    /// Memory that a build finds by default, in bytes.
    pub const MEMORY_BYTES: u64 = 2 << 30;
    /// Virtual CPUs by default.
    pub const CPUS: u32 = 2;
    /// Size of the scratch disk by default, in bytes; sparse, so it costs what a build writes.
    pub const SCRATCH_BYTES: u64 = 32 << 30;
    /// Wall-clock time by default.
    pub const TIMEOUT: Duration = Duration::from_secs(60 * 60);
    /// Time to boot by default; emulation on a busy host is slow.
    pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
    /// Log bytes by default.
    pub const LOG_BYTES: u64 = 1 << 30;
    /// Output bounds by default.
    pub const OUTPUTS: tree::Limits = tree::Limits { entries: 1_000_000, bytes: 64 << 30 };

    /// The defaults, for one image, VMM and place for run directories.
    pub fn new(image: Image, vmm: vmm::Choice, run_dir: PathBuf) -> Self {
        Self {
            image,
            vmm,
            run_dir,
            memory_bytes: Self::MEMORY_BYTES,
            cpus: Self::CPUS,
            cpu_model: None,
            hugepages: false,
            scratch_bytes: Self::SCRATCH_BYTES,
            timeout: Self::TIMEOUT,
            connect_timeout: Self::CONNECT_TIMEOUT,
            log_bytes: Self::LOG_BYTES,
            outputs: Self::OUTPUTS,
        }
    }
}

/// Watches a build. Called from the build's own threads; a slow observer holds the build back, it loses nothing.
pub trait Observer: Send + Sync {
    /// A phase begins.
    fn phase(&self, phase: Phase);
    /// The command wrote these bytes: any bytes at all, at any boundary, meant by an untrusted build.
    fn log(&self, stream: Stream, bytes: &[u8]);
}

/// Where a build is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Reading the closure of the inputs.
    Resolving,
    /// From the VMM's start to the guest's first message.
    Booting,
    /// From the specification to the command's end.
    Running,
    /// From the command's end to the last output.
    Ingesting,
}

impl Phase {
    /// "while …"
    fn when(self) -> &'static str {
        match self {
            Self::Resolving => "while the inputs were resolved",
            Self::Booting => "while the guest booted",
            Self::Running => "while the command ran",
            Self::Ingesting => "while the outputs were ingested",
        }
    }
}

/// A successful build.
#[derive(Debug, Clone)]
pub struct Built {
    /// The outputs, in the request's order.
    pub result: BuildResult,
    /// What the build used inside its guest.
    pub usage: Usage,
    /// What it took.
    pub times: Times,
}

/// How long each phase took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Times {
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
pub struct Builder {
    store: Store,
    settings: Settings,
    spawner: Spawner,
    host: Host,
}

impl Builder {
    /// A builder for one store; first cleans up after builds whose host process was killed.
    ///
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// The place for run directories can't be made private or cleaned, or no thread can be started.
    pub fn new(store: Store, settings: Settings) -> Result<Self, ExecutorError> {
        sweep(&settings.run_dir)?;
        let spawner = Spawner::new(tokio::runtime::Handle::current()).map_err(|source| ExecutorError::RunDir {
            action: "start the thread that forks, for",
            path: settings.run_dir.clone(),
            source,
        })?;
        Ok(Self { store, settings, spawner, host: Host::this() })
    }

    /// Runs one build.
    ///
    /// # Errors
    ///
    /// See [`BuildError`]; its variants differ in who has to act.
    pub async fn build(
        &self,
        request: &BuildRequest,
        observer: Arc<dyn Observer>,
        cancel: &CancellationToken,
    ) -> Result<Built, BuildError> {
        request::admit(request, &self.host).map_err(BuildError::Request)?;
        let progress = Arc::new(Progress::new(observer));
        let stopped = async {
            tokio::select! {
                () = cancel.cancelled() => BuildError::Executor(ExecutorError::Interrupted),
                () = tokio::time::sleep(self.settings.timeout) => {
                    let reason = Reason::Timeout { limit: self.settings.timeout };
                    BuildError::Failed(Box::new(Failed { reason, usage: None }))
                }
            }
        };
        let mut guest = None;
        let decided = Arc::new(AtomicBool::new(false));
        let mut outcome = {
            let mut run = pin!(self.run(request, &progress, &decided, &mut guest));
            tokio::select! {
                biased;
                // What is being stored can't be taken back, and its result is worth the wait.
                error = stopped => if decided.swap(true, Ordering::AcqRel) { run.await } else { Err(error) },
                outcome = &mut run => outcome,
            }
        };
        if let Some(guest) = guest {
            if matches!(outcome, Err(BuildError::Failed(_)))
                && let Some(error) = guest.host_is_full()
            {
                outcome = Err(BuildError::Executor(error));
            }
            match outcome {
                Ok(_) => guest.finish().await,
                Err(_) => guest.kill().await,
            }
        }
        let (result, usage) = outcome?;
        Ok(Built { result, usage, times: progress.times() })
    }

    /// The build without its deadline, and without the end of its guest.
    async fn run(
        &self,
        request: &BuildRequest,
        progress: &Arc<Progress>,
        decided: &Arc<AtomicBool>,
        guest: &mut Option<Guest>,
    ) -> Outcome {
        let needles = Needles::new(&request.refscan_needles).map_err(|error| {
            let error =
                RequestError::new(RequestErrorKind::Invalid, "refscan_needles", "must fit into memory").got(error);
            BuildError::Request(error)
        })?;
        let tree = inputs::resolve(&self.store, &request.inputs).await.map_err(|error| match error.missing() {
            Some(wrong) => BuildError::Request(wrong),
            None => BuildError::Executor(ExecutorError::Resolve(error)),
        })?;
        progress.enter(Phase::Booting);
        let stream = self.boot(request, &Arc::new(tree), guest).await.map_err(BuildError::Executor)?;
        let guest = guest.as_mut().expect("boot has left it there");
        let mut ended = self.converse(request, needles, (progress, decided), stream, guest.memory_bytes())?;
        tokio::select! {
            biased;
            outcome = &mut ended => match outcome {
                Ok(Err(error)) if session::is_disconnect(&error) => {
                    let death = tokio::time::timeout(AFTERMATH, guest.died()).await;
                    Err(death.map_or(error, |death| BuildError::Executor(died(death, progress.phase()))))
                }
                outcome => outcome.unwrap_or_else(|_| Err(BuildError::Executor(ExecutorError::SessionPanicked))),
            },
            death = guest.died() => {
                let outcome = match tokio::time::timeout(AFTERMATH, &mut ended).await {
                    Err(_) if decided.swap(true, Ordering::AcqRel) => ended.await.ok(),
                    outcome => outcome.ok().and_then(Result::ok),
                };
                let is_told = |outcome: &Outcome| !outcome.as_ref().is_err_and(session::is_disconnect);
                let died = || Err(BuildError::Executor(died(death, progress.phase())));
                outcome.filter(is_told).unwrap_or_else(died)
            }
        }
    }

    /// Boots a guest that connects, and leaves it in `place`. Under emulation on a busy host one kernel in some hundred
    /// hangs before its first line; a guest that never connected has seen nothing of the request and may boot again.
    async fn boot(
        &self,
        request: &BuildRequest,
        tree: &Arc<inputs::Tree>,
        place: &mut Option<Guest>,
    ) -> Result<UnixStream, ExecutorError> {
        let limit = self.settings.connect_timeout;
        let mut boots = 1;
        loop {
            let guest = place.insert(Guest::start(self, request, Arc::clone(tree)).await?);
            match guest.connected(limit).await {
                Err(ExecutorError::NeverConnected { .. }) if boots < MAX_BOOTS => boots += 1,
                connected => return connected,
            }
            tracing::warn!("the guest did not connect within {} seconds; booting another", limit.as_secs());
            if let Some(hung) = place.take() {
                hung.kill().await;
            }
        }
    }

    /// Starts the thread that talks to the guest. It ends at the latest when the guest's processes do, since its
    /// connection does.
    fn converse(
        &self,
        request: &BuildRequest,
        needles: Needles,
        (progress, decided): (&Arc<Progress>, &Arc<AtomicBool>),
        stream: UnixStream,
        memory_bytes: u64,
    ) -> Result<oneshot::Receiver<Outcome>, BuildError> {
        let specification = specification(request);
        let (store, settings) = (self.store.clone(), self.settings.clone());
        let (progress, decided) = (Arc::clone(progress), Arc::clone(decided));
        let handle = tokio::runtime::Handle::current();
        let (sender, receiver) = oneshot::channel();
        std::thread::Builder::new()
            .name("session".to_owned())
            .spawn(move || {
                let session = Session {
                    specification,
                    store: &store,
                    needles: &needles,
                    handle,
                    progress: &progress,
                    decided: &decided,
                    log_bytes: settings.log_bytes,
                    outputs: settings.outputs,
                    memory_bytes,
                    scratch_bytes: settings.scratch_bytes,
                };
                // Nobody waits any more when the build was stopped.
                let _ = sender.send(session.converse(&stream));
            })
            .map_err(|error| BuildError::Executor(ExecutorError::Thread(error)))?;
        Ok(receiver)
    }
}

/// What a session ends with.
type Outcome = Result<(BuildResult, Usage), BuildError>;

fn died(death: vmm::Death, phase: Phase) -> ExecutorError {
    ExecutorError::Died { what: death.what(), cause: death.cause, when: phase.when(), said: death.said }
}

fn specification(request: &BuildRequest) -> Specification {
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
    }
}
