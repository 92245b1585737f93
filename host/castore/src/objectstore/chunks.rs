//! Chunks, and the lists of chunks that make up blobs.

use std::{io, sync::Arc};

use bytes::Bytes;
use prost::{
    Message as _,
    encoding::{DecodeContext, decode_key, skip_field},
};

use super::{
    Kind, Objects,
    compression::{compress, decompress},
    damaged,
};
use crate::{
    B3Digest,
    proto::{StatBlobResponse, stat_blob_response::ChunkMeta},
};

/// FastCDC's average for new blobs, the same as in snix.
pub(super) const AVERAGE_CHUNK_BYTES: usize = 256 * 1024;
/// FastCDC's minimum for new blobs.
pub(super) const MIN_CHUNK_BYTES: usize = AVERAGE_CHUNK_BYTES / 2;
/// FastCDC's maximum for new blobs.
pub(super) const MAX_CHUNK_BYTES: usize = AVERAGE_CHUNK_BYTES * 2;

/// Largest chunk that is read. Other programs may use another average than [`AVERAGE_CHUNK_BYTES`].
pub(super) const MAX_READ_CHUNK_BYTES: usize = 16 * 1024 * 1024;

/// Largest list of chunks: enough for a blob of half a terabyte with the usual average.
const MAX_LIST_BYTES: usize = 64 * 1024 * 1024;

/// The field number of `StatBlobResponse.chunks`.
const CHUNKS_TAG: u32 = 2;

/// One chunk of a blob.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chunk {
    pub(super) digest: B3Digest,
    /// Its position in the blob.
    pub(super) start: u64,
    pub(super) size: u64,
}

impl Chunk {
    /// The position of its end in the blob.
    pub(super) fn end(&self) -> u64 {
        self.start + self.size
    }

    pub(super) fn meta(&self) -> ChunkMeta {
        ChunkMeta { digest: self.digest.into(), size: self.size }
    }
}

/// Downloads and checks a chunk. `None` when it is missing.
pub(super) async fn get(objects: &Objects, digest: &B3Digest) -> io::Result<Option<Bytes>> {
    let max_compressed_bytes = zstd::zstd_safe::compress_bound(MAX_READ_CHUNK_BYTES);
    let Some(compressed) = objects.get(Kind::Chunk, digest, max_compressed_bytes).await? else { return Ok(None) };
    let contents = decompress(&compressed, MAX_READ_CHUNK_BYTES)
        .map_err(|error| damaged(&format!("the chunk {digest} can't be decompressed ({error})")))?;
    if contents.len() > MAX_READ_CHUNK_BYTES {
        return Err(damaged(&format!("the chunk {digest} is larger than {MAX_READ_CHUNK_BYTES} bytes")));
    }
    let actual = B3Digest::of(&contents);
    if actual != *digest {
        return Err(damaged(&format!("the chunk {digest} has the digest {actual}")));
    }
    Ok(Some(contents.into()))
}

/// Downloads and checks a chunk from a blob's list.
pub(super) async fn get_listed(objects: Arc<Objects>, blob: B3Digest, chunk: Chunk) -> io::Result<Bytes> {
    let Chunk { digest, size, .. } = chunk;
    let Some(contents) = get(&objects, &digest).await? else {
        return Err(damaged(&format!("the chunk {digest} of the blob {blob} is missing")));
    };
    if contents.len() as u64 != size {
        let actual = contents.len();
        return Err(damaged(&format!(
            "the chunk {digest} of the blob {blob} has {actual} bytes, not {size} as listed"
        )));
    }
    Ok(contents)
}

/// Stores a chunk if it is missing.
pub(super) async fn put(objects: Arc<Objects>, contents: Vec<u8>) -> io::Result<ChunkMeta> {
    let digest = B3Digest::of(&contents);
    if !objects.has(Kind::Chunk, &digest).await? {
        objects.put(Kind::Chunk, &digest, compress(&contents)?).await?;
    }
    Ok(ChunkMeta { digest: digest.into(), size: contents.len() as u64 })
}

/// Downloads the list of a blob's chunks. `None` when there is no list, or an empty one: then the blob is one chunk.
pub(super) async fn get_list(objects: &Objects, blob: &B3Digest) -> io::Result<Option<Vec<Chunk>>> {
    let Some(encoded) = objects.get(Kind::ChunkList, blob, MAX_LIST_BYTES).await? else { return Ok(None) };
    let mut end = 0_u64;
    let mut chunks = Vec::new();
    for meta in ChunkMetas(encoded) {
        let index = chunks.len();
        let wrong = |what: String| damaged(&format!("chunks[{index}] of the blob {blob}: {what}"));
        let ChunkMeta { digest, size } = meta.map_err(|error| wrong(error.to_string()))?;
        let digest = B3Digest::try_from(digest.as_ref()).map_err(|error| wrong(error.to_string()))?;
        if size == 0 || size > MAX_READ_CHUNK_BYTES as u64 {
            return Err(wrong(format!("size: {size} is not from 1 to {MAX_READ_CHUNK_BYTES}")));
        }
        chunks.push(Chunk { digest, start: end, size });
        // The list is too short for an overflow.
        end += size;
    }
    Ok(if chunks.is_empty() { None } else { Some(chunks) })
}

/// Decodes the chunks of a `StatBlobResponse` one at a time: all together, empty ones would take 20 times their encoded size.
struct ChunkMetas(Bytes);

impl Iterator for ChunkMetas {
    type Item = Result<ChunkMeta, prost::DecodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.decode_next().transpose();
        if matches!(next, Some(Err(_))) {
            self.0.clear();
        }
        next
    }
}

impl ChunkMetas {
    fn decode_next(&mut self) -> Result<Option<ChunkMeta>, prost::DecodeError> {
        while !self.0.is_empty() {
            let (tag, wire_type) = decode_key(&mut self.0)?;
            if tag != CHUNKS_TAG {
                skip_field(wire_type, tag, &mut self.0, DecodeContext::default())?;
                continue;
            }
            return ChunkMeta::decode_length_delimited(&mut self.0).map(Some);
        }
        Ok(None)
    }
}

/// Stores the list of a blob's chunks, which have been stored before.
pub(super) async fn put_list(objects: Arc<Objects>, blob: B3Digest, chunks: Vec<ChunkMeta>) -> io::Result<()> {
    let list = StatBlobResponse { chunks, ..StatBlobResponse::default() };
    objects.put(Kind::ChunkList, &blob, list.encode_to_vec()).await
}
