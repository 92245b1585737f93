use std::{
    collections::{HashMap, HashSet, VecDeque},
    io::{self, Write as _},
    sync::Arc,
};

use async_trait::async_trait;
use bytes::{Buf as _, Bytes};
use futures::{FutureExt as _, SinkExt as _, StreamExt as _, TryStreamExt as _, channel::mpsc, stream::BoxStream};
use object_store::{ObjectStoreExt as _, buffered::BufWriter};
use tokio::io::AsyncWriteExt as _;

use super::{Kind, Objects, compression::FrameDecoder, damaged, spawn};
use crate::{
    B3Digest, Directory, DirectoryMemory, DirectoryPutter, DirectoryService,
    directory::MAX_DIRECTORY_BYTES,
    directoryservice::{LeavesFirst, check_tree_size, decode_verified},
};

/// Directories that are decoded before the reader asks for them.
const AHEAD: usize = 16;

/// Compressed bytes that are uploaded at a time.
const PIECE_BYTES: usize = 64 * 1024;

/// Directories in an object store, in the layout of snix: each tree is one object, named by its root.
///
/// So only directories that were put as roots can be got, not those below them. A single directory can be put only if each
/// of its children was put as a root.
#[derive(Debug, Clone)]
pub struct ObjectStoreDirectoryService {
    objects: Arc<Objects>,
}

impl ObjectStoreDirectoryService {
    pub(crate) fn new(objects: Arc<Objects>) -> Self {
        Self { objects }
    }

    /// Puts a whole tree.
    async fn put_tree(&self, root: B3Digest, encoded: HashMap<B3Digest, Directory>) -> io::Result<()> {
        let objects = self.objects.clone();
        spawn(async move {
            if !objects.has(Kind::Tree, &root).await? {
                upload(&objects, root, encoded).await?;
            }
            objects.sync()
        })
        .await
    }
}

#[async_trait]
impl DirectoryService for ObjectStoreDirectoryService {
    async fn get(&self, digest: &B3Digest) -> io::Result<Option<Directory>> {
        self.get_recursive(digest).try_next().await
    }

    async fn put(&self, directory: Directory) -> io::Result<B3Digest> {
        let digest = check_size(&directory)?;
        let (mut tree, mut bytes) = (HashMap::new(), 0);
        for (child, _) in directory.children() {
            if tree.contains_key(&child) {
                continue;
            }
            let mut below = self.get_recursive(&child);
            let mut missing = true;
            while let Some(directory) = below.try_next().await? {
                let encoded = directory.encode();
                if tree.insert(B3Digest::of(&encoded), directory).is_none() {
                    bytes += encoded.len();
                    check_tree_size(tree.len(), bytes)?;
                }
                missing = false;
            }
            if missing {
                let message =
                    format!("the directory {digest} can't be put before its child {child}: put the whole tree");
                return Err(io::Error::new(io::ErrorKind::NotFound, message));
            }
        }
        tree.insert(digest, directory);
        self.put_tree(digest, tree).await?;
        Ok(digest)
    }

    fn get_recursive(&self, root: &B3Digest) -> BoxStream<'_, io::Result<Directory>> {
        self.get_recursive_within(root, &DirectoryMemory::unlimited())
    }

    fn get_recursive_within(&self, root: &B3Digest, memory: &DirectoryMemory) -> BoxStream<'_, io::Result<Directory>> {
        let (directories, received) = mpsc::channel(AHEAD);
        let download = spawn(download(self.objects.clone(), *root, memory.clone(), directories));
        // The task's result comes last, so that an error or a panic ends the stream with an error.
        let end = download.map(|ended| ended.err().map(Err)).into_stream();
        received.map(Ok).chain(end.filter_map(std::future::ready)).boxed()
    }

    fn put_multiple_start(&self) -> Box<dyn DirectoryPutter + '_> {
        Box::new(ObjectStoreDirectoryPutter { service: self, order: LeavesFirst::default(), tree: HashMap::new() })
    }
}

/// Collects a tree, which becomes one object in the end.
struct ObjectStoreDirectoryPutter<'a> {
    service: &'a ObjectStoreDirectoryService,
    order: LeavesFirst,
    tree: HashMap<B3Digest, Directory>,
}

#[async_trait]
impl DirectoryPutter for ObjectStoreDirectoryPutter<'_> {
    async fn put(&mut self, directory: Directory) -> io::Result<()> {
        let digest = check_size(&directory)?;
        if self.order.admit(digest, &directory)? {
            self.tree.insert(digest, directory);
        }
        Ok(())
    }

    async fn close(&mut self) -> io::Result<B3Digest> {
        let root = self.order.close()?;
        self.service.put_tree(root, std::mem::take(&mut self.tree)).await?;
        Ok(root)
    }
}

/// The digest of a directory, if it is not too large.
fn check_size(directory: &Directory) -> io::Result<B3Digest> {
    let encoded = directory.encode();
    let digest = B3Digest::of(&encoded);
    if encoded.len() <= MAX_DIRECTORY_BYTES {
        return Ok(digest);
    }
    let message = format!(
        "the directory {digest} takes {} bytes; an object store takes at most {MAX_DIRECTORY_BYTES}",
        encoded.len()
    );
    Err(io::Error::new(io::ErrorKind::InvalidInput, message))
}

