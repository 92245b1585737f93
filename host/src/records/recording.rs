use std::{
    sync::Arc,
    time::{Instant, SystemTime},
};

use cofferdam_castore::{B3Digest, Node};
use cofferdam_protocol::{Sample, Usage};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{
    BuildId, MAX_REQUEST_BYTES, MAX_UNSAVED, Machine, Outcome, Phase, Record, Sampled, Shared, Unsaved,
    error::Result,
    log::{Form, LogReader, LogWriter, Progress},
    record::LOST,
};
use crate::{
    build::failure::{Failure, shorten},
    build::{BuildError, Built, StandbyUse},
    network::{Connection, RuleMaker, Verdict},
    request::OutputOrder,
};

/// Most clients in [`Record::joined`].
pub(crate) const MAX_JOINED: usize = 256;

/// Most connections in [`Record::connections`].
pub(crate) const MAX_CONNECTIONS: usize = 500;

/// Most of them that were denied before anything was sent.
const MAX_DENIALS: usize = 100;

/// Most outputs whose paths are in a record.
pub(crate) const MAX_OUTPUT_PATHS: usize = 1000;

/// Most samples in a record. When there are so many, every second one goes, and from then on only every second one comes.
pub(crate) const MAX_SAMPLES: usize = 64;

/// Most phases in a record.
const MAX_PHASES: usize = 64;

/// A build at its submission.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// [`crate::request::BuildRequest::digest`].
    pub digest: B3Digest,
    /// See [`Record::environment`].
    pub environment: B3Digest,
    /// The key by which [`super::Records::result_for`] finds its success.
    pub key: B3Digest,
    /// The client that submits it.
    pub client: String,
    /// See [`super::describe`].
    pub description: String,
    /// See [`Record::output_order`].
    pub output_order: OutputOrder,
    /// See [`Record::output_paths`].
    pub output_paths: Vec<String>,
    /// Most bytes of its log to keep.
    pub log_bytes: u64,
    /// See [`Record::secrets`].
    pub secrets: Vec<String>,
}

/// The end of a build.
#[derive(Debug, Clone)]
pub(crate) struct End {
    /// How it ended.
    pub outcome: Outcome,
    /// Its resource usage.
    pub usage: Option<Usage>,
    /// The remains of a failed build, if they were kept.
    pub kept: Option<Node>,
}

impl From<&Result<Built, BuildError>> for End {
    fn from(result: &Result<Built, BuildError>) -> Self {
        let (outcome, usage) = match result {
            Ok(built) => {
                let outputs = built.result.outputs.iter().cloned().map(Into::into).collect();
                (Outcome::Built(outputs), Some(built.usage))
            }
            Err(error) => {
                let (usage, kept) = match error {
                    BuildError::Failed(failed) => (failed.usage, failed.kept.as_ref().map(|kept| kept.node.clone())),
                    _ => (None, None),
                };
                return Self { outcome: Outcome::Failed(Failure::of(error, RuleMaker::Operator)), usage, kept };
            }
        };
        Self { outcome, usage, kept: None }
    }
}

/// The record of an active build. If it is dropped before [`finish`](Self::finish), the build is recorded as lost.
///
/// Its methods block at most for one transaction, or one write to a file.
pub(crate) struct Recording {
    shared: Arc<Shared>,
    live: Arc<Live>,
}

/// The part of an active build's record that is in memory.
pub(super) struct Live {
    begun: Instant,
    pub(super) key: B3Digest,
    record: Mutex<Record>,
    log: Mutex<LogWriter>,
    progress: watch::Sender<Progress>,
    /// The number of connections in the record.
    connected: watch::Sender<usize>,
}

impl Live {
    /// The record as it stands.
    pub(super) fn record(&self) -> Record {
        let mut record = self.record.lock().clone();
        record.log = self.log.lock().log;
        record
    }

    pub(super) fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }
}

