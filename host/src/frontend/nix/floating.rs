//! Outputs whose paths follow from their contents. They are built at scratch paths, and get their own in the order of their
//! references:
//!
//! ```text
//!   contents ──▶ paths of earlier outputs in place of their scratch paths ──▶ hash, with zeros for the own scratch path
//!                                                                                │
//!   final contents ◀── own path in place of the own scratch path ◀── own path ◀──┘
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use cofferdam_castore::{Node, Store};
use cofferdam_nix::{Algorithm, ContentAddress, Method, StorePath};

use super::{
    content::{self, SelfHash},
    outputs::Rejected,
    rewrite::{Rewrites, hash_part, rewritten},
};

/// An output as it was built.
#[derive(Debug, Clone)]
pub(super) struct Built {
    pub(super) node: Node,
    /// What it refers to; itself, too.
    pub(super) references: BTreeSet<StorePath>,
}

/// The paths of outputs, each after those to whose outputs it refers.
///
/// # Errors
///
/// There is no such order.
pub(super) fn in_order(
    derivation: &StorePath,
    outputs: &BTreeMap<&StorePath, Built>,
) -> Result<Vec<StorePath>, String> {
    let needed = |path: &&StorePath, left: &BTreeSet<&StorePath>| {
        outputs[*path].references.iter().find(|reference| reference != path && left.contains(reference)).cloned()
    };
    let mut left: BTreeSet<_> = outputs.keys().copied().collect();
    let mut order = Vec::new();
    while let Some(first) = left.first().copied() {
        let ready: Vec<_> = left.iter().copied().filter(|path| needed(path, &left).is_none()).collect();
        if ready.is_empty() {
            // After so many steps the path is in a cycle.
            let (mut from, mut to) = (first.clone(), first.clone());
            for _ in &left {
                from = to;
                to = needed(&&from, &left).unwrap_or_else(|| from.clone());
            }
            return Err(format!(
                "cycle detected in build of '{derivation}' in the references of output '{to}' from output '{from}'"
            ));
        }
        left.retain(|path| !ready.contains(path));
        order.extend(ready.into_iter().cloned());
    }
    Ok(order)
}

/// Gives the outputs of a derivation their paths, one after the other.
pub(super) struct Settling<'a> {
    store: &'a Store,
    derivation: &'a StorePath,
    self_hash: SelfHash,
    /// The paths of earlier outputs, by their scratch paths.
    settled: BTreeMap<StorePath, StorePath>,
}

impl<'a> Settling<'a> {
    pub(super) fn new(store: &'a Store, derivation: &'a StorePath, self_hash: SelfHash) -> Self {
        Self { store, derivation, self_hash, settled: BTreeMap::new() }
    }

    /// Gives an output its path, which it has wherever it refers to itself.
    pub(super) fn settle(
        &mut self,
        output: &str,
        scratch: &StorePath,
        method: Method,
        algorithm: Algorithm,
        built: Built,
    ) -> Result<(StorePath, Built, ContentAddress), Rejected> {
        let Built { mut node, mut references } = built;
        let refers_to_itself = references.remove(scratch);
        let moved: Vec<_> = self.settled.iter().filter(|(scratch, _)| references.contains(*scratch)).collect();
        if !moved.is_empty() {
            let rewrites = Rewrites::new(moved.iter().map(|(scratch, path)| (*scratch, hash_part(path))));
            node = rewritten(self.store, scratch, &node, &rewrites)?;
        }
        for (scratch, path) in moved {
            references.remove(scratch);
            references.insert(path.clone());
        }
        let hash = if refers_to_itself && method == Method::Recursive && algorithm == Algorithm::Sha256 {
            self.self_hash.of_both(content::hash_of_itself(self.store, scratch, &node)?)
        } else {
            content::hash(self.store, Path::new(&scratch.to_string()), method, algorithm, &node)?
        };
        let address = ContentAddress { method, hash };
        let path = address.path(&self.derivation.output_name(output), &references, refers_to_itself);
        let path = path.map_err(|error| {
            Rejected::Output(format!("output '{output}' of '{}' can't have a path: {error}", self.derivation))
        })?;
        if refers_to_itself {
            let rewrites = Rewrites::new([(scratch, hash_part(&path))]);
            node = rewritten(self.store, scratch, &node, &rewrites)?;
            references.insert(path.clone());
        }
        self.settled.insert(scratch.clone(), path.clone());
        Ok((path, Built { node, references }, address))
    }
}

#[cfg(test)]
mod tests {
    use cofferdam_castore::nar;
    use cofferdam_nix::Hash;
    use futures::executor::block_on;
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    /// A file with this text and these references.
    fn built(store: &Store, text: &str, references: &[&StorePath]) -> Built {
        let mut writer = block_on(store.blobs.open_write());
        block_on(writer.write_all(text.as_bytes())).unwrap();
        let digest = block_on(writer.close()).unwrap();
        let node = Node::File { digest, size: text.len() as u64, executable: false };
        Built { node, references: references.iter().map(|path| (*path).clone()).collect() }
    }

