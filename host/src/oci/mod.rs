//! Images of OCI and Docker, as one directory of the store.
//!
//! ```text
//!   layout, directory or tar ─▶ Files ──┬▶ index ─▶ manifest ─┐
//!   registry ─────────────────▶ Registry┘                     ├─▶ layers ──stream──▶ castore's Layers ──▶ node
//!   archive of `docker save` ─▶ Files ───▶ manifest.json ─────┘     └ digests checked before anything is visible
//! ```
//!
//! Images are not trusted. Documents are bounded, paths are made of digests or looked up in a list, and layers are read
//! piece by piece with castore's limits.

mod digest;
mod docker;
mod error;
mod layers;
mod layout;
mod manifest;
mod platform;
mod registry;

use std::io::Read;

use cofferdam_castore::{Node, Store, archive::Limits, import::Lost};

pub(crate) use digest::Digest;
pub(crate) use docker::Saved;
pub(crate) use error::OciError;
pub(crate) use layout::Files;
pub(crate) use manifest::{Descriptor, Manifest};
pub(crate) use platform::Platform;
pub(crate) use registry::{Reference, Registry, login_file};

use layers::{DigestOf, Stack};

/// Where an image's blobs come from.
pub(crate) trait Source: Sync {
    /// Opens a blob. Nothing is checked yet.
    fn open(&self, descriptor: &Descriptor) -> Result<Box<dyn Read + '_>, OciError>;
}

/// The image of a layout for a platform, by its name if it has several.
///
/// # Errors
///
/// There is no such image, or a document is wrong.
pub(crate) fn in_layout(files: &Files, name: Option<&str>, wanted: &Platform) -> Result<Manifest, OciError> {
    let Some(index) = files.document("index.json")? else {
        return Err(OciError::malformed("the layout", "has no index.json, so it is not one of OCI"));
    };
    manifest::Choice::new(files, wanted).of_layout(&index, name)
}

/// The image of an archive of `docker save`.
///
/// # Errors
///
/// There are several, it is for another platform, or a document is wrong.
pub(crate) fn saved(files: &Files, wanted: &Platform) -> Result<Saved, OciError> {
    Saved::choose(files, wanted)
}

/// Whether bytes are an index, a manifest or the challenge of a registry. The image is looked for where all blobs have these
/// bytes.
pub(crate) fn means_something(bytes: &[u8]) -> bool {
    struct Same<'a>(&'a [u8]);
    impl Source for Same<'_> {
        fn open(&self, _: &Descriptor) -> Result<Box<dyn Read + '_>, OciError> {
            Ok(Box::new(self.0))
        }
    }
    let (source, wanted) = (Same(bytes), Platform::host());
    let choice = || manifest::Choice::new(&source, &wanted);
    let _ = choice().of_layout(bytes, None);
    let _ = choice().of_document(Digest::of(bytes), bytes);
    manifest::is_document(bytes) || registry::is_challenge(bytes)
}

/// Imports the layers of an image, durably. Blocks.
///
/// # Errors
///
/// Names the layer that can't be read, or that has another digest. Nothing becomes visible in the store.
pub(crate) fn import(
    store: &Store,
    source: &dyn Source,
    manifest: &Manifest,
    limits: Limits,
) -> Result<(Node, Lost), OciError> {
    let mut stack = Stack::new(store, limits, manifest.layers.len());
    for layer in &manifest.layers {
        stack.add(layer.digest, DigestOf::Packed(layer.size), || source.open(layer))?;
    }
    stack.finish()
}

/// Imports the layers of a saved image, durably. Blocks.
///
/// # Errors
///
/// As [`import`].
pub(crate) fn import_saved(
    store: &Store,
    files: &Files,
    saved: &Saved,
    limits: Limits,
) -> Result<(Node, Lost), OciError> {
    let mut stack = Stack::new(store, limits, saved.layers.len());
    for (path, digest) in &saved.layers {
        stack.add(*digest, DigestOf::Plain, || match files.get(path)? {
            Some(packed) => Ok(packed),
            None => Err(OciError::malformed("manifest.json", format!("names {path:?}, which the archive lacks"))),
        })?;
    }
    stack.finish()
}

#[cfg(test)]
mod tests;
