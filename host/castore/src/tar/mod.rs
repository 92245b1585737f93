//! tar: the archive that everybody has. Holds a directory's entries.
//!
//! What is read: ustar, GNU (long names, sparse files) and PAX. Of each entry castore keeps the path, the kind, the
//! contents or the target and the owner's execute bit. A later entry replaces an earlier file or symbolic link of its path,
//! as it would in a file system; a hard link becomes what its target is at that point. Nothing is ever followed.
//!
//! What is written: GNU, sorted by path, owned by 0:0, a second after 1970; one tree always gives the same bytes.

mod read;
#[cfg(test)]
mod tests;
mod tree;
mod write;

pub use read::import;
pub use write::write;
