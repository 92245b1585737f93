//! Which builds there are, and who waits for them.
//!
//! ```text
//!   order ──▶ recorded success, its outputs still in the store ──▶ Record
//!     │
//!     └─bounded channel─▶ keeper (one task: queue, builds in flight) ──start──▶ a task a build ──▶ Builder, Recording
//!     ▼                      ▲                                                    │
//!   Waiter ◀──────────────── │ ── State, on a watch ◀─────────────────────────────┤
//!                            └────────────ended───────────────────────────────────┘
//!
//!   Queued ──▶ Running (resolving, booting, running, ingesting) ──▶ Done
//!     └── cancelled, or drained ─────────────────────────────────────▲
//! ```
//!
//! Equal orders in flight are one build. It is cancelled when the last [`Waiter`] is dropped, unless somebody has asked
//! for it to go on without.

mod flight;
mod keeper;
mod reuse;

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use cofferdam_castore::{B3Digest, Store};
use cofferdam_protocol::Sample;
use opentelemetry::Context;
use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use super::{Client, Metrics, Paid, Traces};
use crate::{
    build::{Builder, Options, Phase, Terminal},
    failure::Failure,
    queue::{Bounds, Budget, Need, Waiting},
    records::{BuildId, Machine, Record, Recording, Records},
    request::BuildRequest,
};

/// Messages that wait for the keeper; who sends one more waits.
const BUFFERED_MESSAGES: usize = 64;

/// What the farm may do.
#[derive(Debug, Clone)]
pub struct FarmSettings {
    /// What all builds may use together.
    pub budget: Budget,
    /// How many may wait.
    pub bounds: Bounds,
    /// How long running builds may go on when the daemon is to end.
    pub drain_timeout: Duration,
    /// Whether an earlier success answers an equal order.
    pub reuse: bool,
}

/// What the farm works with.
pub struct Crew {
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
pub struct Order {
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
    pub paid: Paid,
}

/// What an order comes to.
#[derive(Debug)]
pub enum Ordered {
    /// A build to wait for.
    Flight(Waiter),
    /// An equal build that has succeeded, and whose outputs are there.
    Record(Box<Record>),
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
pub struct Flight {
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
    _paid: Paid,
}

impl std::fmt::Debug for Flight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flight").field("id", &self.id()).finish_non_exhaustive()
    }
}

/// Somebody's interest in a build, as long as it is kept.
#[derive(Debug, Clone)]
pub struct Waiter {
    /// The build.
    pub flight: Arc<Flight>,
    /// It was there already.
    pub joined: bool,
    interest: Arc<Interest>,
}

/// Shared by all that wait for a build.
#[derive(Debug)]
struct Interest(CancellationToken);

impl Drop for Interest {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

impl Flight {
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

impl Waiter {
    /// Waits for the end.
    ///
    /// # Errors
    ///
    /// Nobody knows of one.
    pub async fn done(&self) -> Result<Arc<Record>, Failure> {
        let mut state = self.flight.state();
        let done = state.wait_for(|state| matches!(state, State::Done(_))).await;
        match done.as_deref() {
            Ok(State::Done(record)) => Ok(Arc::clone(record)),
            _ => Err(Failure::executor("host", "the task of the build broke down")),
        }
    }
}

enum Message {
    Order(Box<Order>, oneshot::Sender<Result<Waiter, Failure>>),
    Find(BuildId, oneshot::Sender<Option<Waiter>>),
    List(oneshot::Sender<Vec<Arc<Flight>>>),
    Ended(BuildId),
}

/// A way to the farm.
#[derive(Clone)]
pub struct Farm {
    messages: mpsc::Sender<Message>,
    crew: Arc<Crew>,
    /// If earlier successes count.
    lookups: Option<Arc<Semaphore>>,
}

impl Farm {
    /// Starts the farm. It ends when `drain` is cancelled and all builds have ended, some of them because their time was
    /// up; then the task ends.
    pub fn start(crew: Crew, settings: FarmSettings, drain: CancellationToken) -> (Self, JoinHandle<()>) {
        let (messages, inbox) = mpsc::channel(BUFFERED_MESSAGES);
        let lookups = settings.reuse.then(|| Arc::new(Semaphore::new(MAX_LOOKUPS)));
        let farm = Self { messages, crew: Arc::new(crew), lookups };
        let keeper = keeper::Keeper::new(farm.clone(), settings);
        (farm, tokio::spawn(keeper.keep(inbox, drain)))
    }

    /// Has something built, joins those who wait for the same, or finds what was built before.
    ///
    /// # Errors
    ///
    /// There is no room for it, not now or never.
    pub async fn order(&self, order: Order) -> Result<Ordered, Failure> {
        let client = order.client.clone();
        let ordered = self.take(order).await;
        match &ordered {
            Ok(Ordered::Record(record)) => {
                self.crew.metrics.reused();
                tracing::info!(build = %record.id, %client, "answered from a record");
            }
            Ok(Ordered::Flight(waiter)) if waiter.joined => {
                self.crew.metrics.joined();
                tracing::info!(build = %waiter.flight.id(), %client, "joined");
            }
            Ok(Ordered::Flight(waiter)) => {
                let record = waiter.flight.record();
                tracing::info!(build = %record.id, %client, command = record.description, "accepted");
            }
            Err(failure) => self.refused(&client, failure),
        }
        ordered
    }

    /// Notes that a request is not taken.
    pub(super) fn refused(&self, client: &Client, failure: &Failure) {
        self.crew.metrics.refused(failure);
        tracing::info!(%client, reason = failure.reason, why = failure.chain(), "refused");
    }

    async fn take(&self, order: Order) -> Result<Ordered, Failure> {
        if let Some(lookups) = self.lookups.as_ref().filter(|_| !order.rebuild)
            && let Ok(_turn) = lookups.acquire().await
            && let Some(record) = reuse::find(&self.crew, &order).await
        {
            return Ok(Ordered::Record(Box::new(record)));
        }
        let answer = self.ask(|reply| Message::Order(Box::new(order), reply)).await;
        answer.unwrap_or_else(|| Err(draining())).map(Ordered::Flight)
    }

    /// A build that waits or runs.
    pub async fn find(&self, id: BuildId) -> Option<Waiter> {
        self.ask(|reply| Message::Find(id, reply)).await.flatten()
    }

    /// All builds that wait or run, the oldest first.
    pub async fn list(&self) -> Vec<Arc<Flight>> {
        self.ask(Message::List).await.unwrap_or_default()
    }

    /// The records of all builds.
    pub fn records(&self) -> &Records {
        &self.crew.records
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
