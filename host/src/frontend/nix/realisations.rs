//! What outputs have become whose paths follow from their contents, and the operations on it.

use std::io::{Read, Write};

use cofferdam_nix::{Modulo, OutputId, Realisation, StorePath, protocol::Version};

use super::{
    add::check_signatures,
    builds::Builds,
    session::{Session, Stop, Tenant},
};

/// Before this version a realisation has no more than a path.
const JSON_SINCE: Version = Version::minor(31);

impl Tenant {
    /// What an output has become, if its path is valid.
    pub(super) fn realisation(&self, id: &OutputId) -> Result<Option<Realisation>, Stop> {
        let Some(found) = self.nix.paths.realisation(&self.client, id)? else { return Ok(None) };
        Ok(self.get(&found.path)?.is_some().then_some(found))
    }

    /// Signs and remembers what outputs of a derivation were built to.
    pub(super) fn realise<'a>(
        &self,
        modulo: &Modulo,
        outputs: impl IntoIterator<Item = (&'a str, StorePath)>,
    ) -> Result<Vec<Realisation>, Stop> {
        let realised = outputs.into_iter().map(|(output, path)| {
            let mut realisation = Realisation::new(modulo.output_id(output), path);
            self.nix.keys.sign_realisation(&mut realisation);
            realisation
        });
        let realised: Vec<_> = realised.collect();
        self.nix.paths.realise(&self.client, &realised)?;
        Ok(realised)
    }

    /// Takes a client's word for what an output has become, or a signature where that isn't enough.
    fn take_realisation(&self, mut realisation: Realisation) -> Result<(), Stop> {
        let Realisation { id, path, .. } = &realisation;
        let keys = &self.nix.keys;
        if keys.required && !keys.trust_realisation(&realisation) {
            let text = format!("cannot register realisation '{id}' because it lacks a signature by a trusted key");
            return Err(Stop::Refused(text));
        }
        self.require(path)?;
        if let Some(known) = self.realisation(id)? {
            if known.path != *path {
                return Err(Stop::Refused(format!(
                    "'{id}' must stay '{}', as it is here already, not '{path}'",
                    known.path
                )));
            }
            // They sign what that one depends on, too.
            if known.dependencies == realisation.dependencies {
                realisation.signatures.extend(known.signatures);
            }
        }
        check_signatures(&format!("realisation '{}'", realisation.id), &realisation.signatures)?;
        Ok(self.nix.paths.realise(&self.client, &[realisation])?)
    }
}

impl<B: Builds, R: Read, W: Write> Session<B, R, W> {
    pub(super) fn register_drv_output(&mut self) -> Result<(), Stop> {
        let realisation = if self.version < JSON_SINCE {
            let (id, path) = (self.reader.text("the output")?, self.reader.text("the output's path")?);
            id.parse::<OutputId>().and_then(|id| {
                let path = StorePath::from_base_name(&path).map_err(|error| format!("has a path that {error}"));
                Ok(Realisation::new(id, path?))
            })
        } else {
            Realisation::from_json(&self.reader.text("the realisation")?)
        };
        let realisation = realisation.map_err(|rule| Stop::Refused(format!("the realisation {rule}")))?;
        self.tenant.take_realisation(realisation)?;
        self.answer().map(drop)
    }

    pub(super) fn query_realisation(&mut self) -> Result<(), Stop> {
        let id = self.reader.text("the output")?;
        let id = id.parse::<OutputId>().map_err(|rule| Stop::Refused(format!("the output {rule}")))?;
        let (found, version) = (self.tenant.realisation(&id)?, self.version);
        let writer = self.answer()?;
        writer.integer(found.is_some())?;
        match found {
            None => Ok(()),
            Some(found) if version < JSON_SINCE => Ok(writer.text(found.path)?),
            Some(found) => Ok(writer.text(found.to_json())?),
        }
    }
}
