use std::{
    io::{self, Cursor},
    sync::Arc,
};

use async_trait::async_trait;
use bytes::Bytes;

use super::{
    Kind, Objects,
    chunks::{self, Chunk},
    reader::ChunkedReader,
    spawn,
    writer::ChunkingWriter,
};
use crate::{B3Digest, BlobReader, BlobService, BlobWriter, proto::stat_blob_response::ChunkMeta};

/// Blobs in an object store, in the layout of snix.
///
/// Everyone finds a blob as soon as it is closed, even one of a [`batch`](BlobService::batch). A writer that is dropped may
/// leave chunks, which do no harm: each is a blob of its own.
#[derive(Debug, Clone)]
pub struct ObjectStoreBlobService {
    objects: Arc<Objects>,
}

enum Found {
    Contents(Bytes),
    Chunks(Vec<Chunk>),
}

impl ObjectStoreBlobService {
    pub(crate) fn new(objects: Arc<Objects>) -> Self {
        Self { objects }
    }
}

#[async_trait]
impl BlobService for ObjectStoreBlobService {
    async fn has(&self, digest: &B3Digest) -> io::Result<bool> {
        if *digest == B3Digest::EMPTY {
            return Ok(true);
        }
        let (objects, digest) = (self.objects.clone(), *digest);
        spawn(async move {
            // Most blobs are one chunk.
            Ok(objects.has(Kind::Chunk, &digest).await? || objects.has(Kind::ChunkList, &digest).await?)
        })
        .await
    }

    async fn chunks(&self, digest: &B3Digest) -> io::Result<Option<Vec<ChunkMeta>>> {
        let (objects, blob) = (self.objects.clone(), *digest);
        match spawn(async move { chunks::get_list(&objects, &blob).await }).await? {
            Some(chunks) => Ok(Some(chunks.iter().map(Chunk::meta).collect())),
            None => Ok(self.has(digest).await?.then(Vec::new)),
        }
    }

    async fn open_read(&self, digest: &B3Digest) -> io::Result<Option<Box<dyn BlobReader>>> {
        if *digest == B3Digest::EMPTY {
            return Ok(Some(Box::new(Cursor::new([]))));
        }
        let (objects, digest) = (self.objects.clone(), *digest);
        let find = async move {
            Ok(match chunks::get(&objects, &digest).await? {
                Some(contents) => Some(Found::Contents(contents)),
                None => chunks::get_list(&objects, &digest).await?.map(Found::Chunks),
            })
        };
        Ok(spawn(find).await?.map(|found| -> Box<dyn BlobReader> {
            match found {
                Found::Contents(contents) => Box::new(Cursor::new(contents)),
                Found::Chunks(chunks) => Box::new(ChunkedReader::new(self.objects.clone(), digest, chunks)),
            }
        }))
    }

    async fn open_write(&self) -> Box<dyn BlobWriter> {
        Box::new(ChunkingWriter::new(self.objects.clone()))
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn batch(&self) -> Arc<dyn BlobService> {
        Arc::new(self.clone())
    }

    async fn commit(&self) -> io::Result<()> {
        self.objects.sync()
    }
}
