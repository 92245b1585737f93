//! The operation that builds one derivation.

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use cofferdam_nix::{
    Derivation, StorePath,
    protocol::{BuildResult, Message, Status},
};

use super::{
    builds::{Builds, Lines, News},
    outputs::{self, Rejected},
    request::Prepared,
    session::{Session, Stop},
};
use crate::{
    build::failure::{Failure, FailureKind},
    records::{Outcome, Record},
    scheduler::queue::Waiting,
};

/// The number of the only activity that a connection has at a time.
const ACTIVITY: u64 = 1;

impl<B: Builds, R: Read, W: Write> Session<B, R, W> {
    pub(super) fn build_derivation(&mut self) -> Result<(), Stop> {
        let path = self.reader.path("the derivation's path")?;
        let derivation = Derivation::read(&mut self.reader)?;
        let mode = self.reader.integer()?;
        let result = match mode {
            0 => self.build(&path, &derivation)?,
            _ => failed(Status::MiscFailure, format!("the build mode must be 0, not {mode}: nothing is repaired here")),
        };
        let version = self.version;
        Ok(result.write(self.answer()?, version)?)
    }

    pub(super) fn build_paths(&mut self) -> Result<(), Stop> {
        for (target, result) in self.realise()? {
            if result.status != Status::AlreadyValid {
                return Err(Stop::Refused(format!("{target}: {}", result.message)));
            }
        }
        Ok(self.answer()?.integer(1_u64)?)
    }

    pub(super) fn build_paths_with_results(&mut self) -> Result<(), Stop> {
        let (results, version) = (self.realise()?, self.version);
        let writer = self.answer()?;
        writer.integer(results.len() as u64)?;
        for (target, result) in results {
            writer.text(target)?;
            result.write(writer, version)?;
        }
        Ok(())
    }

    /// Reads paths that are to be there, and looks for them.
    fn realise(&mut self) -> Result<Vec<(String, BuildResult)>, Stop> {
        let targets = self.reader.texts("the paths to build")?;
        let _mode = self.reader.integer()?;
        let mut results = Vec::new();
        for target in targets {
            let result = match StorePath::parse(&target) {
                Ok(path) if self.tenant.get(&path)?.is_some() => ended(Status::AlreadyValid),
                Ok(path) => failed(
                    Status::MiscFailure,
                    format!("path '{path}' is not valid, and is not fetched from elsewhere"),
                ),
                Err(_) => {
                    failed(Status::MiscFailure, "the derivation must be built by a client's own store".to_owned())
                }
            };
            results.push((target, result));
        }
        Ok(results)
    }

    fn build(&mut self, path: &StorePath, derivation: &Derivation) -> Result<BuildResult, Stop> {
        let misc = |text| Ok(failed(Status::MiscFailure, text));
        let mut prepared = match Prepared::new(path, derivation) {
            Ok(prepared) => prepared,
            Err(rule) => return misc(format!("{path}: {rule}")),
        };
        let outputs: BTreeSet<_> = prepared.outputs.keys().map(|path| (*path).clone()).collect();
        if self.tenant.valid(&outputs)? == outputs {
            return Ok(ended(Status::AlreadyValid));
        }
        let nix = &self.tenant.nix;
        prepared.inputs = nix.paths.closure(&self.tenant.client, &self.tenant.store(), &derivation.input_sources)?;
        if let Some(missing) = derivation.input_sources.iter().find(|input| !prepared.inputs.contains_key(input)) {
            return misc(format!("dependency '{missing}' of '{path}' is not valid here"));
        }
        let request = match prepared.request(self.builds.cpus()) {
            Ok(request) => request,
            Err(rule) => return misc(format!("{path}: {rule}")),
        };
        let (started, text, derivation) = (SystemTime::now(), format!("building '{path}'"), path.to_string());
        self.say(&Message::StartBuild { activity: ACTIVITY, text: &text, derivation: &derivation })?;
        let (mut lines, version) = (Lines::default(), self.version);
        let Self { builds, writer, .. } = self;
        let mut say = |message: Message<'_>| -> Result<(), Stop> {
            message.write(writer, version)?;
            Ok(writer.0.flush()?)
        };
        let built = builds.build(request, &mut |news| match news {
            News::Log(bytes) => {
                lines.add(&bytes).iter().try_for_each(|line| say(Message::LogLine { activity: ACTIVITY, line }))
            }
            // It starts at once.
            News::Queued { position: 0, waiting_for: Waiting::Turn } => Ok(()),
            News::Queued { position, waiting_for } => say(Message::Next(&format!(
                "{path} waits for {}, with {position} builds before it\n",
                waiting_for.word()
            ))),
        })?;
        if let Some(line) = lines.rest() {
            self.say(&Message::LogLine { activity: ACTIVITY, line: &line })?;
        }
        let result = self.finish(&prepared, built)?;
        self.say(&Message::StopBuild { activity: ACTIVITY })?;
        Ok(BuildResult { started: seconds(started), stopped: seconds(SystemTime::now()), ..result })
    }

    /// Registers what a build made.
    fn finish(&self, prepared: &Prepared<'_>, built: Result<Arc<Record>, Failure>) -> Result<BuildResult, Stop> {
        let path = prepared.path;
        let record = match built {
            Ok(record) => record,
            Err(failure) => return Ok(refused(path, &failure)),
        };
        let cpu_us = record.usage.as_ref().map(|usage| (usage.user_us, usage.system_us));
        let made = match &record.outcome {
            Some(Outcome::Built(outputs)) => outputs,
            Some(Outcome::Failed(failure)) => return Ok(BuildResult { cpu_us, ..refused(path, failure) }),
            None => {
                return Ok(failed(Status::TransientFailure, format!("the end of the build of {path} is not known")));
            }
        };
        let nix = &self.tenant.nix;
        match outputs::describe(&self.tenant.store(), prepared, made) {
            Ok(paths) => {
                nix.paths.register(&self.tenant.client, &paths)?;
                Ok(BuildResult { cpu_us, ..ended(Status::Built) })
            }
            Err(Rejected::Output(text)) => Ok(failed(Status::OutputRejected, text)),
            Err(Rejected::Stop(stop)) => Err(stop),
        }
    }
}

fn ended(status: Status) -> BuildResult {
    BuildResult { status, message: String::new(), started: 0, stopped: 0, cpu_us: None, outputs: Vec::new() }
}

fn failed(status: Status, message: String) -> BuildResult {
    BuildResult { message, ..ended(status) }
}

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
