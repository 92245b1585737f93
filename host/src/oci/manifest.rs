//! The documents of an image, and the choice of one image among several.
//!
//! ```text
//!   index ──▶ index ──▶ manifest ──▶ config: platform
//!                          └───────▶ layers, the lowest first
//! ```
//!
//! Both OCI's and Docker's kinds have these fields, so kinds of documents are told by their fields, not by media types.

use std::collections::BTreeMap;

use serde::{Deserialize, de::DeserializeOwned};

use super::{Digest, OciError, Platform, Source};

/// Limit on one document.
pub(super) const MAX_DOCUMENT_BYTES: u64 = 4 * 1024 * 1024;

/// Limit on the documents that are read to choose an image.
const MAX_DOCUMENTS: u32 = 64;

/// Limit on the layers of an image.
const MAX_LAYERS: usize = 1024;

/// Annotation of an index's entry: its name.
const NAME: &str = "org.opencontainers.image.ref.name";

/// Annotation of entries that say something about an image.
const REFERENCE: &str = "vnd.docker.reference.type";

/// A reference to a blob.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    pub(super) digest: Digest,
    /// Its length in bytes.
    pub(super) size: u64,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

/// An index or a manifest.
#[derive(Debug, Deserialize)]
struct Document {
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

/// An image.
#[derive(Debug)]
pub(crate) struct Manifest {
    /// The digest of the manifest itself.
    pub(crate) digest: Digest,
    /// The lowest first.
    pub(super) layers: Vec<Descriptor>,
}

/// What is read of an image's configuration.
#[derive(Debug, Deserialize)]
pub(super) struct Config {
    #[serde(flatten)]
    pub(super) platform: Platform,
    pub(super) rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
pub(super) struct RootFs {
    /// The digests of the uncompressed layers.
    pub(super) diff_ids: Vec<Digest>,
}

/// Parses a document, which has at most [`MAX_DOCUMENT_BYTES`].
pub(super) fn parse<T: DeserializeOwned>(at: &str, bytes: &[u8]) -> Result<T, OciError> {
    serde_json::from_slice(bytes).map_err(|error| OciError::malformed(at, format!("is wrong: {error}")))
}

/// Whether bytes are an index or a manifest.
pub(super) fn is_document(bytes: &[u8]) -> bool {
    parse::<Document>("the document", bytes).is_ok_and(|it| it.manifests.is_some() || it.layers.is_some())
}

/// Refuses an image with too many layers.
pub(super) fn check_layers(at: &str, layers: usize) -> Result<(), OciError> {
    if layers > MAX_LAYERS {
        return Err(OciError::malformed(at, format!("must not have more than {MAX_LAYERS} layers, and has {layers}")));
    }
    Ok(())
}

/// Chooses an image by its platform, and by the name that it has in the outermost index.
pub(super) struct Choice<'a> {
    source: &'a dyn Source,
    wanted: &'a Platform,
    has: Vec<Platform>,
    documents: u32,
}

impl<'a> Choice<'a> {
    pub(super) fn new(source: &'a dyn Source, wanted: &'a Platform) -> Self {
        Self { source, wanted, has: Vec::new(), documents: 0 }
    }

    /// The image in the index of a layout. Without a name there must be one alone.
    pub(super) fn of_layout(mut self, index: &[u8], name: Option<&str>) -> Result<Manifest, OciError> {
        let document: Document = parse("index.json", index)?;
        let entries = document.manifests.unwrap_or_default();
        let names: Vec<_> = entries.iter().filter_map(|entry| entry.annotation(NAME)).map(str::to_owned).collect();
        let mut chosen: Vec<(Manifest, Option<&str>)> = Vec::new();
        for entry in &entries {
            let own = entry.annotation(NAME);
            if name.is_some() && own != name {
                continue;
            }
            if let Some(manifest) = self.of_entry(entry)?
                && chosen.iter().all(|(other, of)| other.digest != manifest.digest && *of != own)
            {
                chosen.push((manifest, own));
            }
        }
        if chosen.len() > 1 || chosen.is_empty() && name.is_some() && self.has.is_empty() {
            return Err(OciError::Choice { has: names.iter().map(|name| name.escape_default().to_string()).collect() });
        }
        chosen.pop().map(|(manifest, _)| manifest).ok_or_else(|| self.none())
    }

