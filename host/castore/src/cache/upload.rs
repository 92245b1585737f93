//! Uploads cached blobs to the remote store.

use std::{
    io::{self, Read as _},
    sync::Arc,
};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::{io::AsyncWriteExt as _, sync::Mutex};

use super::pending::{Pending, signal_upload, watch_uploads};
use crate::{B3Digest, BlobService, runtime::spawn};

const CONCURRENT_UPLOADS: usize = 8;

const COPY_BYTES: usize = 256 * 1024;

/// Copies those of the blobs that `to` lacks. `from` has all of them.
pub(super) async fn upload_all(
    from: &Arc<dyn BlobService>,
    to: &Arc<dyn BlobService>,
    digests: impl IntoIterator<Item = B3Digest> + Send,
) -> io::Result<()> {
    let digests: Vec<_> = digests.into_iter().collect();
    let uploads = digests.into_iter().map(|digest| upload(from.clone(), to.clone(), digest));
    stream::iter(uploads).buffer_unordered(CONCURRENT_UPLOADS).try_collect().await
}

async fn upload(from: Arc<dyn BlobService>, to: Arc<dyn BlobService>, digest: B3Digest) -> io::Result<()> {
    if to.has(&digest).await? {
        return Ok(());
    }
    let Some(mut file) = from.open_file(&digest).await? else {
        return Err(io::Error::new(io::ErrorKind::NotFound, format!("the cache has lost the blob {digest}")));
    };
    let mut writer = to.open_write().await;
    let mut buffer = vec![0; COPY_BYTES];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        writer.write_all(&buffer[..count]).await?;
    }
    let actual = writer.close().await?;
    if actual == digest {
        return Ok(());
    }
    let message = format!("the cache is damaged: its blob {digest} has the digest {actual}");
    Err(io::Error::new(io::ErrorKind::InvalidData, message))
}

/// Writes pending blobs back to the remote store.
pub(super) struct WriteBack {
    pub(super) pending: Arc<Pending>,
    cache: Arc<dyn BlobService>,
    remote: Arc<dyn BlobService>,
    uploading: Mutex<()>,
}

impl WriteBack {
    pub(super) fn new(pending: Arc<Pending>, cache: Arc<dyn BlobService>, remote: Arc<dyn BlobService>) -> Self {
        Self { pending, cache, remote, uploading: Mutex::default() }
    }

    /// Uploads pending blobs for ever.
    pub(super) async fn run(self: Arc<Self>) -> io::Result<()> {
        let mut uploads = watch_uploads();
        loop {
            let uploaded = self.flush().await;
            self.pending.wait_after(uploaded, &mut uploads).await;
        }
    }

    /// As [`flush`](Self::flush), for a caller on any executor.
    pub(super) async fn flush_on_threads(self: Arc<Self>) -> io::Result<()> {
        spawn(async move { self.flush().await }).await
    }

    /// Uploads all pending blobs.
    async fn flush(&self) -> io::Result<()> {
        let _uploading = self.uploading.lock().await;
        let mut committed = Vec::new();
        for digest in self.pending.list()? {
            // A commit adds its blobs before they are in the cache, and may never get further.
            if self.cache.has(&digest).await? {
                committed.push(digest);
            }
        }
        if committed.is_empty() {
            return Ok(());
        }
        upload_all(&self.cache, &self.remote, committed.iter().copied()).await?;
        self.remote.commit().await?;
        committed.iter().try_for_each(|digest| self.pending.remove(digest))?;
        signal_upload();
        Ok(())
    }
}
