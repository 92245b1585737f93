//! The operations of the worker protocol that build.

use std::io::{Read, Write};

use cofferdam_nix::{
    Derivation, StorePath,
    protocol::{BuildResult, Message, Status},
};

use super::{
    building::{self, Told, ended, failed},
    builds::Builds,
    session::{Session, Stop},
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

    /// Builds a derivation, and tells the client how it goes.
    fn build(&mut self, path: &StorePath, derivation: &Derivation) -> Result<BuildResult, Stop> {
        let (text, name, version) = (format!("building '{path}'"), path.to_string(), self.version);
        let Self { tenant, builds, writer, .. } = self;
        building::build(tenant, builds, path, derivation, &mut |told| {
            let message = match &told {
                Told::Begun => Message::StartBuild { activity: ACTIVITY, text: &text, derivation: &name },
                Told::Line(line) => Message::LogLine { activity: ACTIVITY, line },
                Told::Waits(text) => Message::Next(text),
                Told::Ended => Message::StopBuild { activity: ACTIVITY },
            };
            message.write(writer, version)?;
            Ok(writer.0.flush()?)
        })
    }
}
