//! tar archives, which hold the entries of a directory.
//!
//! Reading understands ustar, GNU (long names, sparse files) and PAX (long names, sparse files). Of each entry castore keeps the path, the kind, the
//! contents or the target, and the owner's execute bit. A later entry replaces an earlier file or symbolic link with the same
//! path, as in a file system. A hard link becomes a copy of its target at that point. Symbolic links are never followed.
//!
//! A root, or the layers of an image, are read with other rules: see [`import_root`] and [`Layers`].
//!
//! Writing produces GNU format, sorted by path, owned by 0:0, with times one second after 1970. A tree always gives the same
//! bytes.

mod layers;
mod members;
mod overlay;
mod read;
mod sparse;
#[cfg(test)]
mod tests;
mod tree;
mod write;

pub use layers::{Layers, import_root};
pub use members::{Member, members};
pub use read::import;
pub use write::write;
