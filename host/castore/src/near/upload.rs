//! Brings near blobs to the far store.

use std::{
    io::{self, Read as _},
    sync::Arc,
};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::{io::AsyncWriteExt as _, sync::Mutex};

use super::notes::{Notes, uploaded, uploads};
use crate::{B3Digest, BlobService, runtime::spawn};

const CONCURRENT_UPLOADS: usize = 8;

const COPY_BYTES: usize = 256 * 1024;

/// Uploads what the far store lacks of these blobs, which the other one has.
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
        return Err(io::Error::new(io::ErrorKind::NotFound, format!("the near store has lost the blob {digest}")));
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
    let message = format!("the near store's blob {digest} has the digest {actual}: the store is damaged");
    Err(io::Error::new(io::ErrorKind::InvalidData, message))
}

/// Blobs that are to be uploaded some time.
pub(super) struct Pending {
    pub(super) notes: Arc<Notes>,
    near: Arc<dyn BlobService>,
    far: Arc<dyn BlobService>,
    uploading: Mutex<()>,
}

impl Pending {
    pub(super) fn new(notes: Arc<Notes>, near: Arc<dyn BlobService>, far: Arc<dyn BlobService>) -> Self {
        Self { notes, near, far, uploading: Mutex::default() }
    }

    /// Uploads for ever what is noted.
    pub(super) async fn run(self: Arc<Self>) -> io::Result<()> {
        let mut others = uploads();
        loop {
            let uploaded = self.flush().await;
            self.notes.wait_after(uploaded, &mut others).await;
        }
    }

    /// Uploads all that is noted, whatever the caller waits with.
    pub(super) async fn flush_on_threads(self: Arc<Self>) -> io::Result<()> {
        spawn(async move { self.flush().await }).await
    }

    /// Uploads all that is noted.
    async fn flush(&self) -> io::Result<()> {
        let _uploading = self.uploading.lock().await;
        let mut there = Vec::new();
        for digest in self.notes.list()? {
            // It may be noted by a commit that is under way, or by one that was cut short.
            if self.near.has(&digest).await? {
                there.push(digest);
            }
        }
        if there.is_empty() {
            return Ok(());
        }
        upload_all(&self.near, &self.far, there.iter().copied()).await?;
        self.far.commit().await?;
        there.iter().try_for_each(|digest| self.notes.remove(digest))?;
        uploaded();
        Ok(())
    }
}
