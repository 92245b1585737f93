//! The task of one build.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use cofferdam_castore::{Node, directoryservice::DirectoryMemory};
use cofferdam_protocol::Sample;
use cofferdam_rpc::Turn;
use futures::{FutureExt as _, future::BoxFuture};
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot, watch},
    task::spawn_blocking,
};

use super::{ActiveBuild, Backend, Message, Scheduler, State, standbys::Room};
use crate::{
    build::{
        BuildError, Built, ExecutorError, Observer, Options, Phase, Reason, Standby, StandbyUse, Teardown, Terminal,
    },
    build::{compare, failure::Failure},
    network::Connection,
    outputs::MAX_DIRECTORY_MEMORY_BYTES,
    records::{End, Outcome, Record},
    request::Admitted,
    telemetry::Metrics,
};

/// How long a build waits for its client's terminal.
const TERMINAL_TIMEOUT: Duration = Duration::from_secs(60);

/// What a build starts with.
pub(super) struct Start {
    /// Its standby machine, or why it has none. `None` if this daemon has no stock.
    pub(super) standby: Option<Result<Standby, StandbyUse>>,
    /// Standby machines that give way, and others that are about to end.
    pub(super) room: Room,
}

/// One build, from its place in the queue to its end.
pub(super) async fn run(
    scheduler: Scheduler,
    build: Arc<ActiveBuild>,
    options: Options,
    started: oneshot::Receiver<Result<Start, Failure>>,
    state: watch::Sender<State>,
) {
    let backend = &scheduler.backend;
    let ended = AssertUnwindSafe(run_to_end(backend, &build, &options, started, (&state, &scheduler.messages)))
        .catch_unwind()
        .await;
    let (end, teardown) = match ended {
        Ok(Ok((end, teardown))) => (Ok(end), teardown),
        Ok(Err(failure)) => (Err(failure), None),
        Err(_) => (Err(Failure::executor("host", "the build's task panicked")), None),
    };
    let record = record(&scheduler, &build, end.unwrap_or_else(failed), options.interactive).await;
    backend.metrics.ended(&record);
    let (outcome, reason) = match &record.outcome {
        Some(Outcome::Failed(failure)) => (failure.kind.word(), failure.reason.as_str()),
        _ => ("succeeded", ""),
    };
    let seconds = record.ended.unwrap_or_default().as_secs_f64();
    tracing::info!(build = %record.id, outcome, reason, seconds, log_bytes = record.log.bytes, "ended");
    if let Some(traces) = &backend.traces {
        traces.ended(&record, &build.context);
    }
    state.send_replace(State::Done(Arc::new(record)));
    if let Some(teardown) = teardown {
        teardown.finish().await;
    }
    // If the event loop has ended, there is nothing to free.
    let _ = scheduler.messages.send(Message::Ended(build.id())).await;
}

fn failed(failure: Failure) -> End {
    End { outcome: Outcome::Failed(failure), usage: None, kept: None }
}

/// Records a build's end. If it can't be written to the disk, it is in memory until it can.
async fn record(scheduler: &Scheduler, build: &Arc<ActiveBuild>, end: End, is_interactive: bool) -> Record {
    let (theirs, backend) = (Arc::clone(build), Arc::clone(&scheduler.backend));
    let finish =
        move || theirs.recording.finish_with(end, |record| prove(&backend, &theirs.request, record, is_interactive));
    match spawn_blocking(finish).await {
        Ok(Ok(record)) => return record,
        Ok(Err(error)) => {
            tracing::error!(id = %build.id(), error = &error as &dyn std::error::Error, "can't record a build's end");
        }
        Err(error) => tracing::error!(id = %build.id(), %error, "can't record a build's end"),
    }
    build.recording.record()
}

/// The signed statement of how a build's outputs were made.
fn prove(backend: &Backend, request: &Admitted, record: &Record, is_interactive: bool) -> Option<Vec<u8>> {
    let image = backend.builder.image_digests();
    let image = image.inspect_err(|error| {
        let error: &dyn std::error::Error = error;
        tracing::warn!(id = %record.id, error, "no statement is signed: the guest image can't be read");
    });
    backend.signer.sign(request, record, &image.ok()?, is_interactive)
}

