//! Where the contents of files are kept.

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
mod from_addr;
mod layout;
mod lease;
mod local;
mod local_gc;
pub(crate) mod local_io;
mod memory;
mod staging;
mod verified;

pub use from_addr::from_addr;
pub(crate) use layout::check_layout;
pub use lease::Lease;
pub(crate) use lease::{decode_node, encode_node};
pub use local::LocalBlobService;
pub(crate) use local_gc::{Age, PENDING_BLOBS, PENDING_TREES, digest_of, digests_in};
pub use memory::MemoryBlobService;
pub(crate) use staging::lock;

use crate::{B3Digest, Node, proto::stat_blob_response::ChunkMeta};
pub use crate::{near::NearBlobService, objectstore::ObjectStoreBlobService};

/// Holds blobs: contents of files, named by their digest. The empty blob is always there.
#[async_trait]
pub trait BlobService: Send + Sync {
    /// Whether the blob can be read.
    async fn has(&self, digest: &B3Digest) -> io::Result<bool>;

    /// The chunks that make the blob, in order, each of which can be read like a blob; none where it is not chunked.
    /// `None` when there is no such blob.
    async fn chunks(&self, digest: &B3Digest) -> io::Result<Option<Vec<ChunkMeta>>> {
        Ok(self.has(digest).await?.then(Vec::new))
    }

    /// The blob's contents from their start; `None` when there is no such blob.
    async fn open_read(&self, digest: &B3Digest) -> io::Result<Option<Box<dyn BlobReader>>>;

    /// Starts a blob; it comes into being with [`BlobWriter::close`].
    async fn open_write(&self) -> Box<dyn BlobWriter>;

    /// A read-only descriptor of the whole blob, at its start and with an offset of its own.
    ///
    /// Unless a service has the blob in a file, this is a copy: a small one in memory, a large one in a file without a
    /// name.
    async fn open_file(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        match self.open_read(digest).await? {
            Some(reader) => sealed_copy(reader).await.map(Some),
            None => Ok(None),
        }
    }

    /// Whether to read a blob may take long, since it may have to come from elsewhere: then it pays to ask for several at a
    /// time.
    fn is_far(&self) -> bool {
        false
    }

    /// As [`open_file`](Self::open_file), for whoever may need the blob soon: `None`, too, when it is not at hand. A service
    /// that has to fetch it may begin to.
    async fn open_file_at_hand(&self, _digest: &B3Digest) -> io::Result<Option<File>> {
        Ok(None)
    }

    /// This service for one job: what is written through the result is found through it alone until its
    /// [`commit`](Self::commit), and is gone when it is dropped before. A service that can't hold back what is written
    /// says so; others see its blobs as soon as they are closed.
    fn batch(&self) -> Arc<dyn BlobService>;

    /// Keeps these nodes and all below them from being collected as garbage, until the result is dropped or the process ends:
    /// what is found by [`has`](Self::has) after this call stays. Does nothing where nothing is ever collected.
    fn lease(&self, _nodes: &[Node]) -> io::Result<Lease> {
        Ok(Lease::default())
    }

    /// Makes every blob durable that was closed or found through this service so far, and visible to others.
    async fn commit(&self) -> io::Result<()>;
}

/// Reads a blob from anywhere in it.
pub trait BlobReader: AsyncRead + AsyncSeek + Send + Unpin {}

impl<T: AsyncRead + AsyncSeek + Send + Unpin + ?Sized> BlobReader for T {}

/// Writes a blob. Dropped before [`BlobWriter::close`], it leaves nothing.
#[async_trait]
pub trait BlobWriter: AsyncWrite + Send + Unpin {
    /// Ends the blob: from now on the service has it. Called again, it returns the same digest; writing is an error.
    async fn close(&mut self) -> io::Result<B3Digest>;
}

const COPY_BYTES: usize = 128 * 1024;

/// The largest copy of a blob in memory.
const MAX_MEMORY_BYTES: u64 = 16 * 1024 * 1024;

async fn sealed_copy(mut reader: Box<dyn BlobReader>) -> io::Result<File> {
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
    // Opened anew, so that the descriptor can't be written to even without the seals.
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

pub(crate) fn written_after_close() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the blob has been closed and can't be written to")
}

/// What a writer answers whose blob is not whole.
pub(crate) fn written_after_failure() -> io::Error {
    io::Error::other("an earlier write to this blob failed; write it anew")
}
