//! Archives of `docker save`: `manifest.json` names the configuration and the layers of each image.
//!
//! Older archives have the layers by made-up paths, newer ones have an OCI layout as well, and paths into it. Either way the
//! configuration has the digests of the uncompressed layers.

use serde::Deserialize;

use super::{
    Digest, Files, OciError, Platform,
    manifest::{Config, check_layers, parse},
};

const MANIFEST: &str = "manifest.json";

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Item {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// An image of an archive.
pub(crate) struct Saved {
    /// The digest of its configuration.
    pub(crate) digest: Digest,
    /// The path of each layer and its digest when uncompressed, the lowest first.
    pub(super) layers: Vec<(String, Digest)>,
}

impl Saved {
    /// The one image of an archive.
    pub(super) fn choose(files: &Files, wanted: &Platform) -> Result<Self, OciError> {
        let Some(bytes) = files.document(MANIFEST)? else {
            return Err(OciError::malformed(
                "the archive",
                "has no manifest.json, so it is not one of `docker save`: for an OCI layout, use the format oci",
            ));
        };
        let items: Vec<Item> = parse(MANIFEST, &bytes)?;
        let [item] = &items[..] else {
            let names = items.iter().filter_map(|item| item.repo_tags.as_ref()?.first());
            return Err(OciError::Choice { has: names.map(|name| name.escape_default().to_string()).collect() });
        };
        let missing = |path: &str| OciError::malformed(MANIFEST, format!("names {path:?}, which the archive lacks"));
        let bytes = files.document(&item.config)?.ok_or_else(|| missing(&item.config))?;
        let digest = Digest::of(&bytes);
        let name = item.config.rsplit('/').next().unwrap_or_default();
        if let Some(expected) = Digest::from_hex(name.strip_suffix(".json").unwrap_or(name))
            && expected != digest
        {
            return Err(OciError::Digest { at: "the image's configuration".to_owned(), expected, found: digest });
        }
        let config: Config = parse("the image's configuration", &bytes)?;
        if !wanted.accepts(&config.platform) {
            return Err(OciError::Platform { wanted: wanted.clone(), has: vec![config.platform] });
        }
        check_layers(MANIFEST, item.layers.len())?;
        let diff_ids = config.rootfs.diff_ids;
        if diff_ids.len() != item.layers.len() {
            let (layers, ids) = (item.layers.len(), diff_ids.len());
            let rule = format!("names {layers} layers, and the image's configuration {ids}");
            return Err(OciError::malformed(MANIFEST, rule));
        }
        Ok(Self { digest, layers: item.layers.iter().cloned().zip(diff_ids).collect() })
    }
}
