//! NAR, Nix's archive format: each tree has one canonical stream of bytes.
//!
//! ```text
//!   str(s)  = length of s as 64 bits, little-endian · s · zeros up to a multiple of 8 bytes
//!   archive = str("nix-archive-1") node
//!   node    = str("(") str("type") kind str(")")
//!   kind    = str("regular") [str("executable") str("")] str("contents") str(CONTENTS)
//!           | str("symlink") str("target") str(TARGET)
//!           | str("directory") { str("entry") str("(") str("name") str(NAME) str("node") node str(")") }
//! ```
//!
//! Entries are sorted by name, bytewise. A NAR contains exactly the information of a castore node. Nix identifies a tree by
//! the SHA-256 of the stream, the NAR hash.

mod read;
#[cfg(test)]
mod tests;
mod write;

pub use read::{import, import_next};
pub use write::{NarInfo, info, write};

const MAGIC: &[u8] = b"nix-archive-1";

/// Strings start and end at multiples of this many bytes.
const ALIGNMENT: u64 = 8;

/// Number of zeros after a string of this length.
fn padding(length: u64) -> usize {
    // Less than 8, so no bit is lost.
    (length.wrapping_neg() % ALIGNMENT) as usize
}