impl Recording {
    pub(super) fn new(shared: Arc<Shared>, request: Request) -> Self {
        let created = SystemTime::now();
        let id = shared.ids.next(created);
        let record = Record {
            id,
            request_digest: request.digest,
            environment: request.environment,
            client: shorten(request.client),
            joined: Vec::new(),
            description: shorten(request.description),
            created,
            phases: Vec::new(),
            ended: None,
            machine: None,
            standby: None,
            usage: None,
            log: super::Log::default(),
            output_order: request.output_order,
            output_paths: request.output_paths.into_iter().take(MAX_OUTPUT_PATHS).collect(),
            samples: Vec::new(),
            secrets: request.secrets,
            outcome: None,
            connections: Vec::new(),
            more_connections: 0,
            kept: None,
        };
        let log = LogWriter::new(shared.logs.path(id, Form::Plain), request.log_bytes);
        let (progress, _) = watch::channel(Progress { bytes: 0, ended: false });
        let (begun, record, log) = (Instant::now(), Mutex::new(record), Mutex::new(log));
        let connected = watch::Sender::new(0);
        let live = Arc::new(Live { begun, key: request.key, record, log, progress, connected });
        shared.live.lock().insert(id, live.clone());
        let recording = Self { shared, live };
        recording.phase(Phase::Queued);
        recording
    }

    /// The build's id.
    pub(crate) fn id(&self) -> BuildId {
        self.live.record.lock().id
    }

    /// The record as it stands.
    pub(crate) fn record(&self) -> Record {
        self.live.record()
    }

    /// Makes the record durable before the build starts, so that it is known even if this process is killed. Its encoded request
    /// is kept beside it, if that has at most [`MAX_REQUEST_BYTES`].
    ///
    /// # Errors
    ///
    /// The database can't be written.
    pub(crate) fn start(&self, machine: Machine, request: &[u8]) -> Result<()> {
        let record = {
            let mut record = self.live.record.lock();
            record.machine = Some(machine);
            record.clone()
        };
        let request = if request.len() > MAX_REQUEST_BYTES { &[] } else { request };
        self.shared.database.begin(&record, request)
    }

    /// Records whether the build had a standby machine, and if it hadn't, why.
    pub(crate) fn standby(&self, standby: StandbyUse) {
        self.live.record.lock().standby = Some(standby);
    }

    /// Adds a client to those that have joined.
    pub(crate) fn join(&self, client: &str) {
        let mut record = self.live.record.lock();
        let is_known = record.client == client || record.joined.iter().any(|joined| joined == client);
        if !is_known && record.joined.len() < MAX_JOINED {
            record.joined.push(client.to_owned());
        }
    }

    /// Records a connection that has ended, or was denied.
    pub(crate) fn connection(&self, connection: &Connection) {
        let mut record = self.live.record.lock();
        // A build could hide a connection behind others that were denied.
        let is_denied = |one: &Connection| {
            matches!(one.verdict, Verdict::Denied(_) | Verdict::Failed(_)) && (one.sent, one.received) == (0, 0)
        };
        let denials = record.connections.iter().filter(|one| is_denied(one)).count();
        let has_room = !is_denied(connection) || denials < MAX_DENIALS;
        if has_room && record.connections.len() < MAX_CONNECTIONS {
            record.connections.push(connection.clone());
            self.live.connected.send_replace(record.connections.len());
        } else {
            record.more_connections = record.more_connections.saturating_add(1);
        }
    }

    /// The number of connections in the record, and each change of it.
    pub(crate) fn connected(&self) -> watch::Receiver<usize> {
        self.live.connected.subscribe()
    }

    /// The connections in the record without so many first ones.
    pub(crate) fn connections_after(&self, first: usize) -> Vec<Connection> {
        self.live.record.lock().connections.iter().skip(first).cloned().collect()
    }

