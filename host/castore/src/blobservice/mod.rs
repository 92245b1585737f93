use std::{fs::File, io, os::fd::AsRawFd as _, sync::Arc};

use async_trait::async_trait;
use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncSeek, AsyncWrite};

#[cfg(test)]
mod conformance;
mod local;
mod local_io;
mod memory;
mod staging;

pub use local::LocalBlobService;
pub use memory::MemoryBlobService;

use crate::B3Digest;

/// Holds blobs: contents of files, named by their digest. The empty blob is always there.
#[async_trait]
pub trait BlobService: Send + Sync {
    /// Whether the blob can be read.
    async fn has(&self, digest: &B3Digest) -> io::Result<bool>;

    /// The blob's contents from their start; `None` when there is no such blob.
    async fn open_read(&self, digest: &B3Digest) -> io::Result<Option<Box<dyn BlobReader>>>;

    /// Starts a blob; it comes into being with [`BlobWriter::close`].
    async fn open_write(&self) -> Box<dyn BlobWriter>;

    /// A read-only descriptor of the whole blob, at its start and with an offset of its own.
    ///
    /// Unless a service has the blob in a file, this is a sealed copy in memory.
    async fn open_file(&self, digest: &B3Digest) -> io::Result<Option<File>> {
        match self.open_read(digest).await? {
            Some(reader) => sealed_copy(reader).await.map(Some),
            None => Ok(None),
        }
    }

    /// This service for one job: what is written through the result is found through it alone until its
    /// [`commit`](Self::commit), and is gone when it is dropped before.
    fn batch(&self) -> Arc<dyn BlobService>;

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

async fn sealed_copy(mut reader: Box<dyn BlobReader>) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"blob", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    let mut buffer = vec![0; COPY_BYTES];
    loop {
        let read = reader.read(&mut buffer).await?;
        if read == 0 {
            break;
        }
        io::Write::write_all(&mut file, &buffer[..read])?;
    }
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::all()))?;
    // Opened anew, so that the descriptor can't be written to even without the seals.
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn written_after_close() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the blob has been closed and can't be written to")
}
