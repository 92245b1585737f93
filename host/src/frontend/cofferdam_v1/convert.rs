//! Records as `cofferdam.v1` messages.

use std::time::{Duration, SystemTime};

use cofferdam_proto::cofferdam::v1::{
    self as wire, BuildInfo, Done, Queued, Success, Times, build_info, done, failure,
};
use cofferdam_protocol::{Sample, Usage};

use super::super::response;
use crate::{
    build,
    build::failure::{Failure, FailureKind},
    network::Connection,
    records::{Machine, Outcome, Phase, Record, Status},
    scheduler::{ClientUsage, State, queue::Waiting},
};

pub(super) fn queued(position: u64, waiting_for: Waiting) -> Queued {
    let queued = Queued { position, waiting_for: waiting_for.word().to_owned(), ..Queued::default() };
    match waiting_for {
        Waiting::Tenant { running } => Queued { running, ..queued },
        Waiting::Quota { disk_bytes, allowed_bytes } => {
            Queued { disk_bytes, disk_limit_bytes: allowed_bytes, ..queued }
        }
        _ => queued,
    }
}

pub(super) fn client_usage(usage: ClientUsage) -> wire::ClientUsage {
    let ClientUsage { client, stored, running, recorded, allowed } = usage;
    wire::ClientUsage {
        client,
        stored_bytes: stored.map_or(0, |stored| stored.bytes),
        stored_objects: stored.map_or(0, |stored| stored.objects),
        stored_limit_bytes: allowed.stored.unwrap_or(0),
        running: running.builds,
        running_bytes: running.disk_bytes,
        running_limit_bytes: allowed.terms.disk.unwrap_or(0),
        recorded: recorded.records,
        recorded_bytes: recorded.bytes,
        recorded_limit_bytes: allowed.records.unwrap_or(0),
        counts_stored: stored.is_some(),
    }
}

pub(super) fn phase(phase: build::Phase) -> wire::Phase {
    match phase {
        // An event of its own tells it.
        build::Phase::Queued => wire::Phase::Unspecified,
        build::Phase::Resolving => wire::Phase::Resolving,
        build::Phase::Booting => wire::Phase::Booting,
        build::Phase::Running => wire::Phase::Running,
        build::Phase::Ingesting => wire::Phase::Ingesting,
        build::Phase::Keeping => wire::Phase::Keeping,
        build::Phase::Shell => wire::Phase::Shell,
    }
}

pub(super) fn sample(sample: &Sample) -> wire::Sample {
    let Sample { usage, memory_bytes, processes } = *sample;
    wire::Sample {
        wall_us: usage.wall_us,
        user_us: usage.user_us,
        system_us: usage.system_us,
        memory_bytes,
        scratch_bytes: usage.scratch_bytes,
        processes: processes.into(),
    }
}

/// The end of a build that has ended.
pub(super) fn done(record: &Record) -> Done {
    let outcome = match &record.outcome {
        Some(Outcome::Built(outputs)) => done::Outcome::Success(Success {
            response: Some(response(outputs)),
            usage: record.usage.as_ref().map(usage),
            times: Some(times(record)),
        }),
        Some(Outcome::Failed(told)) => done::Outcome::Failure(failed(told)),
        None => done::Outcome::Failure(failed(&Failure::executor("host", "the build's end is not known"))),
    };
    Done { outcome: Some(outcome) }
}

fn failed(told: &Failure) -> wire::Failure {
    let kind = match told.kind {
        FailureKind::BuildFailed => failure::Kind::BuildFailed,
        FailureKind::RequestWrong => failure::Kind::RequestWrong,
        FailureKind::ExecutorFailed => failure::Kind::ExecutorFailed,
    };
    wire::Failure {
        kind: kind.into(),
        reason: told.reason.clone(),
        message: told.message.clone(),
        causes: told.causes.clone(),
        advice: told.advice.as_deref().unwrap_or_default().to_owned(),
        fields: told.fields.iter().map(|(key, value)| (key.clone(), value.to_string())).collect(),
    }
}

fn usage(usage: &Usage) -> wire::Usage {
    wire::Usage {
        wall_us: usage.wall_us,
        user_us: usage.user_us,
        system_us: usage.system_us,
        peak_memory_bytes: usage.peak_memory_bytes,
        scratch_bytes: usage.scratch_bytes,
    }
}

fn times(record: &Record) -> Times {
    let mut times = Times::default();
    for (phase, spent) in record.spans() {
        let spent = u64::try_from((spent.end - spent.start).as_micros()).unwrap_or(u64::MAX);
        match phase {
            Phase::Queued | Phase::Keeping | Phase::Shell => continue,
            Phase::Resolving => times.resolve_us += spent,
            Phase::Booting => times.boot_us += spent,
            Phase::Running => times.run_us += spent,
            Phase::Ingesting => times.ingest_us += spent,
        }
    }
    times
}

/// A build's record as a message, with its state if it is active.
pub(super) fn info(record: &Record, state: Option<&State>) -> BuildInfo {
    let started = record.phases.iter().find(|(phase, _)| *phase != Phase::Queued).map(|(_, at)| *at);
    let at = |since: Option<Duration>| since.map_or(0, |since| unix_ms(record.created + since));
    let machine = record.machine.clone();
    let Machine { vmm, version: vmm_version, accelerator } = machine.unwrap_or_default();
    let mut info = BuildInfo {
        id: record.id.to_string(),
        state: state_of(record, started.is_some()).into(),
        request_digest: record.request_digest.as_slice().to_vec().into(),
        environment_digest: record.environment.as_slice().to_vec().into(),
        client: record.client.clone(),
        command: record.description.clone(),
        submitted_unix_ms: unix_ms(record.created),
        started_unix_ms: at(started),
        ended_unix_ms: at(record.ended),
        vmm,
        vmm_version,
        accelerator,
        standby: record.standby.map_or_else(String::new, |standby| standby.word().to_owned()),
        usage: record.usage.as_ref().map(usage),
        times: record.ended.map(|_| times(record)),
        log_bytes: record.log.bytes,
        log_truncated: record.log.truncated,
        done: record.outcome.is_some().then(|| done(record)),
        connections: record.connections.iter().map(connection).collect(),
        more_connections: record.more_connections,
        secrets: record.secrets.clone(),
        ..BuildInfo::default()
    };
    match state {
        Some(State::Queued { position, waiting_for }) if record.outcome.is_none() => {
            info.queued = Some(queued(*position, *waiting_for));
        }
        Some(State::Running { phase: now, sample: latest, .. }) if record.outcome.is_none() => {
            info.phase = phase(*now).into();
            info.sample = latest.as_ref().map(sample);
        }
        _ => {}
    }
    info
}

pub(super) fn connection(connection: &Connection) -> wire::Connection {
    let Connection { name, address, sent, received, verdict, lacks_rule: _ } = connection;
    wire::Connection {
        name: name.clone().unwrap_or_default(),
        address: address.map(|address| address.to_string()).unwrap_or_default(),
        sent: *sent,
        received: *received,
        verdict: verdict.to_string(),
    }
}

fn state_of(record: &Record, has_started: bool) -> build_info::State {
    match record.status() {
        Status::Built => build_info::State::Succeeded,
        Status::Failed if record.is_lost() => build_info::State::Lost,
        Status::Failed => build_info::State::Failed,
        Status::Unfinished if has_started => build_info::State::Running,
        Status::Unfinished => build_info::State::Queued,
    }
}

fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
