//! Runs the builds of all clients: their queue, their states, and the access to them.
//!
//! ```text
//!   submit ──▶ an earlier success whose outputs are still in the store ──▶ its record
//!     │
//!     └─bounded channel─▶ event loop (one task: queue, active builds) ──start──▶ a task a build ──▶ Builder, Recording
//!     ▼                      ▲                                                    │
//!   Subscription ◀────────── │ ── State, on a watch ◀─────────────────────────────┤
//!                            └────────────ended───────────────────────────────────┘
//!
//!   Queued ──▶ Running (resolving, booting, running, ingesting) ──▶ Done
//!     └── cancelled, or drained ─────────────────────────────────────▲
//! ```
//!
//! A build is queued until the budget has room for it and the disk has enough free space. Then it runs until it is done. A queued build is done without having
//! run if it is cancelled, or if the daemon drains.
//!
//! Equal submissions share one build, of one client or of all (see [`Reuse`]). It is cancelled when its last [`Subscription`] is
//! dropped, unless one of its submissions was detached. A client that cancels it only ends its own interest.
//!
//! Every operation on a build names its client, and `access` decides whether that client may do it.

mod access;
mod active_build;
mod event_loop;
mod operations;
mod presence;
pub(crate) mod queue;
mod reuse;
mod run;
mod standbys;
mod stock;
mod submission;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, io::ErrorKind, sync::Arc, time::Duration};

use cofferdam_castore::{B3Digest, Node, Store, Views, blobservice::Lease};
use cofferdam_rpc::{Client, Clients, Turns};
use tokio::{
    sync::{mpsc, oneshot},
    task::{JoinHandle, spawn_blocking},
};
use tokio_util::sync::CancellationToken;

use self::stock::MachineId;

pub(crate) use access::{Operators, unknown};
pub(crate) use active_build::{ActiveBuild, State, Subscription};
pub(crate) use operations::{ClientUsage, Found, Listed};
pub(crate) use reuse::Reuse;
pub(crate) use stock::StockBounds;
pub(crate) use submission::{Submission, Submitted};

use crate::{
    build::{BuildError, Builder, ExecutorError, News, Options, failure::Failure},
    disk::Disk,
    provenance::Signer,
    quota,
    records::{BuildId, Machine, Outcome, Record, Records, Status},
    request::Admitted,
    scheduler::queue::{Bounds, Budget, Load, Need},
    telemetry::{Metrics, Traces},
    tenants::Tenants,
};

/// Messages that wait for the event loop. The sender of one more waits.
const BUFFERED_MESSAGES: usize = 64;

/// Most questions of clients that are worked on at a time: requests that are decoded, messages to the event loop, records and
/// pieces of logs that are read.
const MAX_QUESTIONS: usize = 16;

/// Most trees of directories that are read at a time: a build's inputs, or the outputs of an earlier success.
const MAX_TREES: usize = 8;

/// Settings of the scheduler.
#[derive(Debug, Clone)]
pub(crate) struct SchedulerSettings {
    /// Resources for all running builds together.
    pub budget: Budget,
    /// How many builds may wait.
    pub bounds: Bounds,
    /// How long running builds get to finish when the daemon drains.
    pub drain_timeout: Duration,
    /// Which submissions share a build or its result.
    pub reuse: Reuse,
    /// The stock of standby machines.
    pub standby: StandbySettings,
}

/// Settings of the stock of standby machines.
#[derive(Debug, Clone, Default)]
pub(crate) struct StandbySettings {
    /// Its bounds.
    pub bounds: StockBounds,
    /// The options of a build that asks for nothing. Its shape is the one in stock before there was a build.
    pub first: Options,
}

/// The scheduler's collaborators.
pub(crate) struct Backend {
    /// The store of the outputs.
    pub store: Store,
    /// What clients see of it.
    pub views: Views,
    /// Runs the builds.
    pub builder: Arc<Builder>,
    /// The records of all builds.
    pub records: Records,
    /// The VMM that runs the builds, for their records.
    pub machine: Machine,
    /// Who may do everything with every build.
    pub operators: Operators,
    /// What each client may have.
    pub tenants: Tenants,
    /// Signs what the builds have made.
    pub signer: Signer,
    /// The file systems that builds write to.
    pub disk: Arc<Disk>,
    /// Counts builds.
    pub metrics: Arc<Metrics>,
    /// The collector of the builds' spans.
    pub traces: Option<Traces>,
}

