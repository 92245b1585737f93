//! A build that waits or runs, and its subscriptions.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{Arc, OnceLock},
};

use cofferdam_castore::{B3Digest, Node};
use cofferdam_protocol::Sample;
use cofferdam_rpc::{Client, Line, MemoryPermit};
use opentelemetry::Context;
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::queue::Waiting;
use crate::{
    build::{BuildError, ExecutorError, Phase, Terminal, failure::Failure},
    network::Connection,
    records::{BuildId, Outcome, Record, Recording},
    request::{Admitted, OutputOrder},
};

/// The state of a build.
#[derive(Debug, Clone)]
pub(crate) enum State {
    /// It waits in the queue.
    Queued {
        /// The number of builds before it.
        position: u64,
        /// What it waits for.
        waiting_for: Waiting,
    },
    /// It runs.
    Running {
        /// The phase that it is in.
        phase: Phase,
        /// The latest sample of its command's resource usage.
        sample: Option<Sample>,
        /// Why it failed, while it waits for a terminal for its shell; empty if it waits for one for its command.
        shell: Option<Arc<str>>,
    },
    /// It has ended.
    Done(Arc<Record>),
}

/// A build that waits, runs or has just ended.
pub(crate) struct ActiveBuild {
    pub(super) request: Admitted,
    /// Builds with equal keys can replace each other.
    pub(super) key: B3Digest,
    /// The outputs that it must make again, in the request's order.
    pub(super) expected: Option<Vec<Node>>,
    pub(super) recording: Recording,
    /// Those whose build it is.
    pub(super) tenants: Mutex<Tenants>,
    /// Takes the terminal that the build waits for.
    pub(super) shell: Mutex<Option<oneshot::Sender<Terminal>>>,
    /// Why the log ended before the build.
    pub(super) log_failure: OnceLock<Failure>,
    pub(super) state: watch::Receiver<State>,
    pub(super) cancel: CancellationToken,
    /// Where it waits for its turn to read its inputs' directories.
    pub(super) line: Line,
    pub(super) context: Context,
    pub(super) _memory: MemoryPermit,
}

impl fmt::Debug for ActiveBuild {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ActiveBuild").field("id", &self.id()).finish_non_exhaustive()
    }
}

impl ActiveBuild {
    /// The build's id.
    pub(crate) fn id(&self) -> BuildId {
        self.recording.id()
    }

    /// Its record as it stands.
    pub(crate) fn record(&self) -> Record {
        self.recording.record()
    }

    /// Its state, and each change of it.
    pub(crate) fn state(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// The number of its connections on record, and each change of it.
    pub(crate) fn connected(&self) -> watch::Receiver<usize> {
        self.recording.connected()
    }

    /// Its connections on record without so many first ones.
    pub(crate) fn connections_after(&self, first: usize) -> Vec<Connection> {
        self.recording.connections_after(first)
    }

    /// Takes in a client whose submission is equal. Returns `false` if it is too late.
    pub(super) fn join(&self, client: &Client) -> bool {
        let name = client.to_string();
        let mut tenants = self.tenants.lock();
        if tenants.are_final {
            return false;
        }
        self.recording.join(&name);
        if name != tenants.owner {
            tenants.others.insert(name);
        }
        true
    }

    /// Lets nobody join any more, and returns those who have.
    pub(super) fn close(&self) -> BTreeSet<String> {
        let mut tenants = self.tenants.lock();
        tenants.are_final = true;
        tenants.others.clone()
    }

    /// Lends a terminal to the build. Returns `false` if the build doesn't wait for one.
    pub(super) fn lend(&self, terminal: Terminal) -> bool {
        self.shell.lock().take().is_some_and(|shell| shell.send(terminal).is_ok())
    }
}

/// The clients whose build it is.
#[derive(Debug)]
pub(super) struct Tenants {
    /// The first one.
    pub(super) owner: String,
    /// Those that have joined.
    pub(super) others: BTreeSet<String>,
    /// Whether nobody can join any more: what was made has been granted to these.
    pub(super) are_final: bool,
}

/// A client's wait for a build. The build is cancelled when its last subscription is dropped.
#[derive(Debug, Clone)]
pub(crate) struct Subscription {
    /// The build.
    pub build: Arc<ActiveBuild>,
    /// Whether the client joined a build that another submission began.
    pub joined: bool,
    /// The client's order of the outputs. `None` for the order of the request that began the build.
    pub(super) order: Option<OutputOrder>,
    pub(super) interest: Arc<Interest>,
}

impl Subscription {
    /// Waits for the build's end.
    ///
    /// # Errors
    ///
    /// The build's task has panicked.
    pub(crate) async fn done(&self) -> Result<Arc<Record>, Failure> {
        let mut state = self.build.state();
        let done = tokio::select! {
            biased;
            done = state.wait_for(|state| matches!(state, State::Done(_))) => done,
            record = self.left() => return Ok(record),
        };
        match done.as_deref() {
            Ok(State::Done(record)) => Ok(self.arranged(record)),
            _ => Err(Failure::executor("host", "the build's task panicked")),
        }
    }

    /// Waits until the client has cancelled the build while others wait for it. Returns the record as if the build had been
    /// cancelled.
    pub(crate) async fn left(&self) -> Arc<Record> {
        self.interest.ended.cancelled().await;
        let outcome = Some(Outcome::Failed((&BuildError::Executor(ExecutorError::Interrupted)).into()));
        Arc::new(Record { outcome, ..self.build.record() })
    }

    /// The record with its outputs in this client's order.
    pub(crate) fn arranged(&self, record: &Arc<Record>) -> Arc<Record> {
        match &self.order {
            Some(order) if *order != record.output_order => {
                arranged(Record::clone(record), order).map_or_else(|| Arc::clone(record), Arc::new)
            }
            _ => Arc::clone(record),
        }
    }
}

/// A record with its outputs in this order. `None` if it has other outputs.
pub(super) fn arranged(mut record: Record, order: &OutputOrder) -> Option<Record> {
    if let Some(Outcome::Built(outputs)) = &mut record.outcome {
        *outputs = order.arrange(outputs, &record.output_order)?;
        record.output_order = order.clone();
    }
    Some(record)
}

/// Shared by all subscriptions of one client to a build.
#[derive(Debug)]
pub(super) struct Interest {
    /// The client waits no longer, though others do.
    pub(super) ended: CancellationToken,
    pub(super) subscribers: Arc<Subscribers>,
}

/// Shared by all interests in a build.
#[derive(Debug)]
pub(super) struct Subscribers(pub(super) CancellationToken);

impl Drop for Subscribers {
    fn drop(&mut self) {
        self.0.cancel();
    }
}
