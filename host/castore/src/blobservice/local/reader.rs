//! Reads a local blob. All I/O happens in place: it is never pending.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncSeek, ReadBuf};

use super::verified::{Verified, Version};
use crate::B3Digest;

pub(crate) struct LocalBlobReader {
    file: File,
    position: u64,
    size: u64,
    check: Option<Check>,
}

/// The check of a blob that has not been checked yet.
struct Check {
    digest: B3Digest,
    version: Version,
    hasher: blake3::Hasher,
    verified: Arc<Verified>,
}

impl LocalBlobReader {
    /// Reads a file that has been checked already.
    pub(crate) fn new(file: File) -> Self {
        Self { file, position: 0, size: u64::MAX, check: None }
    }

    /// Checks the file while it is read: before the last bytes are returned, or any out of order.
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
                verified.check(digest, file, *version, hasher.finalize().into())?;
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
