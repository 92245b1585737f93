//! What `exportReferencesGraph` tells of a closure.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::{PathInfo, StorePath};

/// Paths that are visited to add up sizes.
const MAX_VISITED: usize = 20_000_000;

/// The paths that are known.
#[derive(Debug, Default)]
pub struct Graph<'a>(pub BTreeMap<&'a StorePath, &'a PathInfo>);

impl Graph<'_> {
    /// A path and everything that it refers to, as far as that is known.
    pub fn closure<'p>(&'p self, roots: impl IntoIterator<Item = &'p StorePath>) -> BTreeSet<&'p StorePath> {
        let mut left: Vec<_> = roots.into_iter().collect();
        let mut seen: BTreeSet<_> = left.iter().copied().collect();
        while let Some(path) = left.pop() {
            let references = self.0.get(path).into_iter().flat_map(|info| &info.references);
            left.extend(references.filter(|reference| seen.insert(reference)));
        }
        seen
    }

    /// Bytes in the NARs of these paths.
    pub fn size(&self, paths: &BTreeSet<&StorePath>) -> u64 {
        paths.iter().filter_map(|path| self.0.get(path)).fold(0, |sum, info| sum.saturating_add(info.nar_size))
    }

    /// The closure of paths for a file: each with an empty line for its deriver, and its references.
    pub fn registration(&self, roots: &[StorePath]) -> String {
        let mut text = String::new();
        for path in self.closure(roots) {
            let references = self.0.get(path).map(|info| &info.references).into_iter().flatten();
            let references: Vec<_> = references.map(|reference| format!("{reference}\n")).collect();
            text += &format!("{path}\n\n{}\n{}", references.len(), references.concat());
        }
        text
    }

    /// The closure of paths for structured attributes.
    ///
    /// # Errors
    ///
    /// It is too large for its sizes to be added up.
    pub fn json(&self, roots: &[StorePath]) -> Result<Value, String> {
        let closure = self.closure(roots);
        if closure.len().saturating_mul(closure.len()) > MAX_VISITED {
            return Err(format!("exportReferencesGraph must not have {} paths", closure.len()));
        }
        let path = |path: &&StorePath| {
            let info = self.0.get(*path)?;
            let mut object = json!({
                "path": path.to_string(),
                "valid": true,
                "narHash": format!("sha256:{}", info.nar_hash.base32()),
                "narSize": info.nar_size,
                "references": info.references.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "closureSize": self.size(&self.closure([*path])),
            });
            if let Some(address) = &info.content_address {
                object["ca"] = address.to_string().into();
            }
            Some(object)
        };
        Ok(closure.iter().filter_map(path).collect())
    }
}