enum Message {
    Submit(Box<Submission<Admitted>>, Prepared, oneshot::Sender<Result<Subscription, Failure>>),
    Find(BuildId, Client, oneshot::Sender<Option<Subscription>>),
    /// A client doesn't wait for a build any longer.
    Leave(BuildId, Client, oneshot::Sender<Option<()>>),
    List(oneshot::Sender<Vec<Arc<ActiveBuild>>>),
    /// What running builds have, by client.
    Running(oneshot::Sender<BTreeMap<Client, Load>>),
    /// A running build doesn't need so many bytes of its memory.
    Resolved(BuildId, u64),
    /// A build's request has gone to its guest.
    Runs(BuildId),
    Ended(BuildId),
    /// News of a standby machine.
    Standby(MachineId, News),
}

/// What is found out about a submission before it is queued.
#[derive(Debug)]
struct Prepared {
    /// The digest of its build's environment.
    environment: B3Digest,
    /// Its key in this environment.
    key: B3Digest,
    /// Its build's share of the budget.
    need: Need,
    /// The outputs that its build must make again, in the request's order.
    expected: Option<Vec<Node>>,
    /// Keeps its inputs in the store.
    lease: Lease,
}

/// A handle to the scheduler.
#[derive(Clone)]
pub(crate) struct Scheduler {
    messages: mpsc::Sender<Message>,
    backend: Arc<Backend>,
    questions: Turns,
    trees: Turns,
    reuse: Reuse,
}

impl Scheduler {
    /// Starts the scheduler. Its task ends when `drain` is cancelled and all builds have ended. Builds that exceed the drain
    /// timeout are cancelled.
    pub(crate) fn start(
        backend: Backend,
        settings: SchedulerSettings,
        drain: CancellationToken,
    ) -> (Self, JoinHandle<()>) {
        let (messages, inbox) = mpsc::channel(BUFFERED_MESSAGES);
        let clients = backend.tenants.clients();
        let (questions, trees) = (Turns::new(MAX_QUESTIONS, clients), Turns::new(MAX_TREES, clients));
        let scheduler = Self { messages, backend: Arc::new(backend), questions, trees, reuse: settings.reuse };
        let event_loop = event_loop::EventLoop::new(scheduler.clone(), settings);
        (scheduler, tokio::spawn(event_loop.run(inbox, drain)))
    }

    /// Starts a build, joins an equal active one, or returns an earlier success.
    ///
    /// # Errors
    ///
    /// The build is refused: this host can't build it, it is too large for the budget, the queue is full, or the daemon
    /// drains.
    pub(crate) async fn submit(&self, submission: Submission) -> Result<Submitted, Failure> {
        let client = submission.client.clone();
        let submitted = self.take(submission).await;
        match &submitted {
            Ok(Submitted::Earlier { record, .. }) => {
                self.backend.metrics.reused();
                tracing::info!(build = %record.id, %client, "answered from a record");
            }
            Ok(Submitted::Active(subscription)) if subscription.joined => {
                self.backend.metrics.joined();
                tracing::info!(build = %subscription.build.id(), %client, "joined");
            }
            Ok(Submitted::Active(_)) => {}
            Err(failure) => self.refused(&client, failure),
        }
        submitted
    }

    /// Who is let in, and everyone's share.
    pub(crate) fn clients(&self) -> &Clients {
        self.backend.tenants.clients()
    }

    /// Does a client's work that may block when it is the client's turn.
    ///
    /// # Errors
    ///
    /// The work panicked.
    pub(crate) async fn work<T: Send + 'static>(
        &self,
        client: &Client,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Failure> {
        let turn = self.questions.line(client).turn().await;
        let worked = spawn_blocking(move || {
            let _turn = turn;
            work()
        });
        worked.await.map_err(|_| Failure::executor("host", "the server failed at this request"))
    }

    /// Counts and logs a refused request.
    pub(crate) fn refused(&self, client: &Client, failure: &Failure) {
        self.backend.metrics.refused(failure);
        tracing::info!(%client, reason = failure.reason, why = failure.chain(), "refused");
    }