    /// The image of an index or manifest that is no entry of an index itself.
    pub(super) fn of_document(mut self, digest: Digest, bytes: &[u8]) -> Result<Manifest, OciError> {
        self.look(digest, bytes, false)?.ok_or_else(|| self.none())
    }

    fn none(&mut self) -> OciError {
        let mut has = std::mem::take(&mut self.has);
        has.sort();
        has.dedup();
        OciError::Platform { wanted: self.wanted.clone(), has }
    }

    /// The image of an index's entry, if it is wanted.
    fn of_entry(&mut self, entry: &Descriptor) -> Result<Option<Manifest>, OciError> {
        if entry.annotation(REFERENCE).is_some() {
            return Ok(None);
        }
        let told = entry.platform.as_ref();
        self.has.extend(told.filter(|platform| !platform.is_none()).cloned());
        if told.is_some_and(|platform| !self.wanted.accepts(platform)) {
            return Ok(None);
        }
        let bytes = document(self.source, entry, "the manifest")?;
        self.look(entry.digest, &bytes, told.is_some())
    }

    /// The image of an index or manifest, if it is wanted. Where no index has told its platform, its configuration does.
    fn look(&mut self, digest: Digest, bytes: &[u8], is_told: bool) -> Result<Option<Manifest>, OciError> {
        let at = format!("the manifest {digest}");
        self.documents += 1;
        if self.documents > MAX_DOCUMENTS {
            let rule = format!("is one of more than {MAX_DOCUMENTS} documents to choose an image from");
            return Err(OciError::malformed(at, rule));
        }
        match parse(&at, bytes)? {
            Document { manifests: Some(entries), config: None, layers: None } => {
                for entry in &entries {
                    if let Some(found) = self.of_entry(entry)? {
                        return Ok(Some(found));
                    }
                }
                Ok(None)
            }
            Document { manifests: None, config: Some(config), layers: Some(layers) } => {
                check_layers(&at, layers.len())?;
                if is_told {
                    return Ok(Some(Manifest { digest, layers }));
                }
                let what = "the image's configuration";
                let config: Config = parse(what, &document(self.source, &config, what)?)?;
                if !self.wanted.accepts(&config.platform) {
                    self.has.push(config.platform);
                    return Ok(None);
                }
                Ok(Some(Manifest { digest, layers }))
            }
            _ => Err(OciError::malformed(at, "must be an index of manifests, or a manifest with a config and layers")),
        }
    }
}

impl Descriptor {
    /// Whether it refers to an index or a manifest, which registries keep apart from other blobs.
    pub(super) fn is_document(&self) -> bool {
        let media_type = self.media_type.as_deref().unwrap_or_default();
        [".index.", ".manifest."].iter().any(|kind| media_type.contains(kind))
    }

    fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.as_ref()?.get(key).map(String::as_str)
    }
}

/// Reads a small blob, and checks its digest.
fn document(source: &dyn Source, descriptor: &Descriptor, what: &str) -> Result<Vec<u8>, OciError> {
    let at = format!("{what} {}", descriptor.digest);
    if descriptor.size > MAX_DOCUMENT_BYTES {
        let rule = format!("must not be larger than {MAX_DOCUMENT_BYTES} bytes, and has {}", descriptor.size);
        return Err(OciError::malformed(at, rule));
    }
    let bytes = read_document(&at, source.open(descriptor)?)?;
    let found = Digest::of(&bytes);
    if found != descriptor.digest {
        return Err(OciError::Digest { at: what.to_owned(), expected: descriptor.digest, found });
    }
    Ok(bytes)
}

/// Reads a document to its end.
pub(super) fn read_document(at: &str, reader: impl std::io::Read) -> Result<Vec<u8>, OciError> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    let read = reader.take(MAX_DOCUMENT_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(|source| OciError::Read { at: at.to_owned(), source })?;
    if bytes.len() as u64 > MAX_DOCUMENT_BYTES {
        return Err(OciError::malformed(at, format!("must not be larger than {MAX_DOCUMENT_BYTES} bytes")));
    }
    Ok(bytes)
}
