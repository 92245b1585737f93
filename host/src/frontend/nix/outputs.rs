//! What a build made, as store paths.

use std::{collections::BTreeSet, path::Path};

use cofferdam_castore::{
    Node, Store,
    nar::{self, NarInfo},
};
use cofferdam_nix::{ContentAddress, Graph, Hash, Output as Declared, PathInfo, StorePath};

use super::{
    checks,
    content::{self, ContentError},
    request::Prepared,
    session::Stop,
    upload::now,
};
use crate::{records::Output, store_paths::Known};

/// Why outputs are not taken.
pub(super) enum Rejected {
    /// They break a rule of the derivation.
    Output(String),
    /// This host failed.
    Stop(Stop),
}

impl From<Stop> for Rejected {
    fn from(stop: Stop) -> Self {
        Self::Stop(stop)
    }
}

impl From<ContentError> for Rejected {
    fn from(error: ContentError) -> Self {
        match error {
            ContentError::Store(error) => Self::Stop(Stop::failed(&error)),
            other => Self::Output(other.to_string()),
        }
    }
}

/// Checks what a build made, and describes it.
pub(super) fn describe(
    store: &Store,
    prepared: &Prepared<'_>,
    made: &[Output],
) -> Result<Vec<(StorePath, Known)>, Rejected> {
    let needles = prepared.needles();
    let mut paths = Vec::new();
    for ((path, declared), output) in prepared.outputs.iter().zip(made) {
        let name = Path::new(path.base_name());
        let NarInfo { sha256, size } =
            nar::info(store, &output.node, name, &|| false).map_err(|error| Stop::failed(&error))?;
        let found = output.needles.iter().filter_map(|&index| needles.get(usize::try_from(index).ok()?));
        let info = PathInfo {
            deriver: Some(prepared.path.clone()),
            nar_hash: Hash::sha256(sha256),
            nar_size: size,
            references: found.map(|path| (*path).clone()).collect(),
            registration_time: now(),
            ultimate: true,
            signatures: BTreeSet::new(),
            content_address: match declared {
                Declared::Fixed { address, .. } => Some(address.clone()),
                _ => None,
            },
        };
        if let Declared::Fixed { address, .. } = declared {
            check_fixed(store, prepared.path, path, address, &output.node, &info)?;
        }
        paths.push(((*path).clone(), Known { node: output.node.clone(), info }));
    }
    let known = prepared.inputs.iter().chain(paths.iter().map(|(path, known)| (path, known)));
    let graph = Graph(known.map(|(path, known)| (path, &known.info)).collect());
    checks::check(prepared.derivation, &prepared.attributes, &graph).map_err(Rejected::Output)?;
    Ok(paths)
}

/// An output whose contents were known beforehand must have them, and refer to nothing.
fn check_fixed(
    store: &Store,
    derivation: &StorePath,
    path: &StorePath,
    address: &ContentAddress,
    node: &Node,
    info: &PathInfo,
) -> Result<(), Rejected> {
    let got = content::hash(store, Path::new(&path.to_string()), address.method, address.hash.algorithm(), node)?;
    if got != address.hash {
        let specified = &address.hash;
        return Err(Rejected::Output(format!(
            "hash mismatch in fixed-output derivation '{derivation}':\n         specified: {specified}\n            got:    {got}"
        )));
    }
    match info.references.first() {
        Some(reference) => Err(Rejected::Output(format!(
            "fixed-output derivations must not reference store paths: '{derivation}' references {} distinct paths, e.g. '{reference}'",
            info.references.len()
        ))),
        None => Ok(()),
    }
}
