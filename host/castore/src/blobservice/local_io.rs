//! The reader and the writer of local blobs. All I/O happens in place: they are never pending.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::fd::AsRawFd as _,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use async_trait::async_trait;
use nix::libc;
use tokio::io::{AsyncRead, AsyncSeek, AsyncWrite, ReadBuf};

use super::{
    BlobWriter,
    local::Shared,
    staging::at_path,
    verified::{Verified, Version},
    written_after_close, written_after_failure,
};
use crate::B3Digest;

/// Blobs up to this size are not written at all when they are in the store already.
const BUFFER_BYTES: usize = 256 * 1024;

/// Bytes of a large blob that go to the disk together, while more of it comes: a commit would otherwise wait for all of it.
const FLUSH_BYTES: u64 = 8 * 1024 * 1024;

pub(crate) struct LocalBlobReader {
    file: File,
    position: u64,
    size: u64,
    check: Option<Check>,
}

/// What has been read of a blob that is not known to be what it should be.
struct Check {
    digest: B3Digest,
    version: Version,
    hasher: blake3::Hasher,
    verified: Arc<Verified>,
}

impl LocalBlobReader {
    /// Reads a file that has been checked.
    pub(crate) fn new(file: File) -> Self {
        Self { file, position: 0, size: u64::MAX, check: None }
    }

    /// Checks the file as it reads it: before it gives the last bytes, or any out of order.
    pub(super) fn checking(file: File, digest: B3Digest, verified: Arc<Verified>) -> io::Result<Self> {
        let version = Version::of(&file)?;
        let check = Check { digest, version, hasher: blake3::Hasher::new(), verified };
        Ok(Self { file, position: 0, size: version.bytes(), check: Some(check) })
    }
}

impl AsyncRead for LocalBlobReader {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { file, position, size, check } = &mut *self;
        if let Some(Check { digest, hasher, verified, .. }) = check
            && *position != hasher.count()
        {
            verified.check_file(digest, file)?;
            *check = None;
        }
        let left = size.saturating_sub(*position);
        let room = usize::try_from(left).map_or(buffer.remaining(), |left| left.min(buffer.remaining()));
        let unfilled = buffer.initialize_unfilled_to(room);
        let read = loop {
            match file.read(unfilled) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read?,
            }
        };
        if let Some(Check { digest, version, hasher, verified }) = check {
            hasher.update(&unfilled[..read]);
            if hasher.count() == *size || (read == 0 && room > 0) {
                verified.check(digest, *version, hasher.finalize().into())?;
                *check = None;
            }
        }
        buffer.advance(read);
        *position += read as u64;
        Poll::Ready(Ok(()))
    }
}

impl AsyncSeek for LocalBlobReader {
    fn start_seek(mut self: Pin<&mut Self>, to: SeekFrom) -> io::Result<()> {
        self.position = self.file.seek(to)?;
        Ok(())
    }

    fn poll_complete(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<u64>> {
        Poll::Ready(Ok(self.position))
    }
}

/// Writes one blob into the staging directory, once it is clear that it has to.
pub(super) struct LocalBlobWriter {
    shared: Arc<Shared>,
    state: State,
}

enum State {
    Small(Vec<u8>),
    Large(Box<Large>),
    Closed(B3Digest),
    /// A write failed, so what is there can't become a blob.
    Broken,
}

/// A blob that has outgrown its buffer.
struct Large {
    hasher: blake3::Hasher,
    file: Unfinished,
    /// Bytes that are on the disk or on their way.
    flushing: u64,
}

impl LocalBlobWriter {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, state: State::Small(Vec::new()) }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match std::mem::replace(&mut self.state, State::Broken) {
            State::Small(mut buffer) if buffer.len() + bytes.len() <= BUFFER_BYTES => {
                buffer.extend_from_slice(bytes);
                self.state = State::Small(buffer);
            }
            State::Small(buffer) => {
                let file = Unfinished::create(self.shared.clone())?;
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
                if !self.shared.has(&digest)? {
                    let mut unfinished = Unfinished::create(self.shared.clone())?;
                    unfinished.write(&contents)?;
                    unfinished.stage(digest)?;
                }
                digest
            }
            State::Large(large) => {
                let digest = large.hasher.finalize().into();
                if !self.shared.has(&digest)? {
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
    shared: Arc<Shared>,
    number: u64,
    file: File,
    staged: bool,
}

impl Unfinished {
    fn create(shared: Arc<Shared>) -> io::Result<Self> {
        let (number, file) = shared.staging()?.create_file()?;
        Ok(Self { shared, number, file, staged: false })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes).map_err(|error| at_path(self.shared.staging_parent(), &error))
    }

    /// Has the kernel write this range to the disk, and doesn't wait for it.
    fn begin_to_flush(&self, offset: u64, bytes: u64) {
        let (Ok(offset), Ok(bytes)) = (offset.try_into(), bytes.try_into()) else { return };
        // SAFETY: the descriptor is open, and no memory is involved. Where it fails, the commit has more to wait for.
        unsafe { libc::sync_file_range(self.file.as_raw_fd(), offset, bytes, libc::SYNC_FILE_RANGE_WRITE) };
    }

    fn stage(mut self, digest: B3Digest) -> io::Result<()> {
        self.staged = true;
        self.shared.stage(digest, self.number, &self.file)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.staged
            && let Ok(staging) = self.shared.staging()
        {
            // Whatever stays goes with the staging directory.
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
