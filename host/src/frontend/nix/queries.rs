//! Operations that ask for what is known.

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    path::Path,
};

use cofferdam_castore::nar;
use cofferdam_nix::{StorePath, protocol::Version};

use super::{
    builds::Builds,
    session::{Session, Stop, Tenant},
};
use crate::store_paths::Known;

impl Tenant {
    pub(super) fn get(&self, path: &StorePath) -> Result<Option<Known>, Stop> {
        Ok(self.closure(&BTreeSet::from([path.clone()]))?.remove(path))
    }

    pub(super) fn require(&self, path: &StorePath) -> Result<Known, Stop> {
        self.get(path)?.ok_or_else(|| Stop::Refused(format!("path '{path}' is not valid")))
    }

    /// Those of these paths that are valid.
    pub(super) fn valid(&self, paths: &BTreeSet<StorePath>) -> Result<BTreeSet<StorePath>, Stop> {
        let closure = self.closure(paths)?;
        Ok(paths.iter().filter(|path| closure.contains_key(path)).cloned().collect())
    }
}

impl<B: Builds, R: Read, W: Write> Session<B, R, W> {
    pub(super) fn is_valid_path(&mut self) -> Result<(), Stop> {
        let path = self.reader.path("the path")?;
        let is_valid = self.tenant.get(&path)?.is_some();
        Ok(self.answer()?.integer(is_valid)?)
    }

    pub(super) fn ensure_path(&mut self) -> Result<(), Stop> {
        let path = self.reader.path("the path")?;
        self.tenant.require(&path)?;
        Ok(self.answer()?.integer(1_u64)?)
    }

    pub(super) fn add_temp_root(&mut self) -> Result<(), Stop> {
        let path = self.reader.path("the path")?;
        self.tenant.get(&path)?;
        Ok(self.answer()?.integer(1_u64)?)
    }

    /// Limits are the daemon's, so most of the client's options are read and left.
    pub(super) fn set_options(&mut self) -> Result<(), Stop> {
        let _keep_failed = self.reader.integer()?;
        self.keep_going = self.reader.integer()? != 0;
        for _ in 0..10 {
            self.reader.integer()?;
        }
        let _: Vec<_> = self.reader.list("the settings", |reader| {
            Ok((reader.string("a setting's name")?, reader.string("a setting's value")?))
        })?;
        self.answer().map(drop)
    }

    pub(super) fn query_path_info(&mut self) -> Result<(), Stop> {
        let path = self.reader.path("the path")?;
        let known = self.tenant.get(&path)?;
        let writer = self.answer()?;
        writer.integer(known.is_some())?;
        match known {
            Some(known) => Ok(known.info.write(writer)?),
            None => Ok(()),
        }
    }

    pub(super) fn query_path_from_hash_part(&mut self) -> Result<(), Stop> {
        let hash_part = self.reader.text("the hash part")?;
        let Tenant { client, nix, .. } = &self.tenant;
        let path = nix.paths.with_hash_part(client, &self.tenant.store(), &hash_part)?;
        Ok(self.answer()?.optional(path.map(|(path, _)| path))?)
    }

    pub(super) fn query_valid_paths(&mut self) -> Result<(), Stop> {
        let paths = self.reader.paths("the paths")?;
        if self.version >= Version::minor(27) {
            let _substitute = self.reader.boolean("substitute")?;
        }
        let valid = self.tenant.valid(&paths)?;
        Ok(self.answer()?.texts(&valid)?)
    }

    /// Nothing is fetched from elsewhere.
    pub(super) fn query_substitutable_paths(&mut self) -> Result<(), Stop> {
        let _paths = self.reader.paths("the paths")?;
        Ok(self.answer()?.texts([""; 0])?)
    }

    pub(super) fn nar_from_path(&mut self) -> Result<(), Stop> {
        let path = self.reader.path("the path")?;
        let known = self.tenant.require(&path)?;
        self.answer()?;
        let store = &self.tenant.store();
        let written = nar::write(store, &known.node, Path::new(path.base_name()), &mut self.writer.0, &|| false);
        // An archive has no place for an error.
        written.map_err(|error| {
            tracing::warn!(%path, error = &error as &dyn std::error::Error, "can't send a path to Nix");
            Stop::Gone
        })
    }
}