    async fn take(&self, submission: Submission) -> Result<Submitted, Failure> {
        let submission = submission.admitted_by(&self.backend.builder)?;
        let client = submission.client.clone();
        let is_blind = self.is_blind(&submission).await;
        let (scheduler, theirs) = (self.clone(), submission);
        let prepare = move || scheduler.prepare(&theirs, is_blind).map(|prepared| (theirs, prepared));
        let (submission, (mut prepared, earlier)) = self.work(&client, prepare).await??;
        if let Some(id) = submission.compare_with {
            prepared.expected = Some(self.expected(&submission, id).await?);
        }
        if let Some(record) = earlier {
            let turn = self.trees.line(&client).turn().await;
            if let Some(record) = reuse::answer(&self.backend, &submission, record).await {
                let is_visible = self.backend.operators.let_see(&client, &record);
                return Ok(Submitted::Earlier { record: Box::new(record), is_visible });
            }
            drop(turn);
            let (backend, inputs) = (Arc::clone(&self.backend), submission.inputs());
            prepared.lease = self.work(&client, move || lease(&backend, &inputs)).await??;
        }
        self.check_quota(&client)?;
        let answer = self.ask(&client, |reply| Message::Submit(Box::new(submission), prepared, reply)).await;
        answer.unwrap_or_else(|| Err(draining())).map(Submitted::Active)
    }

    /// A client at its quota starts no build.
    fn check_quota(&self, client: &Client) -> Result<(), Failure> {
        let Backend { views, tenants, .. } = &*self.backend;
        quota::check(views, tenants, client, 0).map_err(|error| match error.kind() {
            ErrorKind::QuotaExceeded => Failure::executor("quota", error.to_string()),
            _ => Failure::executor_because("store", "what the client has in the store can't be read", &error),
        })
    }

    /// The outputs of an earlier build of an equal request.
    async fn expected(&self, submission: &Submission<Admitted>, id: BuildId) -> Result<Vec<Node>, Failure> {
        let wrong = |why: &str| Failure::wrong("not_comparable", format!("build {id} can't be compared with: {why}"));
        let Found::Ended(record) = self.find(&submission.client, id).await? else {
            return Err(wrong("it has not ended").advised("wait for its end"));
        };
        if record.request_digest != submission.digest {
            return Err(wrong("it was asked for by another request"));
        }
        if record.status() != Status::Built {
            return Err(wrong("it has failed"));
        }
        let _turn = self.trees.line(&submission.client).turn().await;
        match reuse::complete(&self.backend, &submission.request, *record).await.and_then(|record| record.outcome) {
            Some(Outcome::Built(outputs)) => Ok(outputs.into_iter().map(|output| output.node).collect()),
            _ => Err(wrong("the store has lost its outputs").advised("build it anew, and compare with that")),
        }
    }

    /// A client that doesn't see all inputs of its request must not learn from others' builds what they hold: its build is equal
    /// to no other, and fails.
    async fn is_blind(&self, submission: &Submission<Admitted>) -> bool {
        let shares = self.reuse == Reuse::Shared && self.backend.views.are_divided();
        if !shares {
            return false;
        }
        let _turn = self.trees.line(&submission.client).turn().await;
        !reuse::sees_inputs(&self.backend.views, submission).await
    }

    /// What a submission needs before it is queued. Also an earlier success that may answer it; then the inputs aren't leased yet.
    /// Blocks.
    fn prepare(
        &self,
        submission: &Submission<Admitted>,
        is_blind: bool,
    ) -> Result<(Prepared, Option<Record>), Failure> {
        let backend = &self.backend;
        let environment = backend.builder.environment();
        let environment =
            environment.map_err(|error| Failure::executor_because("host", "the guest image can't be read", &error))?;
        let network = backend.builder.network(&submission.request, &submission.options);
        let key = match is_blind {
            true => reuse::unequal_key(),
            false => reuse::key(submission, &environment, network, self.reuse),
        };
        let may_be_answered = submission.compare_with.is_none() && !submission.rebuild && self.reuse != Reuse::Off;
        let earlier = may_be_answered.then(|| reuse::earlier(backend, &key)).flatten();
        let lease = match earlier {
            Some(_) => Lease::default(),
            None => lease(backend, &submission.inputs())?,
        };
        let need = submission.need(&backend.builder);
        Ok((Prepared { environment, key, need, expected: None, lease }, earlier))
    }

    /// Asks the event loop when it is the client's turn, so that the messages of others are few.
    async fn ask<T>(&self, client: &Client, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Option<T> {
        let _turn = self.questions.line(client).turn().await;
        self.tell(message).await
    }

    async fn tell<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.messages.send(message(reply)).await.ok()?;
        answer.await.ok()
    }
}

/// Keeps a build's inputs in the store while it waits. Blocks.
fn lease(backend: &Backend, inputs: &[Node]) -> Result<Lease, Failure> {
    backend.store.blobs.lease(inputs).map_err(|error| (&BuildError::Executor(ExecutorError::Store(error))).into())
}

fn draining() -> Failure {
    Failure::executor("draining", "the daemon is shutting down and takes no builds").advised("try again, or elsewhere")
}
