//! Which builds there are, and who waits for them.
//!
//! ```text
//!   submission ──▶ recorded success, its outputs still in the store ──▶ Record
//!     │
//!     └─bounded channel─▶ event_loop (one task: queue, builds in build) ──start──▶ a task a build ──▶ Builder, Recording
//!     ▼                      ▲                                                    │
//!   Subscription ◀──────────────── │ ── State, on a watch ◀─────────────────────────────┤
//!                            └────────────ended───────────────────────────────────┘
//!
//!   Queued ──▶ Running (resolving, booting, running, ingesting) ──▶ Done
//!     └── cancelled, or drained ─────────────────────────────────────▲
//! ```
//!
//! Equal orders in build are one build. It is cancelled when the last [`Subscription`] is dropped, unless somebody has asked
//! for it to go on without.

mod active_build;
mod event_loop;
pub mod queue;
mod reuse;

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use cofferdam_castore::{B3Digest, Store};
use cofferdam_protocol::Sample;
use cofferdam_rpc::{Client, MemoryPermit};
use opentelemetry::Context;
use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use crate::{
    build::failure::Failure,
    build::{Builder, Options, Phase, Terminal},
    records::{BuildId, Machine, Record, Recording, Records},
    request::BuildRequest,
    scheduler::queue::{Bounds, Budget, Need, Waiting},
    telemetry::{Metrics, Traces},
};

/// Messages that wait for the event_loop; who sends one more waits.
const BUFFERED_MESSAGES: usize = 64;

/// What the scheduler may do.
#[derive(Debug, Clone)]
pub struct SchedulerSettings {
    /// What all builds may use together.
    pub budget: Budget,
    /// How many may wait.
    pub bounds: Bounds,
    /// How long running builds may go on when the daemon is to end.
    pub drain_timeout: Duration,
    /// Whether an earlier success answers an equal submission.
    pub reuse: bool,
}

/// What the scheduler works with.
pub struct Backend {
    /// Where outputs are.
    pub store: Store,
    /// Runs the builds.
    pub builder: Builder,
    /// Knows them.
    pub records: Records,
    /// What runs them.
    pub machine: Machine,
    /// Counts them.
    pub metrics: Arc<Metrics>,
    /// Tells others of them.
    pub traces: Option<Traces>,
}

/// Orders at a time whose earlier success is looked for: all that its outputs hold is read then.
const MAX_LOOKUPS: usize = 2;

/// What a client wants built.
#[derive(Debug)]
pub struct Submission {
    /// By whom.
    pub client: Client,
    /// What.
    pub request: BuildRequest,
    /// The request's.
    pub digest: B3Digest,
    /// With what.
    pub options: Options,
    /// It goes on when nobody waits for it.
    pub detached: bool,
    /// It runs even if an equal one has succeeded.
    pub rebuild: bool,
    /// The trace that it is part of.
    pub context: Context,
    /// For the request's memory.
    pub memory: MemoryPermit,
}

/// What an submission comes to.
#[derive(Debug)]
pub enum Submitted {
    /// A build to wait for.
    Active(Subscription),
    /// An equal build that has succeeded, and whose outputs are there.
    Earlier(Box<Record>),
}

/// Where a build is.
#[derive(Debug, Clone)]
pub enum State {
    /// It waits for room.
    Queued {
        /// Builds before it.
        position: u64,
        /// What it lacks.
        waiting_for: Waiting,
    },
    /// It has what it needs.
    Running {
        /// What it does.
        phase: Phase,
        /// What its command uses, if that has been looked at.
        sample: Option<Sample>,
        /// It has failed for this reason, and waits for a terminal.
        shell: Option<Arc<str>>,
    },
    /// It has ended.
    Done(Arc<Record>),
}

/// A build that waits, runs or has just ended.
pub struct ActiveBuild {
    /// What is built.
    pub request: BuildRequest,
    digest: B3Digest,
    client: Client,
    recording: Recording,
    /// Beside the first one.
    joined: Mutex<BTreeSet<Client>>,
    /// Where the terminal goes that a failed build waits for.
    shell: Mutex<Option<oneshot::Sender<Terminal>>>,
    /// Why the log ended before the build.
    log_failure: OnceLock<Failure>,
    state: watch::Receiver<State>,
    cancel: CancellationToken,
    context: Context,
    _memory: MemoryPermit,
}

impl std::fmt::Debug for ActiveBuild {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ActiveBuild").field("id", &self.id()).finish_non_exhaustive()
    }
}

/// Somebody's subscribers in a build, as long as it is kept.
#[derive(Debug, Clone)]
pub struct Subscription {
    /// The build.
    pub build: Arc<ActiveBuild>,
    /// It was there already.
    pub joined: bool,
    subscribers: Arc<Subscribers>,
}

/// Shared by all that wait for a build.
#[derive(Debug)]
struct Subscribers(CancellationToken);

impl Drop for Subscribers {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

impl ActiveBuild {
    /// Its name.
    pub fn id(&self) -> BuildId {
        self.recording.id()
    }

    /// What is known of it.
    pub fn record(&self) -> Record {
        self.recording.record()
    }

