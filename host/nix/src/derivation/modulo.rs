use std::collections::{BTreeMap, BTreeSet};

use super::{Derivation, Output};
use crate::{Hash, OutputId, StorePath, StorePathError};

/// What identifies a derivation, however a fixed output that it needs is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Modulo {
    /// Identifies its outputs: the paths of those that are addressed by their inputs follow from it.
    pub outputs: Hash,
    /// Stands for it among the inputs of another derivation.
    pub input: Hash,
    /// Whether the paths of its outputs, or of some that it needs, are known only after a build.
    pub is_deferred: bool,
}

impl Derivation {
    /// Computes its hashes from those of the derivations that it needs. `None` if one of these is not known.
    pub fn modulo<'a>(&self, known: impl Fn(&StorePath) -> Option<&'a Modulo>) -> Option<Modulo> {
        if let Some(Output::Fixed { path, address }) = self.outputs.get("out") {
            let (prefix, hash) = (address.method.prefix(), &address.hash);
            let text = format!("fixed:out:{prefix}{}:{}:{path}", hash.algorithm().name(), hash.base16());
            let hash = Hash::of(text.as_bytes());
            return Some(Modulo { outputs: hash.clone(), input: hash, is_deferred: false });
        }
        let mut inputs: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let mut is_deferred = self.outputs.values().any(|output| output.path().is_none());
        for (path, names) in &self.input_derivations {
            let input = known(path)?;
            is_deferred |= input.is_deferred;
            inputs.entry(input.input.base16()).or_default().extend(names.iter().cloned());
        }
        let hash = |masked| Hash::of(&self.text_with(&inputs, masked));
        Some(Modulo { outputs: hash(true), input: hash(false), is_deferred })
    }
}

/// The name of an output's path.
pub(super) fn path_name(derivation: &str, output: &str) -> String {
    if output == "out" { derivation.to_owned() } else { format!("{derivation}-{output}") }
}

impl Modulo {
    /// The path of an output that is addressed by its inputs.
    ///
    /// # Errors
    ///
    /// The name breaks a rule.
    pub fn output_path(&self, derivation: &str, output: &str) -> Result<StorePath, StorePathError> {
        StorePath::compute(&format!("output:{output}"), &self.outputs, &path_name(derivation, output))
    }

    /// An output's name among all derivations'.
    pub fn output_id(&self, output: &str) -> OutputId {
        OutputId { derivation: self.outputs.clone(), output: output.to_owned() }
    }
}
