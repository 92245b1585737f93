//! See [`crate::fuzzing`].

use futures::{StreamExt as _, channel::mpsc, executor::block_on, future::join};
use object_store::{memory::InMemory, path::Path};

use super::{Kind, Objects, chunks, compression, directories};
use crate::{B3Digest, DirectoryMemory};

/// Limit for a decompressed object.
const MAX_BYTES: usize = 1 << 20;

fn with(kind: Kind, digest: &B3Digest, object: &[u8]) -> Objects {
    let objects = Objects { store: std::sync::Arc::new(InMemory::new()), base: Path::default(), local: None };
    // Putting into memory does not fail.
    let _ = block_on(objects.put(kind, digest, object.to_vec()));
    objects
}

/// The sizes of the chunks in a list.
pub fn chunk_list(object: &[u8]) -> Option<Vec<u64>> {
    let blob = B3Digest::EMPTY;
    let list = block_on(chunks::get_list(&with(Kind::ChunkList, &blob, object), &blob));
    Some(list.ok()??.iter().map(|chunk| chunk.size).collect())
}

/// Whether a chunk can be decompressed.
pub fn chunk(object: &[u8]) -> bool {
    compression::decompress(object, MAX_BYTES).is_ok_and(|contents| {
        assert!(contents.len() <= MAX_BYTES + 1);
        true
    })
}

/// Whether the object is a whole tree, when it has the name of its first directory.
pub fn tree_object(object: &[u8]) -> bool {
    let plain = compression::decompress(object, MAX_BYTES).unwrap_or_default();
    let first = plain.split_first_chunk().and_then(|(length, rest)| rest.get(..u32::from_be_bytes(*length) as usize));
    let root = B3Digest::of(first.unwrap_or_default());
    let objects = with(Kind::Tree, &root, object);
    let (sender, received) = mpsc::channel(1);
    let (ended, directories) = block_on(join(
        directories::download(objects.into(), root, DirectoryMemory::unlimited(), sender),
        received.collect::<Vec<_>>(),
    ));
    ended.is_ok() && directories.first().is_some_and(|directory| directory.digest() == root)
}
