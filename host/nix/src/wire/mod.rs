//! The primitives of Nix's worker protocol.
//!
//! ```text
//!   integer = 64 bits, little-endian
//!   string  = its length · its bytes · zeros up to a multiple of 8
//!   list    = the number of its elements · the elements
//!   framed  = { a length that is not 0 · so many bytes } · 0
//! ```

mod framed;
mod read;
mod write;

pub use framed::Framed;
pub use read::{MAX_MESSAGE_BYTES, Reader};
pub use write::Writer;

use std::io;

/// Strings start and end at multiples of this many bytes.
const ALIGNMENT: u64 = 8;

/// Number of zeros after a string of this length.
fn padding(length: u64) -> usize {
    // Less than 8, so no bit is lost.
    (length.wrapping_neg() % ALIGNMENT) as usize
}

/// Why a message can't be read.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The bytes can't be read, or end too early.
    #[error("the connection was cut")]
    Io(#[from] io::Error),
    /// A field breaks a rule.
    #[error("{field} {rule}")]
    Broken {
        /// The field, as in "the path".
        field: &'static str,
        /// The rule and the value, as in "must be 0 or 1, not 7".
        rule: String,
    },
}

impl WireError {
    /// This field breaks this rule.
    pub fn broken(field: &'static str, rule: impl Into<String>) -> Self {
        Self::Broken { field, rule: rule.into() }
    }
}

#[cfg(test)]
mod tests;
