use std::{
    collections::BTreeSet,
    io::{self, Read, Write},
};

use serde::{Deserialize, Serialize};

use crate::{
    Algorithm, ContentAddress, Hash, StorePath,
    wire::{Reader, WireError, Writer},
};

/// What Nix knows of a valid path, beside the path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathInfo {
    /// The derivation that made it, if that is known.
    pub deriver: Option<StorePath>,
    /// The SHA-256 of its NAR.
    pub nar_hash: Hash,
    /// Bytes of its NAR.
    pub nar_size: u64,
    /// What it refers to; itself, too.
    pub references: BTreeSet<StorePath>,
    /// Seconds since 1970.
    pub registration_time: u64,
    /// Whether it was built by the store that says so.
    pub ultimate: bool,
    /// As in `KEY:BASE64`.
    pub signatures: BTreeSet<String>,
    /// Its content address, if it has one.
    pub content_address: Option<ContentAddress>,
}

impl PathInfo {
    /// What a signature of this path signs: the path, the hash and the size of its NAR, and what it refers to.
    pub fn fingerprint(&self, path: &StorePath) -> String {
        let references: Vec<_> = self.references.iter().map(ToString::to_string).collect();
        format!("1;{path};sha256:{};{};{}", self.nar_hash.base32(), self.nar_size, references.join(","))
    }

    /// What a binary cache says of this path, whose archive is at `url` below the cache's and packed by `compression`.
    pub fn nar_info(&self, path: &StorePath, url: &str, compression: &str) -> String {
        let references: Vec<_> = self.references.iter().map(StorePath::base_name).collect();
        let (hash, size) = (self.nar_hash.base32(), self.nar_size);
        let mut text = format!("StorePath: {path}\nURL: {url}\nCompression: {compression}\n");
        if compression == "none" {
            text.push_str(&format!("FileHash: sha256:{hash}\nFileSize: {size}\n"));
        }
        text.push_str(&format!("NarHash: sha256:{hash}\nNarSize: {size}\nReferences: {}\n", references.join(" ")));
        let deriver = self.deriver.iter().map(|deriver| format!("Deriver: {}\n", deriver.base_name()));
        // One with a line's end would say more than that.
        let signatures = self.signatures.iter().filter(|text| text.bytes().all(|byte| byte.is_ascii_graphic()));
        let signatures = signatures.map(|signature| format!("Sig: {signature}\n"));
        let address = self.content_address.iter().map(|address| format!("CA: {address}\n"));
        text.extend(deriver.chain(signatures).chain(address));
        text
    }

    /// Reads it.
    ///
    /// # Errors
    ///
    /// A field breaks a rule, or the input ended or failed.
    pub fn read<R: Read>(reader: &mut Reader<R>) -> Result<Self, WireError> {
        let deriver = reader.optional_path("the deriver")?;
        let nar_hash = reader.text("the NAR hash")?;
        // Old clients name the function.
        let nar_hash = nar_hash.strip_prefix("sha256:").unwrap_or(&nar_hash);
        let nar_hash = Hash::parse(Algorithm::Sha256, nar_hash)
            .map_err(|error| WireError::broken("the NAR hash", error.to_string()))?;
        let references = reader.paths("the references")?;
        let (registration_time, nar_size) = (reader.integer()?, reader.integer()?);
        let ultimate = reader.boolean("ultimate")?;
        let signatures = reader.list("the signatures", |reader| reader.text("a signature"))?;
        let content_address = match &*reader.text("the content address")? {
            "" => None,
            text => Some(text.parse().map_err(|rule: String| WireError::broken("the content address", rule))?),
        };
        Ok(Self { deriver, nar_hash, nar_size, references, registration_time, ultimate, signatures, content_address })
    }

    /// Writes it.
    ///
    /// # Errors
    ///
    /// Those of the output.
    pub fn write<W: Write>(&self, writer: &mut Writer<W>) -> io::Result<()> {
        writer.optional(self.deriver.as_ref())?;
        writer.text(self.nar_hash.base16())?;
        writer.texts(&self.references)?;
        writer.integer(self.registration_time)?;
        writer.integer(self.nar_size)?;
        writer.integer(self.ultimate)?;
        writer.texts(&self.signatures)?;
        writer.optional(self.content_address.as_ref())
    }
}
