//! The keys of statements: Ed25519, in PEM.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use cofferdam_castore::durable::create_whole;
use data_encoding::{BASE64, HEXLOWER};
use nix::unistd::geteuid;
use ring::{
    digest,
    rand::SystemRandom,
    signature::{self, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey},
};
use rustls::pki_types::{PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer, pem::PemObject as _};

/// What precedes the 32 bytes of an Ed25519 key in a SubjectPublicKeyInfo (RFC 8410).
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// Bytes of a public key.
const KEY_BYTES: usize = 32;

/// Most bytes of a file with a key.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// Characters in a line of PEM.
const PEM_LINE: usize = 64;

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeyError {
    /// The file can't be used.
    #[error("can't {0} it")]
    Io(&'static str, #[source] io::Error),
    /// Others can read it, or replace it.
    #[error("others may read or change it (mode {mode:03o}, user {uid}); it must be its user's alone: chmod 600")]
    Exposed {
        /// Its permissions.
        mode: u32,
        /// Its owner.
        uid: u32,
    },
    /// It has something else.
    #[error("it holds no {0}")]
    NoKey(&'static str),
}

/// Signs statements.
#[derive(Debug)]
pub(crate) struct SigningKey(Ed25519KeyPair);

impl SigningKey {
    /// Reads a key that only this process's user, or root, can read: PKCS #8 in PEM, as `openssl genpkey -algorithm ed25519` writes.
    ///
    /// # Errors
    ///
    /// See [`KeyError`].
    pub(crate) fn read(path: &Path) -> Result<Self, KeyError> {
        let file = File::open(path).map_err(|error| KeyError::Io("open", error))?;
        let found = file.metadata().map_err(|error| KeyError::Io("examine", error))?;
        let (mode, uid) = (found.mode() & 0o7777, found.uid());
        if mode & 0o077 != 0 || (uid != 0 && uid != geteuid().as_raw()) {
            return Err(KeyError::Exposed { mode, uid });
        }
        const WHAT: &str = "Ed25519 private key in PEM";
        let key = PrivatePkcs8KeyDer::from_pem_slice(&read(file)?).map_err(|_| KeyError::NoKey(WHAT))?;
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(key.secret_pkcs8_der());
        pair.map(Self).map_err(|_| KeyError::NoKey(WHAT))
    }

    /// Reads a key, or makes one if there is no file.
    ///
    /// # Errors
    ///
    /// See [`KeyError`].
    pub(crate) fn open_or_create(path: &Path) -> Result<Self, KeyError> {
        match Self::read(path) {
            Err(KeyError::Io(_, error)) if error.kind() == io::ErrorKind::NotFound => {}
            found => return found,
        }
        let created = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
            .map_err(|_| io::Error::other("no random numbers"))
            .and_then(|key| create_whole(path, |mut file| file.write_all(pem("PRIVATE KEY", key.as_ref()).as_bytes())));
        created.map_err(|error| KeyError::Io("create", error))?;
        Self::read(path)
    }

    /// Signs bytes.
    pub(crate) fn sign(&self, bytes: &[u8]) -> Vec<u8> {
        self.0.sign(bytes).as_ref().to_vec()
    }

    /// The key that checks its signatures.
    pub(crate) fn public(&self) -> PublicKey {
        let mut key = [0; KEY_BYTES];
        key.copy_from_slice(self.0.public_key().as_ref());
        PublicKey(key)
    }
}

/// Checks signatures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PublicKey([u8; KEY_BYTES]);

impl PublicKey {
    /// Reads a key in PEM.
    ///
    /// # Errors
    ///
    /// See [`KeyError`].
    pub(crate) fn read(path: &Path) -> Result<Self, KeyError> {
        let file = File::open(path).map_err(|error| KeyError::Io("open", error))?;
        Self::from_pem(&read(file)?)
    }

    fn from_pem(text: &[u8]) -> Result<Self, KeyError> {
        let der = SubjectPublicKeyInfoDer::from_pem_slice(text).ok();
        let key = der.as_ref().and_then(|der| der.strip_prefix(&SPKI_PREFIX)?.try_into().ok());
        key.map(Self).ok_or(KeyError::NoKey("Ed25519 public key in PEM"))
    }

    /// The key with these bytes.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The key itself.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The key in PEM.
    pub(crate) fn to_pem(self) -> String {
        pem("PUBLIC KEY", &self.der())
    }

    /// What signatures name it by: the SHA-256 of its DER form, in hexadecimal.
    pub(crate) fn id(self) -> String {
        HEXLOWER.encode(digest::digest(&digest::SHA256, &self.der()).as_ref())
    }

    /// Whether this is the key's signature of these bytes.
    pub(crate) fn verifies(self, bytes: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&signature::ED25519, self.0).verify(bytes, signature).is_ok()
    }

    fn der(self) -> Vec<u8> {
        [SPKI_PREFIX.as_slice(), &self.0].concat()
    }
}

fn read(file: File) -> Result<Vec<u8>, KeyError> {
    let mut contents = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut contents).map_err(|error| KeyError::Io("read", error))?;
    Ok(contents)
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = BASE64.encode(der);
    let lines = text.as_bytes().chunks(PEM_LINE).map(|line| String::from_utf8_lossy(line).into_owned() + "\n");
    format!("-----BEGIN {label}-----\n{}-----END {label}-----\n", lines.collect::<String>())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _, process::Command};

    use super::*;

    #[test]
    fn a_key_is_made_once_and_is_its_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let public = SigningKey::open_or_create(&path).unwrap().public();
        assert_eq!(SigningKey::open_or_create(&path).unwrap().public(), public);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(PublicKey::from_pem(public.to_pem().as_bytes()).unwrap(), public);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = SigningKey::open_or_create(&path).unwrap_err().to_string();
        assert!(error.contains("mode 640"), "{error}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, public.to_pem()).unwrap();
        let error = SigningKey::open_or_create(&path).unwrap_err().to_string();
        assert_eq!(error, "it holds no Ed25519 private key in PEM");
        assert!(PublicKey::from_pem(b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n").is_err());
    }

    /// Debian has openssl; it knows nothing of us.
    #[test]
    fn keys_and_signatures_are_those_of_openssl() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let openssl = |arguments: &[&str]| {
            let done = Command::new("openssl").args(arguments).current_dir(dir.path()).output().unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        };
        openssl(&["genpkey", "-algorithm", "ed25519", "-out", "key"]);
        openssl(&["pkey", "-in", "key", "-pubout", "-out", "public"]);
        let key = SigningKey::read(&at("key")).unwrap();
        assert_eq!(key.public().to_pem(), fs::read_to_string(at("public")).unwrap());
        fs::write(at("signed"), "a statement").unwrap();
        fs::write(at("signature"), key.sign(b"a statement")).unwrap();
        openssl(&[
            "pkeyutl",
            "-verify",
            "-rawin",
            "-in",
            "signed",
            "-sigfile",
            "signature",
            "-pubin",
            "-inkey",
            "public",
        ]);
        assert!(key.public().verifies(b"a statement", &key.sign(b"a statement")));
        assert!(!key.public().verifies(b"a statements", &key.sign(b"a statement")));
    }
}
