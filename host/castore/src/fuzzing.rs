//! Entry points for fuzzers to decoders that are otherwise reached only through a whole store. Not part of the API.

use cofferdam_proto::EncodedDirectory;

pub use crate::objectstore::fuzzing::{chunk, chunk_list, tree_object};
use crate::{Directory, grpc};

/// Decodes a directory as it comes over gRPC.
pub fn message(bytes: &[u8]) -> Option<Directory> {
    grpc::decode_checked(&EncodedDirectory::from(bytes.to_vec())).ok()
}
