//! One derivation, from its inputs to its outputs, whatever the protocol.

use std::{
    cell::Cell,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use cofferdam_nix::{
    Derivation, Realisation, StorePath,
    protocol::{BuildResult, Status},
};

use super::{
    builds::{Builds, Lines, News},
    content::SelfHash,
    outputs::{self, Rejected},
    request::Prepared,
    session::{Stop, Tenant},
};
use crate::{
    build::failure::{Failure, FailureKind},
    records::{Outcome, Record},
    scheduler::queue::Waiting,
};

/// What a client is told of a build before its result.
pub(super) enum Told<'a> {
    /// It has been asked for.
    Begun,
    /// A line of its log, without its end.
    Line(&'a [u8]),
    /// A line for the user: why it doesn't run yet, or that it still does.
    Notice(String),
    /// It has ended.
    Ended,
}

/// What is to be built.
#[derive(Debug, Clone, Copy)]
pub(super) struct Job<'a> {
    /// The derivation's path.
    pub(super) path: &'a StorePath,
    /// The derivation, whose inputs are paths.
    pub(super) derivation: &'a Derivation,
    /// The derivation whose log this is for the client.
    pub(super) logged_as: &'a StorePath,
    /// How the client computes content addresses.
    pub(super) self_hash: SelfHash,
}

/// Builds a derivation for a client.
///
/// # Errors
///
/// The client has gone, or its paths can't be read or registered. Everything else is in the result.
pub(super) fn build(
    tenant: &Tenant,
    builds: &impl Builds,
    job: &Job<'_>,
    tell: &mut dyn FnMut(Told<'_>) -> Result<(), Stop>,
) -> Result<BuildResult, Stop> {
    let Job { path, derivation, .. } = *job;
    let misc = |text| Ok(failed(Status::MiscFailure, text));
    let mut prepared = match Prepared::new(path, derivation) {
        Ok(prepared) => prepared,
        Err(rule) => return misc(format!("{path}: {rule}")),
    };
    if let Some(outputs) = there(tenant, &prepared)? {
        return Ok(BuildResult { outputs, ..ended(Status::AlreadyValid) });
    }
    prepared.inputs = tenant.closure(&derivation.input_sources)?;
    if let Some(missing) = derivation.input_sources.iter().find(|input| !prepared.inputs.contains_key(input)) {
        return misc(format!("dependency '{missing}' of '{path}' is not valid here"));
    }
    let request = match prepared.request(builds.cpus(), &tenant.nix.impure_env) {
        Ok(request) => request,
        Err(rule) => return misc(format!("{path}: {rule}")),
    };
    let started = SystemTime::now();
    let (begun, heard) = (Instant::now(), Cell::new(Instant::now()));
    let mut tell = |told: Told<'_>| {
        heard.set(Instant::now());
        tell(told)
    };
    tell(Told::Begun)?;
    let mut lines = Lines::default();
    let built = builds.build(request, &mut |news| {
        match news {
            News::Log(bytes) => lines.add(&bytes).iter().try_for_each(|line| tell(Told::Line(line)))?,
            // It starts at once.
            News::Queued { position: 0, waiting_for: Waiting::Turn } | News::Quiet => {}
            News::Queued { position, waiting_for } => {
                let text = format!("{path} waits for {}, with {position} builds before it\n", waiting_for.word());
                tell(Told::Notice(text))?;
            }
        }
        if heard.get().elapsed() < tenant.nix.keep_alive {
            return Ok(());
        }
        tell(Told::Notice(format!("{path} is not done after {} s\n", begun.elapsed().as_secs())))
    })?;
    if let Some(line) = lines.rest() {
        tell(Told::Line(&line))?;
    }
    let result = finish(tenant, job, &prepared, built)?;
    tell(Told::Ended)?;
    Ok(BuildResult { started: seconds(started), stopped: seconds(SystemTime::now()), ..result })
}

/// What the outputs of a derivation have become, if they are all there. Nothing needs to be said of outputs with known paths.
fn there(tenant: &Tenant, prepared: &Prepared<'_>) -> Result<Option<Vec<Realisation>>, Stop> {
    let Some(modulo) = prepared.modulo() else {
        let outputs = prepared.outputs.keys().cloned().collect();
        return Ok((tenant.valid(&outputs)? == outputs).then(Vec::new));
    };
    prepared.outputs.values().map(|(output, _)| tenant.realisation(&modulo.output_id(output))).collect()
}

/// Registers what a build made.
fn finish(
    tenant: &Tenant,
    job: &Job<'_>,
    prepared: &Prepared<'_>,
    built: Result<Arc<Record>, Failure>,
) -> Result<BuildResult, Stop> {
    let path = prepared.path;
    let record = match built {
        Ok(record) => record,
        Err(failure) => return Ok(refused(path, &failure)),
    };
    if tenant.nix.keep_logs {
        tenant.nix.paths.set_log(&tenant.client, job.logged_as, record.id)?;
    }
    let cpu_us = record.usage.as_ref().map(|usage| (usage.user_us, usage.system_us));
    let made = match &record.outcome {
        Some(Outcome::Built(outputs)) => outputs,
        Some(Outcome::Failed(failure)) => return Ok(BuildResult { cpu_us, ..refused(path, failure) }),
        None => {
            return Ok(failed(Status::TransientFailure, format!("the end of the build of {path} is not known")));
        }
    };
    tenant.keep(made.iter().map(|output| &output.node))?;
    match outputs::describe(&tenant.store(), prepared, made, job.self_hash) {
        Ok(described) => {
            let names: Vec<_> = described.iter().map(|(output, path, _)| (*output, path.clone())).collect();
            let mut paths: Vec<_> = described.into_iter().map(|(_, path, known)| (path, known)).collect();
            for (path, known) in &mut paths {
                known.info.signatures.insert(tenant.nix.keys.sign(path, &known.info));
            }
            tenant.register(&paths)?;
            let outputs = match prepared.modulo() {
                Some(modulo) => tenant.realise(&modulo, names)?,
                None => Vec::new(),
            };
            Ok(BuildResult { cpu_us, outputs, ..ended(Status::Built) })
        }
        Err(Rejected::Output(text)) => Ok(failed(Status::OutputRejected, text)),
        Err(Rejected::Stop(stop)) => Err(stop),
    }
}

/// The result of a build that ended like this.
pub(super) fn ended(status: Status) -> BuildResult {
    BuildResult { status, message: String::new(), started: 0, stopped: 0, cpu_us: None, outputs: Vec::new() }
}

/// The result of a build that failed like this.
pub(super) fn failed(status: Status, message: String) -> BuildResult {
    BuildResult { message, ..ended(status) }
}

/// The result of a build that has none.
fn refused(path: &StorePath, failure: &Failure) -> BuildResult {
    let status = match (failure.kind, failure.reason.as_str()) {
        (FailureKind::BuildFailed, "timeout" | "silence") => Status::TimedOut,
        (FailureKind::BuildFailed, _) => Status::PermanentFailure,
        (FailureKind::RequestWrong, _) => Status::MiscFailure,
        (FailureKind::ExecutorFailed, _) => Status::TransientFailure,
    };
    let mut text = format!("builder for '{path}' failed: {}", failure.chain());
    for advice in failure.hint().into_iter().chain(failure.advice.as_deref()) {
        text = format!("{text}\n{advice}");
    }
    failed(status, text)
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}
