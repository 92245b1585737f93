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
mod layout;
mod manifest;
mod platform;
mod registry;

use std::io::Read;

use cofferdam_castore::{
    Node, Store,
    archive::{ArchiveError, Limits, decompress},
    import::Lost,
    tar::Layers,
};

pub(crate) use digest::Digest;
pub(crate) use docker::Saved;
pub(crate) use error::OciError;
pub(crate) use layout::Files;
pub(crate) use manifest::{Descriptor, Manifest};
pub(crate) use platform::Platform;
pub(crate) use registry::{Reference, Registry, login_file};

use digest::Hashed;

/// Where an image's blobs come from.
pub(crate) trait Source {
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
        // One byte more than there may be shows in the digest.
        let mut packed = Hashed::new(source.open(layer)?.take(layer.size.saturating_add(1)));
        let applied = decompress(&mut packed).and_then(|plain| stack.layers.apply(plain));
        stack.check(layer.digest, packed, applied)?;
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
        let Some((_, packed)) = files.get(path)? else {
            return Err(OciError::malformed("manifest.json", format!("names {path:?}, which the archive lacks")));
        };
        let plain = decompress(packed).map_err(|source| stack.failed(source))?;
        let mut plain = Hashed::new(plain.take(limits.bytes));
        let applied = stack.layers.apply(&mut plain);
        stack.check(*digest, plain, applied)?;
    }
    stack.finish()
}

/// The layers that are imported.
struct Stack {
    layers: Layers,
    /// The number of the current one, from 1.
    number: usize,
    of: usize,
}

impl Stack {
    fn new(store: &Store, limits: Limits, of: usize) -> Self {
        Self { layers: Layers::new(store, limits), number: 1, of }
    }

    fn failed(&self, source: ArchiveError) -> OciError {
        OciError::Layer { number: self.number, of: self.of, source }
    }

    /// Ends a layer. Where it has another digest, that is the reason for whatever else is wrong with it.
    fn check<R: Read>(
        &mut self,
        expected: Digest,
        read: Hashed<R>,
        applied: Result<(), ArchiveError>,
    ) -> Result<(), OciError> {
        match applied {
            // The limits are there to stop reading.
            Err(error @ (ArchiveError::Limit { .. } | ArchiveError::Store { .. })) => return Err(self.failed(error)),
            Err(ArchiveError::Read { at, source }) if source.raw_os_error().is_some() => {
                return Err(self.failed(ArchiveError::Read { at, source }));
            }
            _ => {}
        }
        let at = format!("layer {} of {}", self.number, self.of);
        match read.digest() {
            Ok(found) if found != expected => return Err(OciError::Digest { at, expected, found }),
            Ok(_) => applied.map_err(|error| self.failed(error))?,
            Err(source) => match applied {
                Ok(()) => return Err(OciError::Read { at, source }),
                Err(error) => return Err(self.failed(error)),
            },
        }
        self.number += 1;
        Ok(())
    }

    fn finish(self) -> Result<(Node, Lost), OciError> {
        let (number, of) = (self.of, self.of);
        self.layers.finish().map_err(|source| OciError::Layer { number, of, source })
    }
}

#[cfg(test)]
mod tests;
