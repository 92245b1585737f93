//! Doors for fuzzers, to decoders that others reach through a whole store only. No part of the API.

use prost::Message as _;

pub use crate::objectstore::fuzzing::{chunk, chunk_list, tree_object};
use crate::{Directory, grpc::EncodedDirectory};

/// A directory as it comes over gRPC.
pub fn message(bytes: &[u8]) -> Option<Directory> {
    EncodedDirectory::decode(bytes).ok()?.decode_checked().ok()
}