/// Uploads a tree, breadth first from its root.
async fn upload(objects: &Objects, root: B3Digest, mut tree: HashMap<B3Digest, Directory>) -> io::Result<()> {
    let mut upload = BufWriter::new(objects.store.clone(), objects.path(Kind::Tree, &root));
    let mut encoder = zstd::Encoder::new(Vec::new(), zstd::DEFAULT_COMPRESSION_LEVEL)?;
    let mut waiting = VecDeque::from([root]);
    let (directories, mut bytes) = (tree.len(), 0);
    while let Some(digest) = waiting.pop_front() {
        // A directory that was taken out before is in the object already.
        let Some(directory) = tree.remove(&digest) else { continue };
        waiting.extend(directory.children().map(|(child, _)| child));
        let encoded = directory.encode();
        bytes += encoded.len();
        if let Err(too_large) = check_tree_size(directories, bytes) {
            // A failure leaves parts that do no harm.
            let _ = upload.abort().await;
            return Err(in_tree(&root, &too_large));
        }
        let length = u32::try_from(encoded.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        encoder.write_all(&length.to_be_bytes())?;
        encoder.write_all(&encoded)?;
        if encoder.get_ref().len() >= PIECE_BYTES {
            upload.write_all(&std::mem::take(encoder.get_mut())).await?;
        }
    }
    upload.write_all(&encoder.finish()?).await?;
    upload.shutdown().await
}

/// Sends the checked directories of a tree to `to`. Each, except the root, must be referred to by an earlier one, and come
/// once. The download ends when all of them have come, and ignores the rest of the object.
pub(super) async fn download(
    objects: Arc<Objects>,
    root: B3Digest,
    memory: DirectoryMemory,
    mut to: mpsc::Sender<Directory>,
) -> io::Result<()> {
    let found = match objects.store.get(&objects.path(Kind::Tree, &root)).await {
        Ok(found) => found,
        Err(object_store::Error::NotFound { .. }) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let mut frames = Frames {
        root,
        compressed: found.into_stream(),
        piece: Bytes::new(),
        decoder: FrameDecoder::new()?,
        decoded: Vec::new(),
    };
    let mut announced = HashSet::from([root]);
    let mut waiting = announced.clone();
    let mut bytes = 0;
    while !waiting.is_empty() {
        let Some(encoded) = frames.next().await? else {
            let missing = waiting.into_iter().next().unwrap_or(root);
            let message = format!("the directory {missing}, which is below {root}, is not in the store");
            return Err(io::Error::new(io::ErrorKind::NotFound, message));
        };
        let digest = B3Digest::of(&encoded);
        if !waiting.remove(&digest) {
            return Err(damaged(&format!("the tree {root} has the directory {digest}, which is out of place")));
        }
        memory.take(&encoded)?;
        let directory = decode_verified(&digest, &encoded)?;
        waiting.extend(directory.children().map(|(child, _)| child).filter(|child| announced.insert(*child)));
        bytes += encoded.len();
        check_tree_size(announced.len(), bytes).map_err(|error| in_tree(&root, &error))?;
        if to.send(directory).await.is_err() {
            // The reader is gone.
            break;
        }
    }
    Ok(())
}

fn in_tree(root: &B3Digest, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("the tree {root}: {error}"))
}

/// The length-delimited messages of a compressed object.
struct Frames {
    root: B3Digest,
    compressed: BoxStream<'static, object_store::Result<Bytes>>,
    piece: Bytes,
    decoder: FrameDecoder,
    decoded: Vec<u8>,
}

impl Frames {
    async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        const PREFIX: usize = size_of::<u32>();
        if !self.fill(PREFIX).await? {
            return if self.decoded.is_empty() { Ok(None) } else { Err(self.damaged("ends within a length")) };
        }
        let prefix = self.decoded.first_chunk::<PREFIX>().copied().unwrap_or_default();
        let length = u32::from_be_bytes(prefix) as usize;
        if length > MAX_DIRECTORY_BYTES {
            return Err(self.damaged(&format!("has a directory of {length} bytes, over {MAX_DIRECTORY_BYTES}")));
        }
        if !self.fill(PREFIX + length).await? {
            return Err(self.damaged("ends within a directory"));
        }
        let rest = self.decoded.split_off(PREFIX + length);
        let mut message = std::mem::replace(&mut self.decoded, rest);
        message.drain(..PREFIX);
        Ok(Some(message))
    }

    /// Decodes until there are `bytes` bytes. `false` when the object ends before.
    async fn fill(&mut self, bytes: usize) -> io::Result<bool> {
        while self.decoded.len() < bytes {
            let (taken, output) = match self.decoder.step(&self.piece) {
                Ok((taken, output)) => (taken, output),
                Err(error) => return Err(self.damaged(&format!("can't be decompressed ({error})"))),
            };
            self.piece.advance(taken);
            self.decoded.extend_from_slice(output);
            if taken == 0 && output.is_empty() {
                match self.compressed.try_next().await? {
                    Some(piece) if self.piece.is_empty() => self.piece = piece,
                    _ => return Ok(false),
                }
            }
        }
        Ok(true)
    }

    fn damaged(&self, what: &str) -> io::Error {
        damaged(&format!("the tree {} {what}", self.root))
    }
}
