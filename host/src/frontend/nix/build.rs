//! The operations of the worker protocol that build.

use std::io::{Read, Write};

use cofferdam_nix::{
    Derivation, StorePath,
    protocol::{BuildResult, Message, Status, Version},
    wire::Writer,
};

use super::{
    building::{self, Job, Told, failed},
    builds::Builds,
    content::SelfHash,
    session::{Session, Stop},
};

/// The number of the only build of an operation.
const ACTIVITY: u64 = 1;

impl<B: Builds, R: Read, W: Write> Session<B, R, W> {
    pub(super) fn build_derivation(&mut self) -> Result<(), Stop> {
        let path = self.reader.path("the derivation's path")?;
        let derivation = Derivation::read(&mut self.reader)?;
        let mode = self.reader.integer()?;
        self.tenant.nix.keys.check_build(&path, &derivation)?;
        let result = match mode {
            0 => self.build(&path, &derivation)?,
            _ => failed(Status::MiscFailure, format!("the build mode must be 0, not {mode}: nothing is repaired here")),
        };
        let version = self.version;
        Ok(result.write(self.answer()?, version)?)
    }

    /// Builds a derivation, and tells the client how it goes.
    fn build(&mut self, path: &StorePath, derivation: &Derivation) -> Result<BuildResult, Stop> {
        let Self { tenant, builds, writer, version, .. } = self;
        let job = Job { path, derivation, logged_as: path, self_hash: SelfHash::of(*version) };
        building::build(tenant, builds, &job, &mut |told| {
            message(writer, *version, ACTIVITY, path, &told)?;
            Ok(writer.0.flush()?)
        })
    }
}

/// Writes what a client is told of a build, which is this activity of the connection.
pub(super) fn message<W: Write>(
    writer: &mut Writer<W>,
    version: Version,
    activity: u64,
    path: &StorePath,
    told: &Told<'_>,
) -> Result<(), Stop> {
    let message = match told {
        Told::Begun => {
            let (text, derivation) = (&*format!("building '{path}'"), &*path.to_string());
            return Ok(Message::StartBuild { activity, text, derivation }.write(writer, version)?);
        }
        Told::Line(line) => Message::LogLine { activity, line },
        Told::Notice(text) => Message::Next(text),
        Told::Ended => Message::StopBuild { activity },
    };
    Ok(message.write(writer, version)?)
}
