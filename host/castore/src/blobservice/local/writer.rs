//! Writes a local blob. All I/O happens in place: it is never pending.

use std::{
    fs::File,
    io::{self, Write as _},
    os::fd::AsRawFd as _,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use async_trait::async_trait;
use nix::libc;
use tokio::io::AsyncWrite;

use super::{
    super::{BlobWriter, written_after_close, written_after_failure},
    blobs::LocalBlobs,
    staging::at_path,
};
use crate::B3Digest;

/// Blobs up to this size are buffered, and not written at all when the store has them already.
const BUFFER_BYTES: usize = 256 * 1024;

/// A large blob is flushed in pieces of so many bytes while it is being written; otherwise a commit would wait for all of
/// it.
const FLUSH_BYTES: u64 = 8 * 1024 * 1024;

/// Writes one blob. It goes to the staging directory when it outgrows the buffer, or when the store does not have it.
pub(super) struct LocalBlobWriter {
    blobs: Arc<LocalBlobs>,
    state: State,
    /// Whether the blob is not written if the store has it.
    looks: bool,
}

enum State {
    Small(Vec<u8>),
    Large(Box<Large>),
    Closed(B3Digest),
    /// A write failed, so the file can't become a blob.
    Broken,
}

/// A blob that has outgrown its buffer.
struct Large {
    hasher: blake3::Hasher,
    file: Unfinished,
    /// Bytes that are flushed or being flushed.
    flushing: u64,
}

impl LocalBlobWriter {
    pub(super) fn new(blobs: Arc<LocalBlobs>) -> Self {
        Self { blobs, state: State::Small(Vec::new()), looks: true }
    }

    /// A writer that writes the blob even if the store has it.
    pub(super) fn unseen(blobs: Arc<LocalBlobs>) -> Self {
        Self { looks: false, ..Self::new(blobs) }
    }

    fn is_there(&self, digest: &B3Digest, bytes: u64) -> io::Result<bool> {
        Ok(*digest == B3Digest::EMPTY || (self.looks && self.blobs.has(digest, Some(bytes))?))
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match std::mem::replace(&mut self.state, State::Broken) {
            State::Small(mut buffer) if buffer.len() + bytes.len() <= BUFFER_BYTES => {
                buffer.extend_from_slice(bytes);
                self.state = State::Small(buffer);
            }
            State::Small(buffer) => {
                let file = Unfinished::create(self.blobs.clone())?;
                let mut large = Box::new(Large { hasher: blake3::Hasher::new(), file, flushing: 0 });
                large.write(&buffer)?;
                large.write(bytes)?;
                self.state = State::Large(large);
            }
            State::Large(mut large) => {
                large.write(bytes)?;
                self.state = State::Large(large);
            }
            State::Closed(digest) => {
                self.state = State::Closed(digest);
                return Err(written_after_close());
            }
            State::Broken => return Err(written_after_failure()),
        }
        Ok(())
    }

    fn finish(&mut self) -> io::Result<B3Digest> {
        let digest = match std::mem::replace(&mut self.state, State::Broken) {
            State::Small(contents) => {
                let digest = B3Digest::of(&contents);
                if !self.is_there(&digest, contents.len() as u64)? {
                    let mut unfinished = Unfinished::create(self.blobs.clone())?;
                    unfinished.write(&contents)?;
                    unfinished.stage(digest)?;
                }
                digest
            }
            State::Large(large) => {
                let digest = large.hasher.finalize().into();
                if !self.is_there(&digest, large.hasher.count())? {
                    large.file.stage(digest)?;
                }
                digest
            }
            State::Closed(digest) => digest,
            State::Broken => return Err(written_after_failure()),
        };
        self.state = State::Closed(digest);
        Ok(digest)
    }
}

impl Large {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.file.write(bytes)?;
        let written = self.hasher.count();
        if written - self.flushing >= FLUSH_BYTES {
            self.file.begin_to_flush(self.flushing, written - self.flushing);
            self.flushing = written;
        }
        Ok(())
    }
}

/// A file in the staging directory that is removed unless it is staged.
struct Unfinished {
    blobs: Arc<LocalBlobs>,
    number: u64,
    file: File,
    staged: bool,
}

impl Unfinished {
    fn create(blobs: Arc<LocalBlobs>) -> io::Result<Self> {
        let (number, file) = blobs.staging()?.create_file()?;
        Ok(Self { blobs, number, file, staged: false })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes).map_err(|error| at_path(self.blobs.staging_parent(), &error))
    }

    /// Has the kernel write this range to the disk, without waiting for it.
    fn begin_to_flush(&self, offset: u64, bytes: u64) {
        let (Ok(offset), Ok(bytes)) = (offset.try_into(), bytes.try_into()) else { return };
        // SAFETY: the descriptor is open, and no memory is involved. After a failure the commit has more to flush.
        unsafe { libc::sync_file_range(self.file.as_raw_fd(), offset, bytes, libc::SYNC_FILE_RANGE_WRITE) };
    }

    fn stage(mut self, digest: B3Digest) -> io::Result<()> {
        self.staged = true;
        self.blobs.stage(digest, self.number, &self.file)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.staged
            && let Ok(staging) = self.blobs.staging()
        {
            // A leftover is removed with the staging directory.
            let _ = staging.remove(self.number);
        }
    }
}

impl AsyncWrite for LocalBlobWriter {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(self.write(bytes).map(|()| bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[async_trait]
impl BlobWriter for LocalBlobWriter {
    async fn close(&mut self) -> io::Result<B3Digest> {
        self.finish()
    }
}
