//! The formats of Nix, without a store and without I/O of its own.
//!
//! ```text
//!   bytes of a client ──wire::Reader──▶ Derivation, PathInfo, StorePath, … ──wire::Writer──▶ bytes for it
//! ```
//!
//! Every byte that is read may come from an attacker. A [`wire::Reader`] has a budget for each message, so that memory grows
//! with the bytes that have arrived and never with a length that a client names. Each error names the field, the rule and the
//! value.
//!
//! - `wire`: integers, strings and lists of the worker protocol; framed sources
//! - `protocol`: versions, operations, messages of a server, results of builds
//! - `attributes`: what a derivation asks of its builder
//! - `derivation`: derivations, on the wire and as text
//! - `derived_path`: what a client wants built
//! - `realisation`: what outputs have become whose paths follow from their contents
//! - `path_info`, `content_address`, `store_path`, `hash`, `base32`: what they consist of

mod attributes;
pub mod base32;
mod content_address;
mod derivation;
mod derived_path;
mod hash;
mod path_info;
pub mod protocol;
mod realisation;
mod store_path;
pub mod wire;

pub use attributes::{AttributeFiles, Attributes, Checks, Graph};
pub use content_address::{ContentAddress, Method};
pub use derivation::{Derivation, DerivationError, Modulo, Output, Placeholders};
pub use derived_path::{DerivedPath, OutputNames};
pub use hash::{Algorithm, Hash, HashError};
pub use path_info::PathInfo;
pub use realisation::{OutputId, Realisation};
pub use store_path::{STORE_DIR, StorePath, StorePathError};

/// The first 64 bytes with escapes, so that an error that quotes them stays on one line.
fn quoted(bytes: &[u8]) -> String {
    const SHOWN_BYTES: usize = 64;
    let shown = bytes[..bytes.len().min(SHOWN_BYTES)].escape_ascii();
    if bytes.len() > SHOWN_BYTES { format!("\"{shown}…\"") } else { format!("\"{shown}\"") }
}
