//! Derivations some of whose inputs have paths that are known only after a build.

use std::collections::{BTreeMap, BTreeSet};

use super::{Derivation, Output, modulo::path_name};
use crate::{Algorithm, Hash, StorePath, StorePathError, base32};

/// Bytes of a placeholder: a slash, and a SHA-256.
const PLACEHOLDER_BYTES: usize = 1 + base32::encoded_length(32);

/// Texts that stand for paths in a derivation until these are known, and the paths.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placeholders(BTreeMap<Vec<u8>, String>);

impl Placeholders {
    /// Has the path of a derivation's own output stand where `builtins.placeholder` does.
    pub fn own(&mut self, output: &str, path: &StorePath) {
        self.0.insert(placeholder(output).into_bytes(), path.to_string());
    }

    /// Has the path of another derivation's output stand for what its dependents have instead of it.
    fn upstream(&mut self, derivation: &StorePath, output: &str, path: &StorePath) {
        let name = derivation.output_name(output);
        let text = hashed(&format!("nix-upstream-output:{}:{name}", derivation.hash_part()));
        self.0.insert(text.into_bytes(), path.to_string());
    }

    /// The same bytes with the paths.
    pub fn replaced(&self, bytes: &[u8]) -> Vec<u8> {
        let mut whole = Vec::with_capacity(bytes.len());
        let mut rest = bytes;
        while let Some(at) = rest.iter().position(|&byte| byte == b'/') {
            whole.extend_from_slice(&rest[..at]);
            rest = &rest[at..];
            let path = rest.get(..PLACEHOLDER_BYTES).and_then(|found| self.0.get(found));
            let (put, taken) = path.map_or((&b"/"[..], 1), |path| (path.as_bytes(), PLACEHOLDER_BYTES));
            whole.extend_from_slice(put);
            rest = &rest[taken..];
        }
        whole.extend_from_slice(rest);
        whole
    }

    /// The same text with the paths.
    pub fn replaced_text(&self, text: &str) -> String {
        String::from_utf8_lossy(&self.replaced(text.as_bytes())).into_owned()
    }
}

/// What stands for the path of a derivation's own output.
pub(crate) fn placeholder(output: &str) -> String {
    hashed(&format!("nix-output:{output}"))
}

fn hashed(text: &str) -> String {
    format!("/{}", Hash::of(text.as_bytes()).base32())
}

/// A derivation's name without `.drv`.
fn derivation_name(path: &StorePath) -> &str {
    path.name().strip_suffix(".drv").unwrap_or(path.name())
}

impl Derivation {
    /// Whether the paths of its outputs are known only after it is built, or after what it needs is.
    pub fn is_unresolved(&self) -> bool {
        self.outputs.values().any(|output| output.path().is_none())
    }

    /// The same derivation with the paths of its inputs instead of the derivations that make them. Outputs that waited for
    /// that get their paths.
    ///
    /// # Errors
    ///
    /// An input's path isn't known, or the name breaks a rule.
    pub fn resolved(
        mut self,
        name: &str,
        path_of: impl Fn(&StorePath, &str) -> Option<StorePath>,
    ) -> Result<Self, String> {
        let mut placeholders = Placeholders::default();
        for (input, names) in std::mem::take(&mut self.input_derivations) {
            for output in names {
                let path = path_of(&input, &output);
                let path = path.ok_or_else(|| format!("the output {output} of {input} has no path"))?;
                placeholders.upstream(&input, &output, &path);
                self.input_sources.insert(path);
            }
        }
        self.builder = placeholders.replaced_text(&self.builder);
        self.arguments = self.arguments.iter().map(|text| placeholders.replaced_text(text)).collect();
        let environment = std::mem::take(&mut self.environment);
        let variable =
            |(key, value): (String, Vec<u8>)| (placeholders.replaced_text(&key), placeholders.replaced(&value));
        self.environment = environment.into_iter().map(variable).collect();
        let deferred = |output: &Output| matches!(output, Output::Deferred);
        if self.outputs.values().any(deferred)
            && let Some(modulo) = self.modulo(|_| None)
        {
            for (output, declared) in self.outputs.iter_mut().filter(|(_, declared)| deferred(declared)) {
                let path = modulo.output_path(name, output);
                let path = path.map_err(|error| format!("the output {output}: {error}"))?;
                self.environment.insert(output.clone(), path.to_string().into_bytes());
                *declared = Output::InputAddressed(path);
            }
        }
        Ok(self)
    }

    /// The path of its text.
    ///
    /// # Errors
    ///
    /// The name breaks a rule.
    pub fn path(&self, name: &str) -> Result<StorePath, StorePathError> {
        let references: BTreeSet<_> = self.input_sources.iter().chain(self.input_derivations.keys()).cloned().collect();
        StorePath::compute_with("text", &references, false, &Hash::of(&self.to_text()), &format!("{name}.drv"))
    }
}

impl StorePath {
    /// The name of an output's path, if this is its derivation's.
    pub fn output_name(&self, output: &str) -> String {
        path_name(derivation_name(self), output)
    }

    /// Where an output of this derivation is built whose path follows from its contents.
    ///
    /// # Errors
    ///
    /// The name breaks a rule.
    pub fn scratch(&self, output: &str) -> Result<Self, StorePathError> {
        let zeros = Hash::sha256([0; Algorithm::Sha256.length()]);
        let kind = format!("rewrite:{}:name:{output}", self.base_name());
        Self::compute(&kind, &zeros, &self.output_name(output))
    }
}