    /// Records what the command uses.
    pub(crate) fn sample(&self, sample: &Sample) {
        let mut record = self.live.record.lock();
        let sample = Sampled::from(sample);
        let samples = &mut record.samples;
        // The longest distance is that of the first ones: later ones may have come since the last thinning.
        let distance = samples
            .first_chunk()
            .map_or(0, |[first, second]: &[Sampled; 2]| second.wall_ms.saturating_sub(first.wall_ms));
        let is_due = |last: &Sampled| sample.wall_ms >= last.wall_ms.saturating_add(distance - distance / 4);
        if !samples.last().is_none_or(is_due) {
            return;
        }
        samples.push(sample);
        if samples.len() == MAX_SAMPLES {
            let mut is_kept = false;
            samples.retain(|_| {
                is_kept = !is_kept;
                is_kept
            });
        }
    }

    /// Records the beginning of a phase.
    pub(crate) fn phase(&self, phase: Phase) {
        let mut record = self.live.record.lock();
        if record.phases.len() < MAX_PHASES && record.phases.last().is_none_or(|(latest, _)| *latest != phase) {
            record.phases.push((phase, self.live.begun.elapsed()));
        }
    }

    /// Appends to the log, and wakes its readers without waiting for them.
    ///
    /// # Errors
    ///
    /// The file can't be written. The build should be ended, since its log is incomplete.
    pub(crate) fn log(&self, bytes: &[u8]) -> Result<()> {
        let mut log = self.live.log.lock();
        let appended = log.append(bytes);
        self.live.progress.send_replace(Progress { bytes: log.log.bytes, ended: false });
        appended
    }

    /// A reader of the log, from an offset on.
    ///
    /// # Errors
    ///
    /// The log is shorter.
    pub(crate) fn read_log(&self, offset: u64) -> Result<LogReader> {
        LogReader::new(self.id(), self.shared.logs.clone(), offset, self.live.progress())
    }

    /// Records durably how the build ended, and closes its log. Only the first call counts.
    ///
    /// # Errors
    ///
    /// The database can't be written. That is tried again until this process ends.
    #[cfg(test)]
    pub(crate) fn finish(&self, end: End) -> Result<Record> {
        self.finish_with(end, |_| None)
    }

    /// The same, with a signed statement about the record (see [`crate::provenance`]).
    ///
    /// # Errors
    ///
    /// The database can't be written. That is tried again until this process ends.
    pub(crate) fn finish_with(&self, end: End, prove: impl FnOnce(&Record) -> Option<Vec<u8>>) -> Result<Record> {
        let log = {
            let mut log = self.live.log.lock();
            log.close();
            log.log
        };
        let mut record = self.live.record();
        if record.outcome.is_some() {
            return Ok(record);
        }
        record.log = log;
        record.ended = Some(self.live.begun.elapsed());
        record.outcome = Some(end.outcome);
        record.usage = end.usage;
        record.kept = end.kept;
        // Readers of the record must not wait for the disk.
        let proof = prove(&record);
        let finished = self.shared.finish(&record, &self.live.key, proof.as_deref());
        self.live.record.lock().clone_from(&record);
        let mut unsaved = self.shared.unsaved.lock();
        if finished.is_err() && unsaved.len() < MAX_UNSAVED {
            unsaved.push_back(Unsaved { live: Arc::clone(&self.live), proof });
        } else {
            self.shared.live.lock().remove(&record.id);
        }
        drop(unsaved);
        self.live.progress.send_replace(Progress { bytes: log.bytes, ended: true });
        self.shared.wake();
        finished.map(|()| record)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if self.live.record.lock().outcome.is_some() {
            return;
        }
        let outcome = Outcome::Failed(Failure::executor(LOST, "the build was abandoned before it ended"));
        if let Err(error) = self.finish_with(End { outcome, usage: None, kept: None }, |_| None) {
            tracing::warn!(error = &error as &dyn std::error::Error, "can't record that a build was abandoned");
        }
    }
}