    /// An output that refers to itself, and to another one that does so, too; as Nix 2.34.8 and Nix 2.8.0 built them.
    #[test]
    fn paths_and_contents_are_those_of_nix() {
        let base = |name| StorePath::from_base_name(name).unwrap();
        let first = base("6ji1386f0ml97vmacwncp5kdyvzplsfh-first");
        let derivation = base("awrrwf5c6rs97fvwi8lsh1w7vvapqhw1-two.drv");
        let [out, dev] = ["out", "dev"].map(|output| derivation.scratch(output).unwrap());
        for (self_hash, names) in [
            (SelfHash::Alone, ["43fv9znhdjvy1sndw33g1vb60wph9qay-two", "xhn14h9530555pjqnfbx5aa3xmngjyl1-two-dev"]),
            (
                SelfHash::WithPlaces,
                ["v1pvi4n3644b4qzis02safh43igbn52j-two", "2sgply2zdwn9dbrs316ddvbj86b3rdlk-two-dev"],
            ),
        ] {
            let store = Store::memory();
            let mut left = BTreeMap::from([
                (&out, built(&store, &format!("{dev} {out}\n"), &[&dev, &out])),
                (&dev, built(&store, &format!("{first} {dev}\n"), &[&first, &dev])),
            ]);
            let order = in_order(&derivation, &left).unwrap();
            assert_eq!(order, [dev.clone(), out.clone()]);
            let mut settling = Settling::new(&store, &derivation, self_hash);
            let mut settle = |output, scratch| {
                let built = left.remove(scratch).unwrap();
                let settled = settling.settle(output, scratch, Method::Recursive, Algorithm::Sha256, built);
                settled.unwrap_or_else(|_| panic!("{output} was rejected"))
            };
            let (dev, _, _) = settle("dev", &dev);
            let (out, settled, address) = settle("out", &out);
            assert_eq!([out.base_name(), dev.base_name()], names);
            assert_eq!(settled.references, [out.clone(), dev.clone()].into());
            let text = format!("{dev} {out}\n");
            assert_eq!(settled.node, built(&store, &text, &[]).node);
            if self_hash == SelfHash::Alone {
                let address_of_nix = "fixed:r:sha256:0h82i64raky5wh5nhzx5696qwy7jcknkaq06bnvcwpd8lli81k65";
                assert_eq!(address.to_string(), address_of_nix);
                let info = nar::info(&store, &settled.node, Path::new("two"), &|| false).unwrap();
                assert_eq!(
                    Hash::sha256(info.sha256).to_string(),
                    "sha256-Apx+x059OIEbVcniLbZTfgSb3jxYCni5g7JzPlpAGFY="
                );
            }
        }
    }

    #[test]
    fn what_can_not_be_addressed_is_rejected() {
        let (store, derivation) = (Store::memory(), path("a.drv"));
        let scratch = derivation.scratch("out").unwrap();
        let text = format!("{scratch}\n");
        for (method, algorithm, references, rule) in [
            (Method::Flat, Algorithm::Sha256, [&scratch], "must refer to nothing, having such a content address"),
            (Method::Recursive, Algorithm::Sha512, [&scratch], "must refer to nothing, having such a content address"),
            (Method::Text, Algorithm::Sha256, [&scratch], "must be of SHA-256 and not refer to itself, being a text"),
            (Method::Flat, Algorithm::Sha256, [&derivation], "must refer to nothing, having such a content address"),
        ] {
            let built = built(&store, &text, &references);
            let mut settling = Settling::new(&store, &derivation, SelfHash::Alone);
            match settling.settle("out", &scratch, method, algorithm, built) {
                Err(Rejected::Output(text)) => assert!(text.contains(rule), "{text}"),
                _ => panic!("it must be rejected: {rule}"),
            }
        }
    }

    fn path(name: &str) -> StorePath {
        StorePath::compute("source", &Hash::of(name.as_bytes()), name).unwrap()
    }

    fn ordered(outputs: &[(&str, &[&str])]) -> Result<Vec<String>, String> {
        let paths: Vec<_> = outputs.iter().map(|(name, _)| path(name)).collect();
        let store = Store::memory();
        let output = |(_, references): &(&str, &[&str])| {
            let references: Vec<_> = references.iter().map(|name| path(name)).collect();
            built(&store, "", &references.iter().collect::<Vec<_>>())
        };
        let outputs = paths.iter().zip(outputs.iter().map(output)).collect();
        let order = in_order(&path("a.drv"), &outputs)?;
        Ok(order.iter().map(|path| path.name().to_owned()).collect())
    }

    #[test]
    fn outputs_come_after_those_that_they_refer_to() {
        assert_eq!(ordered(&[("a", &["a", "b", "input"]), ("b", &["c"]), ("c", &["c"])]).unwrap(), ["c", "b", "a"]);
        assert_eq!(ordered(&[("a", &[]), ("b", &["a"]), ("c", &["a", "b"])]).unwrap(), ["a", "b", "c"]);
    }

    #[test]
    fn cycles_are_refused_and_named() {
        let error = ordered(&[("a", &["b"]), ("b", &["c"]), ("c", &["b"]), ("d", &[])]).unwrap_err();
        let (b, c) = (path("b"), path("c"));
        let names = |from, to| {
            let derivation = path("a.drv");
            format!("cycle detected in build of '{derivation}' in the references of output '{to}' from output '{from}'")
        };
        assert!(error == names(&b, &c) || error == names(&c, &b), "{error}");
    }
}
