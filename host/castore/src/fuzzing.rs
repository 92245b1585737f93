//! Entry points for fuzzers to decoders that are otherwise reached only through a whole store. Not part of the API.

use prost::Message as _;

pub use crate::objectstore::fuzzing::{chunk, chunk_list, tree_object};
use crate::{Directory, grpc::EncodedDirectory};

/// Decodes a directory as it comes over gRPC.
pub fn message(bytes: &[u8]) -> Option<Directory> {
    EncodedDirectory::decode(bytes).ok()?.decode_checked().ok()
}
