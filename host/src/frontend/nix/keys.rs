//! Signatures of store paths: `NAME:BASE64`, as Nix writes keys and signatures.

use std::{collections::BTreeSet, str::FromStr};

use cofferdam_nix::{Derivation, Output, PathInfo, Realisation, StorePath};
use data_encoding::BASE64;

use super::session::Stop;
use crate::provenance::{PublicKey, SigningKey};

/// A public key, and the name by which signatures refer to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NamedKey {
    name: String,
    key: PublicKey,
}

impl FromStr for NamedKey {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = || {
            let (name, key) = text.split_once(':')?;
            let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic());
            let key = PublicKey::from_bytes(&BASE64.decode(key.as_bytes()).ok()?)?;
            is_name.then(|| Self { name: name.to_owned(), key })
        };
        parsed().ok_or_else(|| format!("must be NAME:KEY with an Ed25519 key in base 64, not {text:?}"))
    }
}

/// Which paths are believed to be what their metadata say.
#[derive(Debug)]
pub(crate) struct Keys {
    /// Signs what is built here.
    own: SigningKey,
    name: String,
    trusted: Vec<NamedKey>,
    /// Whether a client's word isn't enough.
    pub(super) required: bool,
}

impl Keys {
    /// The daemon's own key, by this name, and those that it trusts beside it. With `required` clients are not trusted.
    pub(crate) fn new(own: SigningKey, name: String, trusted: Vec<NamedKey>, required: bool) -> Self {
        Self { own, name, trusted, required }
    }

    /// The daemon's own key, for the configuration of Nix.
    pub(crate) fn public(&self) -> String {
        format!("{}:{}", self.name, BASE64.encode(self.own.public().as_bytes()))
    }

    /// Signs a path.
    pub(super) fn sign(&self, path: &StorePath, info: &PathInfo) -> String {
        self.signature(&info.fingerprint(path))
    }

    /// Signs what an output has become.
    pub(super) fn sign_realisation(&self, realisation: &mut Realisation) {
        let signature = self.signature(&realisation.fingerprint());
        realisation.signatures.insert(signature);
    }

    fn signature(&self, fingerprint: &str) -> String {
        format!("{}:{}", self.name, BASE64.encode(&self.own.sign(fingerprint.as_bytes())))
    }

    /// Whether the path has a signature by the daemon's own key or by a trusted one.
    pub(super) fn trust(&self, path: &StorePath, info: &PathInfo) -> bool {
        self.trust_one(&info.fingerprint(path), &info.signatures)
    }

    /// Whether a realisation has such a signature.
    pub(super) fn trust_realisation(&self, realisation: &Realisation) -> bool {
        self.trust_one(&realisation.fingerprint(), &realisation.signatures)
    }

    fn trust_one(&self, fingerprint: &str, signatures: &BTreeSet<String>) -> bool {
        let own = (&self.name, self.own.public());
        let keys = || self.trusted.iter().map(|NamedKey { name, key }| (name, *key)).chain([own]);
        signatures.iter().filter_map(|signature| signature.split_once(':')).any(|(name, signature)| {
            BASE64.decode(signature.as_bytes()).is_ok_and(|signature| {
                keys().any(|(known, key)| known == name && key.verifies(fingerprint.as_bytes(), &signature))
            })
        })
    }

    /// Refuses a derivation whose outputs' paths can't be checked, where clients are not trusted.
    pub(super) fn check_build(&self, path: &StorePath, derivation: &Derivation) -> Result<(), Stop> {
        let is_checked = |output: &Output| !matches!(output, Output::InputAddressed(_));
        if !self.required || derivation.outputs.values().all(is_checked) {
            return Ok(());
        }
        Err(Stop::Refused(format!(
            "clients are not trusted here, so '{path}' must be uploaded and built by its path: use ssh-ng:// with Nix 2.16 or later"
        )))
    }
}

#[cfg(test)]
mod tests {
    use cofferdam_nix::Hash;

    use super::*;

    fn key(name: &str) -> SigningKey {
        let dir = tempfile::tempdir().unwrap();
        SigningKey::open_or_create(&dir.path().join(name)).unwrap()
    }

    fn keys(trusted: Vec<NamedKey>) -> Keys {
        Keys::new(key("own"), "own-1".to_owned(), trusted, true)
    }

    #[test]
    fn only_the_right_signature_of_a_known_key_is_trusted() {
        let other = keys(Vec::new());
        let trusting = keys(vec![other.public().parse().unwrap()]);
        let renamed = keys(vec![other.public().replace("own-1", "other").parse().unwrap()]);
        let path = StorePath::compute("source", &Hash::of(b""), "a").unwrap();
        let unsigned = PathInfo {
            deriver: None,
            nar_hash: Hash::of(b""),
            nar_size: 1,
            references: BTreeSet::from([path.clone()]),
            registration_time: 0,
            ultimate: false,
            signatures: BTreeSet::new(),
            content_address: None,
        };
        let signed =
            |by: &Keys| PathInfo { signatures: BTreeSet::from([by.sign(&path, &unsigned)]), ..unsigned.clone() };
        assert!(!trusting.trust(&path, &unsigned));
        assert!(trusting.trust(&path, &signed(&trusting)) && trusting.trust(&path, &signed(&other)));
        assert!(!other.trust(&path, &signed(&trusting)), "it doesn't know this key");
        assert!(!renamed.trust(&path, &signed(&other)), "it knows this key by another name");
        for changed in [
            PathInfo { nar_size: 2, ..signed(&trusting) },
            PathInfo { nar_hash: Hash::of(b"x"), ..signed(&trusting) },
            PathInfo { references: BTreeSet::new(), ..signed(&trusting) },
        ] {
            assert!(!trusting.trust(&path, &changed), "{changed:?}");
        }
    }

    #[test]
    fn keys_are_read_as_nix_writes_them() {
        let text = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";
        assert_eq!(text.parse::<NamedKey>().unwrap().name, "cache.nixos.org-1");
        for wrong in [
            "",
            "a",
            "a:",
            ":6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=",
            "a:AAAA",
            "a b:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=",
        ] {
            assert!(wrong.parse::<NamedKey>().unwrap_err().contains("must be NAME:KEY"), "{wrong}");
        }
    }
}
