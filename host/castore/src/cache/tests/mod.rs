//! Tests of caches, in addition to the conformance suites.

mod commits;
mod directories;
mod downloads;
mod eviction;

use std::{
    fs::{self, File},
    io::{self, Read as _},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use futures::{TryStreamExt as _, future::join_all, stream::BoxStream};
use tempfile::TempDir;
use tokio::{
    io::AsyncWriteExt as _,
    sync::{Notify, Semaphore},
};

use super::{CacheBlobService, CacheDirectoryService, WritePolicy};
use crate::{
    B3Digest, BlobReader, BlobService, BlobWriter, Directory, DirectoryMemory, DirectoryPutter, DirectoryService,
    LocalBlobService, LocalStore, MemoryBlobService, MemoryDirectoryService, blobservice, directoryservice,
    gc::collect,
    proto::stat_blob_response::ChunkMeta,
    testing::{file, name, splitmix, symlink},
};

/// A remote store that records what it was asked for, and can be stalled and broken.
struct Remote {
    inner: Arc<dyn BlobService>,
    /// The blobs that were read, in order.
    read: Mutex<Vec<B3Digest>>,
    /// Each read takes one permit.
    gate: Semaphore,
    /// So does each question whether a blob is there.
    questions: Semaphore,
    gone: AtomicBool,
}

impl Remote {
    fn new(inner: Arc<dyn BlobService>) -> Arc<Self> {
        let [gate, questions] = [(); 2].map(|()| Semaphore::new(Semaphore::MAX_PERMITS));
        Arc::new(Self { inner, read: Mutex::default(), gate, questions, gone: AtomicBool::new(false) })
    }

    fn memory() -> Arc<Self> {
        Self::new(Arc::<MemoryBlobService>::default())
    }

    /// The digests read since the last call.
    fn read(&self) -> Vec<B3Digest> {
        std::mem::take(&mut self.read.lock().unwrap())
    }

    fn check(&self) -> io::Result<()> {
        if self.gone.load(Ordering::Relaxed) { Err(io::Error::other("the remote store is gone")) } else { Ok(()) }
    }
}

#[async_trait]
impl BlobService for Remote {
    async fn has(&self, digest: &B3Digest) -> io::Result<bool> {
        self.questions.acquire().await.unwrap().forget();
        self.check()?;
        self.inner.has(digest).await
    }

    async fn chunks(&self, digest: &B3Digest) -> io::Result<Option<Vec<ChunkMeta>>> {
        self.check()?;
        self.inner.chunks(digest).await
    }

    async fn open_read(&self, digest: &B3Digest) -> io::Result<Option<Box<dyn BlobReader>>> {
        self.check()?;
        self.read.lock().unwrap().push(*digest);
        self.gate.acquire().await.unwrap().forget();
        self.inner.open_read(digest).await
    }

    async fn open_write(&self) -> Box<dyn BlobWriter> {
        self.inner.open_write().await
    }

    fn batch(&self) -> Arc<dyn BlobService> {
        self.inner.batch()
    }

    async fn commit(&self) -> io::Result<()> {
        self.check()?;
        self.inner.commit().await
    }
}

async fn put(service: &dyn BlobService, contents: &[u8]) -> B3Digest {
    let mut writer = service.open_write().await;
    writer.write_all(contents).await.unwrap();
    writer.close().await.unwrap()
}

async fn get(service: &dyn BlobService, digest: &B3Digest) -> io::Result<Vec<u8>> {
    let mut contents = Vec::new();
    service.open_file(digest).await?.unwrap().read_to_end(&mut contents)?;
    Ok(contents)
}

fn open(dir: &TempDir, max_bytes: u64, remote: &Arc<Remote>) -> CacheBlobService {
    CacheBlobService::open(dir.path(), max_bytes, WritePolicy::Through, remote.clone()).unwrap()
}

/// Whether the cache has committed the blob.
fn is_cached(dir: &Path, digest: &B3Digest) -> bool {
    let hex = digest.to_hex();
    dir.join("blobs/b3").join(&hex[..2]).join(hex).exists()
}

/// Downloads these, with a sweep after each.
async fn download_each(cache: &CacheBlobService, digests: &[B3Digest]) {
    for digest in digests {
        get(cache, digest).await.unwrap();
        cache.sweep_now().await.unwrap();
    }
}

#[tokio::test]
async fn a_cache_of_another_layout_is_refused() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), Remote::memory());
    drop(open(&dir, 1 << 30, &remote));
    fs::remove_file(dir.path().join("blobs/format")).unwrap();
    fs::write(dir.path().join("blobs/format"), "2\n").unwrap();
    let blobs = CacheBlobService::open(dir.path(), 1, WritePolicy::Back, remote).err().unwrap();
    let remote_directories = Arc::<MemoryDirectoryService>::default();
    let directories = CacheDirectoryService::open(dir.path(), 1, WritePolicy::Back, remote_directories).err().unwrap();
    for error in [blobs, directories] {
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
        assert!(error.to_string().contains("blobs/format: the store has the layout 2"), "{error}");
    }
}

#[tokio::test]
async fn addresses_compose_and_errors_say_which_part_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let cache = format!("cache://{}", dir.path().display());
    let addr = format!("{cache}?size=1MiB&write=back&remote=objectstore+file://{}/remote?", dir.path().display());
    let blobs = blobservice::from_addr(&addr).unwrap();
    let digest = put(&*blobs, b"contents").await;
    blobs.commit().await.unwrap();
    assert_eq!(get(&*blobs, &digest).await.unwrap(), b"contents");
    directoryservice::from_addr(&addr).unwrap().put(Directory::new()).await.unwrap();
    for (addr, part) in [
        ("cache://dir?remote=memory://".to_owned(), "directory \"dir\""),
        (cache.clone(), "remote address \"\""),
        (format!("{cache}?size=many&remote=memory://"), "size \"many\""),
        (format!("{cache}?size=20000000T&remote=memory://"), "size \"20000000T\""),
        (format!("{cache}?size=0&remote=memory://"), "size \"0\""),
        (format!("{cache}?write=never&remote=memory://"), "write policy \"never\""),
        (format!("{cache}?x&remote=memory://"), "option \"x\""),
        (format!("{cache}?remote=ftp://"), "the scheme \"ftp\""),
    ] {
        for error in [blobservice::from_addr(&addr).err().unwrap(), directoryservice::from_addr(&addr).err().unwrap()] {
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}

/// The cache as a local store.
fn local(dir: &TempDir) -> LocalStore {
    LocalStore::open(&dir.path().join("blobs"), &dir.path().join("directories.redb")).unwrap()
}

fn collect_all(dir: &TempDir) {
    let store = local(dir);
    store.directories().age_all(SystemTime::UNIX_EPOCH).unwrap();
    for (digest, _) in store.stored_blobs().unwrap() {
        let file = futures::executor::block_on(store.blobs().open_file(&digest)).unwrap().unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    }
    collect(&store, Duration::ZERO, false).unwrap();
}

async fn put_tree(directories: &dyn DirectoryService, root: &Directory) {
    let mut putter = directories.put_multiple_start();
    putter.put(root.clone()).await.unwrap();
    putter.close().await.unwrap();
}
