//! What a build made, as store paths.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use cofferdam_castore::{
    Node, Store,
    nar::{self, NarInfo},
};
use cofferdam_nix::{ContentAddress, Graph, Hash, Output as Declared, PathInfo, StorePath};

use super::{
    checks,
    content::{self, ContentError, SelfHash},
    floating::{self, Built, Settling},
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

/// An output, its path, and what is there.
pub(super) type Described<'a> = (&'a str, StorePath, Known);

/// Checks what a build made, and describes it.
pub(super) fn describe<'a>(
    store: &Store,
    prepared: &Prepared<'a>,
    made: &[Output],
    self_hash: SelfHash,
) -> Result<Vec<Described<'a>>, Rejected> {
    let needles = prepared.needles();
    let references = |output: &Output| {
        let found = output.needles.iter().filter_map(|&index| needles.get(usize::try_from(index).ok()?));
        found.map(|path| (*path).clone()).collect()
    };
    let mut left: BTreeMap<_, _> = prepared
        .outputs
        .keys()
        .zip(made)
        .map(|(path, output)| (path, Built { node: output.node.clone(), references: references(output) }))
        .collect();
    let mut settling = Settling::new(store, prepared.path, self_hash);
    let mut described = Vec::new();
    for path in floating::in_order(prepared.path, &left).map_err(Rejected::Output)? {
        let (Some(built), Some((output, declared))) = (left.remove(&path), prepared.outputs.get(&path)) else {
            continue;
        };
        let (path, Built { node, references }, content_address) = match declared {
            Declared::Floating { method, algorithm } => {
                let (path, built, address) = settling.settle(output, &path, *method, *algorithm, built)?;
                (path, built, Some(address))
            }
            Declared::Fixed { address, .. } => (path, built, Some(address.clone())),
            Declared::InputAddressed(_) | Declared::Deferred => (path, built, None),
        };
        let name = Path::new(path.base_name());
        let NarInfo { sha256, size } =
            nar::info(store, &node, name, &|| false).map_err(|error| Stop::failed(&error))?;
        let info = PathInfo {
            deriver: Some(prepared.path.clone()),
            nar_hash: Hash::sha256(sha256),
            nar_size: size,
            references,
            registration_time: now(),
            ultimate: true,
            signatures: BTreeSet::new(),
            content_address,
        };
        if let Declared::Fixed { address, .. } = declared {
            check_fixed(store, prepared.path, &path, address, &node, &info)?;
        }
        described.push((*output, path, Known { node, info }));
    }
    let known = prepared.inputs.iter().chain(described.iter().map(|(_, path, known)| (path, known)));
    let graph = Graph(known.map(|(path, known)| (path, &known.info)).collect());
    let paths = described.iter().map(|(output, path, _)| (*output, path)).collect();
    checks::check(&paths, &prepared.attributes, &graph).map_err(Rejected::Output)?;
    Ok(described)
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