    /// Who asked for it first.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Whether a client may know of it.
    pub fn is_known_to(&self, client: &Client) -> bool {
        client.sees(&self.client) || self.joined.lock().unwrap_or_else(PoisonError::into_inner).contains(client)
    }

    /// Where it is; changes are told.
    pub fn state(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// Gives a terminal to a failed build that waits for one; back, if it doesn't.
    ///
    /// # Errors
    ///
    /// The terminal.
    pub fn lend(&self, terminal: Terminal) -> Result<(), Box<Terminal>> {
        match self.shell.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(shell) => shell.send(terminal).map_err(Box::new),
            None => Err(Box::new(terminal)),
        }
    }

    /// Ends it for all.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }
}

impl Subscription {
    /// Waits for the end.
    ///
    /// # Errors
    ///
    /// Nobody knows of one.
    pub async fn done(&self) -> Result<Arc<Record>, Failure> {
        let mut state = self.build.state();
        let done = state.wait_for(|state| matches!(state, State::Done(_))).await;
        match done.as_deref() {
            Ok(State::Done(record)) => Ok(Arc::clone(record)),
            _ => Err(Failure::executor("host", "the task of the build broke down")),
        }
    }
}

enum Message {
    Submission(Box<Submission>, oneshot::Sender<Result<Subscription, Failure>>),
    Find(BuildId, oneshot::Sender<Option<Subscription>>),
    List(oneshot::Sender<Vec<Arc<ActiveBuild>>>),
    Ended(BuildId),
}

/// A way to the scheduler.
#[derive(Clone)]
pub struct Scheduler {
    messages: mpsc::Sender<Message>,
    backend: Arc<Backend>,
    /// If earlier successes count.
    lookups: Option<Arc<Semaphore>>,
}

impl Scheduler {
    /// Starts the scheduler. It ends when `drain` is cancelled and all builds have ended, some of them because their time was
    /// up; then the task ends.
    pub fn start(backend: Backend, settings: SchedulerSettings, drain: CancellationToken) -> (Self, JoinHandle<()>) {
        let (messages, inbox) = mpsc::channel(BUFFERED_MESSAGES);
        let lookups = settings.reuse.then(|| Arc::new(Semaphore::new(MAX_LOOKUPS)));
        let scheduler = Self { messages, backend: Arc::new(backend), lookups };
        let event_loop = event_loop::EventLoop::new(scheduler.clone(), settings);
        (scheduler, tokio::spawn(event_loop.keep(inbox, drain)))
    }

    /// Has something built, joins those who wait for the same, or finds what was built before.
    ///
    /// # Errors
    ///
    /// There is no room for it, not now or never.
    pub async fn submit(&self, submission: Submission) -> Result<Submitted, Failure> {
        let client = submission.client.clone();
        let submitted = self.take(submission).await;
        match &submitted {
            Ok(Submitted::Earlier(record)) => {
                self.backend.metrics.reused();
                tracing::info!(build = %record.id, %client, "answered from a record");
            }
            Ok(Submitted::Active(subscription)) if subscription.joined => {
                self.backend.metrics.joined();
                tracing::info!(build = %subscription.build.id(), %client, "joined");
            }
            Ok(Submitted::Active(subscription)) => {
                let record = subscription.build.record();
                tracing::info!(build = %record.id, %client, command = record.description, "accepted");
            }
            Err(failure) => self.refused(&client, failure),
        }
        submitted
    }

    /// Notes that a request is not taken.
    pub(super) fn refused(&self, client: &Client, failure: &Failure) {
        self.backend.metrics.refused(failure);
        tracing::info!(%client, reason = failure.reason, why = failure.chain(), "refused");
    }

    async fn take(&self, submission: Submission) -> Result<Submitted, Failure> {
        if let Some(lookups) = self.lookups.as_ref().filter(|_| !submission.rebuild)
            && let Ok(_turn) = lookups.acquire().await
            && let Some(record) = reuse::find(&self.backend, &submission).await
        {
            return Ok(Submitted::Earlier(Box::new(record)));
        }
        let answer = self.ask(|reply| Message::Submission(Box::new(submission), reply)).await;
        answer.unwrap_or_else(|| Err(draining())).map(Submitted::Active)
    }

    /// A build that waits or runs.
    pub async fn find(&self, id: BuildId) -> Option<Subscription> {
        self.ask(|reply| Message::Find(id, reply)).await.flatten()
    }

    /// All builds that wait or run, the oldest first.
    pub async fn list(&self) -> Vec<Arc<ActiveBuild>> {
        self.ask(Message::List).await.unwrap_or_default()
    }

    /// The records of all builds.
    pub fn records(&self) -> &Records {
        &self.backend.records
    }

    async fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.messages.send(message(reply)).await.ok()?;
        answer.await.ok()
    }
}

fn draining() -> Failure {
    Failure::executor("draining", "the daemon is about to end and takes no builds").advised("try again, or elsewhere")
}

/// What a build takes of the budget.
fn need(request: &BuildRequest, options: &Options) -> Need {
    let asked = request.constraints.as_ref().map_or(0, |constraints| constraints.min_memory);
    Need { memory_bytes: options.memory_bytes.max(asked), cpus: options.cpus }
}
