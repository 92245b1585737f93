//! Blobs: the contents of files.

use std::{
    fs::File,
    io::{self, Seek as _, Write as _},
    os::fd::AsRawFd as _,
    sync::Arc,
};

use async_trait::async_trait;
use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncSeek, AsyncWrite};

#[cfg(test)]
mod conformance;
mod digests;
mod local;
mod memory;

pub(crate) use digests::DigestBlobService;
pub(crate) use local::{
    Age, Collected, LocalBlobReader, PENDING_BLOBS, PENDING_TREES, check_layout, decode_node, digest_of, digests_in,
    encode_node, lock, mark_damaged, note_collected,
};
pub use local::{Kind, Lease, LocalBlobService};
pub use memory::MemoryBlobService;

use crate::{B3Digest, Node, proto::stat_blob_response::ChunkMeta};
// For users of the crate: nothing in this module uses these.
pub use crate::{cache::CacheBlobService, from_addr::blob_service as from_addr, objectstore::ObjectStoreBlobService};

/// Stores blobs: the contents of files, named by their digest. The empty blob is always there.
///
/// ```
/// # use cofferdam_castore::{B3Digest, blobservice};
/// # use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let blobs = blobservice::from_addr("memory://")?;
///
/// let mut writer = blobs.open_write().await;
/// writer.write_all(b"hello").await?;
/// let digest = writer.close().await?;
/// assert_eq!(digest, B3Digest::of(b"hello"));
/// blobs.commit().await?;
///
/// let mut reader = blobs.open_read(&digest).await?.ok_or("no such blob")?;
/// let mut contents = String::new();
/// reader.read_to_string(&mut contents).await?;
/// assert_eq!(contents, "hello");
/// # Ok(())
/// # }
/// ```
#[async_trait]
pub trait BlobService: Send + Sync {
    /// Whether the blob can be read.
    async fn has(&self, digest: &B3Digest) -> io::Result<bool>;

    /// The same, for a caller that has all contents of the blob. A local store then notices a file of another size than
    /// `bytes`, so that the caller puts the blob again.
    async fn has_whole(&self, digest: &B3Digest, _bytes: u64) -> io::Result<bool> {
        self.has(digest).await
    }

    /// The chunks that make up the blob, in order. Each can be read like a blob. Empty when the blob is not chunked;
    /// `None` when there is no such blob.
    async fn chunks(&self, digest: &B3Digest) -> io::Result<Option<Vec<ChunkMeta>>> {
        Ok(self.has(digest).await?.then(Vec::new))
    }

    /// Opens the blob for reading; `None` when there is no such blob.
    async fn open_read(&self, digest: &B3Digest) -> io::Result<Option<Box<dyn BlobReader>>>;

    /// Starts a blob. The service has it after [`BlobWriter::close`].
    async fn open_write(&self) -> Box<dyn BlobWriter>;

    /// Starts a blob for a writer who must not learn, from the time that it takes, whether the service has it already. A local
    /// store then writes and syncs it in either case. Other services promise nothing.
    async fn open_write_unseen(&self) -> Box<dyn BlobWriter> {
        self.open_write().await
    }

    /// Opens the whole blob as a read-only file, with an offset of its own.
    ///
    /// Unless the service has the blob in a file, this is a copy: a small one is in memory, a large one in an unnamed file.
    async fn open_file(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        match self.open_read(digest).await? {
            Some(reader) => sealed_copy(reader).await.map(Some),
            None => Ok(None),
        }
    }

    /// Whether blobs may have to come over a network, so that it pays to ask for several at a time.
    fn is_remote(&self) -> bool {
        false
    }

    /// As [`open_file`](Self::open_file), for a caller who may need the blob soon. Also `None` when the blob is not ready to
    /// be opened at once; then a service may begin to download it.
    async fn open_file_if_ready(&self, _digest: &B3Digest) -> io::Result<Option<File>> {
        Ok(None)
    }

    /// A batch: the same service, for one job. Only the batch itself finds the blobs that are written through it, until its
    /// [`commit`](Self::commit). Dropping it before discards them.
    ///
    /// A service that can't hold blobs back says so in its documentation; then everyone finds them as soon as they are closed.
    fn batch(&self) -> Arc<dyn BlobService>;

    /// Protects these nodes and everything below them from garbage collection, until the result is dropped or the process
    /// ends. Blobs that [`has`](Self::has) finds after this call stay. Does nothing in a service without garbage collection.
    fn lease(&self, _nodes: &[Node]) -> io::Result<Lease> {
        Ok(Lease::default())
    }

    /// Makes every blob that was closed or found through this service durable, and visible to others.
    async fn commit(&self) -> io::Result<()>;
}

/// Reads a blob, from any position.
pub trait BlobReader: AsyncRead + AsyncSeek + Send + Unpin {}

impl<T: AsyncRead + AsyncSeek + Send + Unpin + ?Sized> BlobReader for T {}

/// Writes a blob. Dropping it before [`BlobWriter::close`] discards what was written.
#[async_trait]
pub trait BlobWriter: AsyncWrite + Send + Unpin {
    /// Completes the blob, which the service has from now on. A second call returns the same digest. Writing afterwards is an
    /// error.
    async fn close(&mut self) -> io::Result<B3Digest>;
}

const COPY_BYTES: usize = 128 * 1024;

/// Largest copy of a blob that is kept in memory.
const MAX_MEMORY_BYTES: u64 = 16 * 1024 * 1024;

/// A read-only copy of a blob.
pub(crate) async fn sealed_copy(mut reader: Box<dyn BlobReader>) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"blob", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    let mut in_memory = true;
    let mut buffer = vec![0; COPY_BYTES];
    loop {
        let read = reader.read(&mut buffer).await?;
        if read == 0 {
            break;
        }
        if in_memory && file.stream_position()? + read as u64 > MAX_MEMORY_BYTES {
            let mut on_disk = tempfile::tempfile()?;
            file.rewind()?;
            io::copy(&mut file, &mut on_disk)?;
            (file, in_memory) = (on_disk, false);
        }
        file.write_all(&buffer[..read])?;
    }
    if in_memory {
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::all()))?;
    }
    // Opened anew, so that the descriptor is read-only even without the seals.
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

pub(crate) fn written_after_close() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the blob is closed and can't be written to")
}

pub(crate) fn written_after_failure() -> io::Error {
    io::Error::other("an earlier write to this blob failed: write it again")
}