/// Waits for the build's turn and runs it.
async fn run_to_end(
    backend: &Backend,
    build: &Arc<ActiveBuild>,
    options: &Options,
    started: oneshot::Receiver<Result<Start, Failure>>,
    (state, messages): (&watch::Sender<State>, &mpsc::Sender<Message>),
) -> Result<(End, Option<Teardown>), Failure> {
    let Start { standby, room } = tokio::select! {
        biased;
        () = build.cancel.cancelled() => return Err(interrupted()),
        started = started => started.unwrap_or_else(|_| Err(super::draining()))?,
    };
    let standby = match standby {
        // It answers while the record is written.
        Some(Ok(standby)) => Some(standby.take()),
        Some(Err(why)) => {
            build.recording.standby(why);
            None
        }
        None => None,
    };
    let (theirs, machine) = (Arc::clone(build), backend.machine.clone());
    let noted = spawn_blocking(move || theirs.recording.start(machine, &theirs.request.encoded())).await;
    let noted = noted.map_err(|error| Failure::executor("host", error.to_string()))?;
    tracing::info!(build = %build.id(), "started");
    noted.map_err(|error| Failure::executor_because("records", "the build can't be recorded", &error))?;
    room.await;
    let watch = Arc::new(Watch {
        state: state.clone(),
        build: Arc::clone(build),
        inputs_memory_bytes: options.limits.inputs_memory_bytes,
        messages: messages.clone(),
        metrics: Arc::clone(&backend.metrics),
        runtime: Handle::current(),
    });
    let store = backend.views.of(&build.tenants.lock().owner);
    let built = backend.builder.build((&build.request, options), &store, watch, &build.cancel, standby).await;
    let (built, teardown) = match built {
        Ok((built, teardown)) => (Ok(built), Some(teardown)),
        Err(error) => (Err(error), None),
    };
    let compared = match (&built, &build.expected) {
        (Ok(built), Some(expected)) => {
            let made: Vec<_> = built.result.outputs.iter().map(|output| output.node.clone()).collect();
            compare::compare(&backend.store, &build.request.outputs, expected, &made).await
        }
        _ => Ok(()),
    };
    grant(backend, build, &left_by(&built)).await?;
    match (build.log_failure.get(), compared) {
        (Some(failure), _) if built.is_err() => Err(failure.clone()),
        (_, Err(failure)) => Ok((End { outcome: Outcome::Failed(failure), ..End::from(&built) }, teardown)),
        _ => Ok((End::from(&built), teardown)),
    }
}

/// What a build has left in the store.
fn left_by(built: &Result<Built, BuildError>) -> Vec<Node> {
    match built {
        Ok(built) => built.result.outputs.iter().map(|output| output.node.clone()).collect(),
        Err(BuildError::Failed(failed)) => failed.kept.iter().map(|kept| kept.node.clone()).collect(),
        Err(_) => Vec::new(),
    }
}

/// Grants what a build has left to those who have joined it. The owner's grants were made as it was written. It reads within
/// the memory that the build had for these directories.
pub(super) async fn grant(backend: &Backend, build: &ActiveBuild, nodes: &[Node]) -> Result<(), Failure> {
    let memory = DirectoryMemory::limited(MAX_DIRECTORY_MEMORY_BYTES);
    for tenant in build.close() {
        let granted = backend.views.grant(&tenant, nodes, &memory).await;
        granted.map_err(|error| Failure::executor_because("store", "what the build made can't be granted", &error))?;
    }
    Ok(())
}

fn interrupted() -> Failure {
    (&BuildError::Executor(ExecutorError::Interrupted)).into()
}

/// Observes the build for its record and its subscribers.
struct Watch {
    state: watch::Sender<State>,
    build: Arc<ActiveBuild>,
    /// What the build has reserved for its inputs' directories.
    inputs_memory_bytes: u64,
    messages: mpsc::Sender<Message>,
    metrics: Arc<Metrics>,
    runtime: Handle,
}

impl Watch {
    /// Sends a message from any thread.
    fn tell(&self, message: Message) {
        let messages = self.messages.clone();
        // If the event loop has ended, nobody needs to know.
        self.runtime.spawn(async move { messages.send(message).await });
    }
}

impl Observer for Watch {
    fn turn(&self) -> BoxFuture<'_, Option<Turn>> {
        self.build.line.turn().map(Some).boxed()
    }

    fn phase(&self, phase: Phase) {
        self.build.recording.phase(phase);
        self.state.send_replace(State::Running { phase, sample: None, shell: None });
        if phase == Phase::Running {
            self.tell(Message::Runs(self.build.id()));
        }
    }

    fn connection(&self, connection: &Connection) {
        self.metrics.connection(connection);
        self.build.recording.connection(connection);
    }

    fn standby(&self, standby: StandbyUse) {
        self.build.recording.standby(standby);
    }

    fn resolved(&self, memory_bytes: u64) {
        self.tell(Message::Resolved(self.build.id(), self.inputs_memory_bytes.saturating_sub(memory_bytes)));
    }

    fn sample(&self, latest: &Sample) {
        self.build.recording.sample(latest);
        self.state.send_if_modified(|state| match state {
            State::Running { sample, .. } => {
                *sample = Some(*latest);
                true
            }
            _ => false,
        });
    }

    /// Called from the session's own thread, which has nothing else to do.
    fn terminal(&self, failure: Option<&Reason>) -> Option<Terminal> {
        let (lend, lent) = oneshot::channel();
        *self.build.shell.lock() = Some(lend);
        self.state.send_if_modified(|state| match state {
            State::Running { shell, .. } => {
                *shell = Some(failure.map(ToString::to_string).unwrap_or_default().into());
                true
            }
            _ => false,
        });
        self.runtime.block_on(async {
            tokio::select! {
                terminal = lent => terminal.ok(),
                () = self.build.cancel.cancelled() => None,
                () = tokio::time::sleep(TERMINAL_TIMEOUT) => None,
            }
        })
    }

    fn log(&self, bytes: &[u8]) {
        if let Err(error) = self.build.recording.log(bytes) {
            // Better no build than one with an incomplete log.
            let _ = self.build.log_failure.set(Failure::executor_because(
                "log",
                "the build's log can't be written",
                &error,
            ));
            self.build.cancel.cancel();
        }
    }
}
