//! What a near store adds to what every store must do, which is in the conformance suites.

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

use super::{NearBlobService, NearDirectoryService, WritePolicy, blob_service, directory_service};
use crate::{
    B3Digest, BlobReader, BlobService, BlobWriter, Directory, DirectoryPutter, DirectoryService, LocalBlobService,
    LocalStore, MemoryBlobService, MemoryDirectoryService, blobservice,
    gc::collect,
    proto::stat_blob_response::ChunkMeta,
    testing::{file, name, splitmix, symlink},
};

/// A far store that says what it was asked for, and can be held up and broken.
struct Far {
    inner: Arc<dyn BlobService>,
    /// What was read, in that order.
    read: Mutex<Vec<B3Digest>>,
    /// Each read takes one permit.
    gate: Semaphore,
    /// So does each question whether a blob is there.
    questions: Semaphore,
    gone: AtomicBool,
}

impl Far {
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
        if self.gone.load(Ordering::Relaxed) { Err(io::Error::other("the far store is gone")) } else { Ok(()) }
    }
}

#[async_trait]
impl BlobService for Far {
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

fn open(dir: &TempDir, max_bytes: u64, far: &Arc<Far>) -> NearBlobService {
    NearBlobService::open(dir.path(), max_bytes, WritePolicy::Through, far.clone()).unwrap()
}

/// Whether the near store has committed this.
fn is_near(dir: &Path, digest: &B3Digest) -> bool {
    let hex = digest.to_hex();
    dir.join("blobs/b3").join(&hex[..2]).join(hex).exists()
}

#[tokio::test]
async fn many_readers_share_one_download() {
    let (dir, far) = (tempfile::tempdir().unwrap(), Far::memory());
    let contents = splitmix(1_000_000);
    let digest = put(&*far, &contents).await;
    let near = open(&dir, 1 << 30, &far);
    far.gate.forget_permits(Semaphore::MAX_PERMITS);
    let readers = (0..50).map(|_| get(&near, &digest));
    let (read, ()) = tokio::join!(join_all(readers), async {
        // They all wait by now: each was polled before this.
        far.gate.add_permits(1);
    });
    assert!(read.into_iter().all(|read| read.unwrap() == contents));
    assert_eq!(far.read(), [digest]);
    assert_eq!(get(&near, &digest).await.unwrap(), contents);
    assert_eq!(far.read(), []);
}

#[tokio::test]
async fn a_slow_download_holds_up_no_other() {
    let (dir, far) = (tempfile::tempdir().unwrap(), Far::memory());
    let [slow, fast] = [put(&*far, b"slow").await, put(&*far, b"fast").await];
    let near = open(&dir, 1 << 30, &far);
    get(&near, &fast).await.unwrap();
    far.gate.forget_permits(Semaphore::MAX_PERMITS);
    let mut waiting = Box::pin(get(&near, &slow));
    assert!(futures::poll!(&mut waiting).is_pending());
    assert_eq!(get(&near, &fast).await.unwrap(), b"fast");
    far.gate.add_permits(1);
    assert_eq!(waiting.await.unwrap(), b"slow");
}

#[tokio::test]
async fn a_download_that_nobody_waits_for_ends_and_can_begin_anew() {
    let (dir, far) = (tempfile::tempdir().unwrap(), Far::memory());
    let digest = put(&*far, b"contents").await;
    let near = open(&dir, 1 << 30, &far);
    far.gate.forget_permits(Semaphore::MAX_PERMITS);
    let mut waiting = Box::pin(get(&near, &digest));
    assert!(futures::poll!(&mut waiting).is_pending());
    drop(waiting);
    far.gate.add_permits(2);
    assert_eq!(get(&near, &digest).await.unwrap(), b"contents");
}

#[tokio::test]
async fn what_is_not_at_hand_is_fetched_for_the_next_who_asks() {
    let (dir, far) = (tempfile::tempdir().unwrap(), Far::memory());
    let digest = put(&*far, b"contents").await;
    let near = open(&dir, 1 << 30, &far);
    assert!(near.open_file_at_hand(&digest).await.unwrap().is_none());
    assert_eq!(get(&near, &digest).await.unwrap(), b"contents");
    assert_eq!(far.read(), [digest]);
    assert!(near.open_file_at_hand(&digest).await.unwrap().is_some());
}

#[tokio::test]
async fn only_missing_chunks_are_fetched() {
    let (dir, far) =
        (tempfile::tempdir().unwrap(), Far::new(blobservice::from_addr("objectstore+memory:///").unwrap()));
    let old = splitmix(4_000_000);
    let mut new = old.clone();
    new[2_000_000] ^= 1;
    let [old_digest, new_digest] = [put(&*far, &old).await, put(&*far, &new).await];
    let near = open(&dir, 1 << 30, &far);
    assert!(get(&near, &old_digest).await.unwrap() == old);
    assert!(far.read().len() > 10);
    assert!(get(&near, &new_digest).await.unwrap() == new);
    assert_eq!(far.read().len(), 1);
}

#[tokio::test]
async fn a_blob_that_comes_damaged_is_neither_served_nor_kept() {
    struct Liar(Arc<Far>);
    #[async_trait]
    impl BlobService for Liar {
        async fn has(&self, _: &B3Digest) -> io::Result<bool> {
            Ok(true)
        }
        async fn open_read(&self, _: &B3Digest) -> io::Result<Option<Box<dyn BlobReader>>> {
            Ok(Some(Box::new(io::Cursor::new(b"lies"))))
        }
        async fn open_write(&self) -> Box<dyn BlobWriter> {
            self.0.open_write().await
        }
        fn batch(&self) -> Arc<dyn BlobService> {
            self.0.batch()
        }
        async fn commit(&self) -> io::Result<()> {
            Ok(())
        }
    }
    let (dir, far) = (tempfile::tempdir().unwrap(), Far::memory());
    let digest = put(&*far, b"truth").await;
    let near = NearBlobService::open(dir.path(), 1 << 30, WritePolicy::Through, Arc::new(Liar(far.clone()))).unwrap();
    for _ in 0..2 {
        let error = near.open_file(&digest).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(error.to_string().contains("it came with the digest"), "{error}");
        assert_eq!(near.open_read(&digest).await.err().unwrap().to_string(), error.to_string());
    }
    drop(near);
    assert!(!is_near(dir.path(), &digest) && !is_near(dir.path(), &B3Digest::of(b"lies")));
    assert_eq!(get(&open(&dir, 1 << 30, &far), &digest).await.unwrap(), b"truth");
}

#[tokio::test]
async fn what_was_downloaded_is_there_after_a_restart_without_the_far_store() {
    let (dir, far) = (tempfile::tempdir().unwrap(), Far::memory());
    let digest = put(&*far, b"contents").await;
    assert_eq!(get(&open(&dir, 1 << 30, &far), &digest).await.unwrap(), b"contents");
    far.gone.store(true, Ordering::Relaxed);
    let near = open(&dir, 1 << 30, &far);
    assert_eq!(get(&near, &digest).await.unwrap(), b"contents");
    assert!(near.open_file(&B3Digest::of(b"other")).await.unwrap_err().to_string().contains("gone"));
}

/// Downloads these, with a sweep after each.
async fn download_each(near: &NearBlobService, digests: &[B3Digest]) {
    for digest in digests {
        get(near, digest).await.unwrap();
        near.sweep_now().await.unwrap();
    }
}

#[tokio::test]
async fn what_was_used_longest_ago_goes_first() {
    let (dir, far) = (tempfile::tempdir().unwrap(), Far::memory());
    let mut digests = Vec::new();
    for at in 0..10 {
        digests.push(put(&*far, &[at; 1_000]).await);
    }
    let near = open(&dir, 5_000, &far);
    download_each(&near, &digests[..4]).await;
    get(&near, &digests[0]).await.unwrap();
    download_each(&near, &digests[4..6]).await;
    let there: Vec<_> = (0..6).filter(|at| is_near(dir.path(), &digests[*at])).collect();
    assert_eq!(there, [0, 3, 4, 5]);
    // What has gone comes back.
    assert_eq!(get(&near, &digests[1]).await.unwrap(), [1; 1_000]);
}

#[tokio::test]
async fn what_is_used_stays() {
    let (dir, far) = (tempfile::tempdir().unwrap(), Far::memory());
    let mut digests = Vec::new();
    for at in 0..10 {
        digests.push(put(&*far, &[at; 1_000]).await);
    }
    let near = open(&dir, 3_000, &far);
    let open_file: File = near.open_file(&digests[0]).await.unwrap().unwrap();
    let batch = near.batch();
    drop(batch.open_file(&digests[1]).await.unwrap());
    download_each(&near, &digests[2..]).await;
    assert!(is_near(dir.path(), &digests[0]) && is_near(dir.path(), &digests[1]));
    drop((open_file, batch));
    download_each(&near, &digests[2..6]).await;
    assert!(!is_near(dir.path(), &digests[0]) && !is_near(dir.path(), &digests[1]));
}

#[tokio::test]
async fn a_blob_larger_than_the_bound_is_served() {
    let (dir, far) = (tempfile::tempdir().unwrap(), Far::memory());
    let contents = splitmix(100_000);
    let digest = put(&*far, &contents).await;
    let near = open(&dir, 1_000, &far);
    assert_eq!(get(&near, &digest).await.unwrap(), contents);
    near.sweep_now().await.unwrap();
    assert!(!is_near(dir.path(), &digest));
}

#[tokio::test]
async fn a_commit_writes_through() {
    let (dir, far) = (tempfile::tempdir().unwrap(), Far::memory());
    let near = open(&dir, 1 << 30, &far);
    let batch = near.batch();
    let digest = put(&*batch, b"contents").await;
    assert!(!far.has(&digest).await.unwrap());
    batch.commit().await.unwrap();
    assert!(far.has(&digest).await.unwrap() && is_near(dir.path(), &digest));
}

#[tokio::test]
async fn a_commit_that_fails_can_be_repeated() {
    let (dir, far) = (tempfile::tempdir().unwrap(), Far::memory());
    let near = open(&dir, 1 << 30, &far);
    let digest = put(&near, b"contents").await;
    far.gone.store(true, Ordering::Relaxed);
    near.commit().await.unwrap_err();
    assert!(!is_near(dir.path(), &digest));
    far.gone.store(false, Ordering::Relaxed);
    near.commit().await.unwrap();
    assert!(far.has(&digest).await.unwrap() && is_near(dir.path(), &digest));
}

#[tokio::test]
async fn a_commit_beside_one_that_fails_brings_what_that_one_did_not() {
    let (dir, far) = (tempfile::tempdir().unwrap(), Far::memory());
    let near = open(&dir, 1 << 30, &far);
    let digest = put(&near, b"contents").await;
    far.questions.forget_permits(Semaphore::MAX_PERMITS);
    let (mut first, mut second) = (near.commit(), near.commit());
    assert!(futures::poll!(&mut first).is_pending());
    assert!(futures::poll!(&mut second).is_pending());
    far.gone.store(true, Ordering::Relaxed);
    far.questions.add_permits(1);
    let failed = async {
        let failed = first.await;
        far.gone.store(false, Ordering::Relaxed);
        far.questions.add_permits(2);
        failed
    };
    let (failed, committed) = tokio::join!(failed, second);
    failed.unwrap_err();
    committed.unwrap();
    assert!(far.has(&digest).await.unwrap() && is_near(dir.path(), &digest));
}

#[tokio::test]
async fn a_commit_that_is_given_up_can_be_repeated() {
    let (dir, far) = (tempfile::tempdir().unwrap(), Far::memory());
    let near = open(&dir, 1 << 30, &far);
    let digest = put(&near, b"contents").await;
    far.questions.forget_permits(Semaphore::MAX_PERMITS);
    let mut given_up = near.commit();
    assert!(futures::poll!(&mut given_up).is_pending());
    drop(given_up);
    far.questions.add_permits(2);
    near.commit().await.unwrap();
    assert!(far.has(&digest).await.unwrap() && is_near(dir.path(), &digest));
}

#[tokio::test]
async fn a_near_store_of_another_layout_is_refused() {
    let (dir, far) = (tempfile::tempdir().unwrap(), Far::memory());
    drop(open(&dir, 1 << 30, &far));
    fs::remove_file(dir.path().join("blobs/format")).unwrap();
    fs::write(dir.path().join("blobs/format"), "2\n").unwrap();
    let blobs = NearBlobService::open(dir.path(), 1, WritePolicy::Back, far).err().unwrap();
    let far_directories = Arc::<MemoryDirectoryService>::default();
    let directories = NearDirectoryService::open(dir.path(), 1, WritePolicy::Back, far_directories).err().unwrap();
    for error in [blobs, directories] {
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
        assert!(error.to_string().contains("blobs/format: the store has the layout 2"), "{error}");
    }
}

#[tokio::test]
async fn what_is_to_be_written_back_stays_until_it_is_also_after_a_restart() {
    let (dir, far) = (tempfile::tempdir().unwrap(), Far::memory());
    let back = || NearBlobService::open(dir.path(), 1, WritePolicy::Back, far.clone()).unwrap();
    far.gone.store(true, Ordering::Relaxed);
    let near = back();
    let digest = put(&near, b"contents").await;
    near.commit().await.unwrap();
    near.flush().await.unwrap_err();
    near.sweep_now().await.unwrap();
    assert!(is_near(dir.path(), &digest));
    drop(near);
    far.gone.store(false, Ordering::Relaxed);
    assert!(!far.has(&digest).await.unwrap());
    let near = back();
    near.flush().await.unwrap();
    assert!(far.has(&digest).await.unwrap());
    near.sweep_now().await.unwrap();
    assert!(!is_near(dir.path(), &digest));
    assert_eq!(fs::read_dir(dir.path().join("blobs/pending-blobs")).unwrap().count(), 0);
}

fn tree() -> [Directory; 3] {
    let leaf = Directory::try_from_iter([(name("l"), symlink("t"))]).unwrap();
    let middle = Directory::try_from_iter([(name("leaf"), leaf.to_node())]).unwrap();
    // The leaf comes before the middle on the way down, and must be put before it.
    let root = Directory::try_from_iter([(name("a"), leaf.to_node()), (name("b"), middle.to_node())]).unwrap();
    [leaf, middle, root]
}

async fn walk(service: &dyn DirectoryService, root: &B3Digest) -> io::Result<Vec<Directory>> {
    service.get_recursive(root).try_collect().await
}

#[tokio::test]
async fn a_tree_is_fetched_once() {
    let (dir, far) = (tempfile::tempdir().unwrap(), MemoryDirectoryService::default());
    let [leaf, middle, root] = tree();
    for directory in [&leaf, &middle, &root] {
        far.put(directory.clone()).await.unwrap();
    }
    let near = NearDirectoryService::open(dir.path(), 1 << 30, WritePolicy::Through, Arc::new(far)).unwrap();
    assert_eq!(walk(&near, &root.digest()).await.unwrap().len(), 3);
    drop(near);
    let empty = Arc::<MemoryDirectoryService>::default();
    let near = NearDirectoryService::open(dir.path(), 1 << 30, WritePolicy::Through, empty.clone()).unwrap();
    assert_eq!(walk(&near, &root.digest()).await.unwrap().len(), 3);
    assert_eq!(near.get(&middle.digest()).await.unwrap(), Some(middle));
    // What is put is in both.
    let mut putter = near.put_multiple_start();
    putter.put(Directory::new()).await.unwrap();
    putter.close().await.unwrap();
    assert_eq!(empty.get(&B3Digest::EMPTY).await.unwrap(), Some(Directory::new()));
}

#[tokio::test]
async fn a_tree_that_is_not_whole_is_not_kept() {
    let (dir, far) = (tempfile::tempdir().unwrap(), Arc::<MemoryDirectoryService>::default());
    let [leaf, middle, root] = tree();
    far.put(middle).await.unwrap();
    far.put(root.clone()).await.unwrap();
    let near = NearDirectoryService::open(dir.path(), 1 << 30, WritePolicy::Through, far.clone()).unwrap();
    for _ in 0..2 {
        assert_eq!(walk(&near, &root.digest()).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
    // Nor one whose reader stops.
    far.put(leaf).await.unwrap();
    assert!(near.get_recursive(&root.digest()).try_next().await.unwrap().is_some());
    assert_eq!(walk(&near, &root.digest()).await.unwrap().len(), 3);
}

#[tokio::test]
async fn near_directories_that_are_damaged_or_too_many_are_fetched_anew() {
    let (dir, far) = (tempfile::tempdir().unwrap(), Arc::<MemoryDirectoryService>::default());
    for directory in tree() {
        far.put(directory).await.unwrap();
    }
    let [leaf, _, root] = tree();
    let near = NearDirectoryService::open(dir.path(), 1 << 30, WritePolicy::Through, far.clone()).unwrap();
    walk(&near, &root.digest()).await.unwrap();
    let path = dir.path().join("directories.redb");
    let mut file = fs::read(&path).unwrap();
    // Its encoding is in some page.
    let at = file.windows(leaf.encode().len()).position(|window| window == leaf.encode()).unwrap();
    file[at + 4] ^= 1;
    fs::write(&path, file).unwrap();
    assert_eq!(walk(&near, &root.digest()).await.unwrap().len(), 3);
    assert_eq!(near.get(&leaf.digest()).await.unwrap(), Some(leaf));

    let near = NearDirectoryService::open(dir.path(), 1, WritePolicy::Through, far).unwrap();
    let mut putter = near.put_multiple_start();
    putter.put(Directory::new()).await.unwrap();
    putter.close().await.unwrap();
    assert!(!path.exists());
    assert_eq!(walk(&near, &root.digest()).await.unwrap().len(), 3);
}

#[tokio::test]
async fn addresses_compose_and_errors_say_which_part_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let near = format!("near://{}", dir.path().display());
    let addr = format!("{near}?size=1MiB&write=back&far=objectstore+file://{}/far?", dir.path().display());
    let blobs = blob_service(&addr).unwrap();
    let digest = put(&*blobs, b"contents").await;
    blobs.commit().await.unwrap();
    assert_eq!(get(&*blobs, &digest).await.unwrap(), b"contents");
    directory_service(&addr).unwrap().put(Directory::new()).await.unwrap();
    for (addr, part) in [
        ("near://dir?far=memory://".to_owned(), "directory \"dir\""),
        (near.clone(), "far address \"\""),
        (format!("{near}?size=many&far=memory://"), "size \"many\""),
        (format!("{near}?size=20000000T&far=memory://"), "size \"20000000T\""),
        (format!("{near}?write=never&far=memory://"), "write policy \"never\""),
        (format!("{near}?x&far=memory://"), "option \"x\""),
        (format!("{near}?far=ftp://"), "the scheme \"ftp\""),
    ] {
        for error in [blob_service(&addr).err().unwrap(), directory_service(&addr).err().unwrap()] {
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}

#[tokio::test]
async fn a_damaged_near_blob_is_fetched_anew_unless_it_is_the_only_one() {
    let (dir, far) = (tempfile::tempdir().unwrap(), Far::memory());
    let digest = put(&*far, b"contents").await;
    let damage = || {
        let hex = digest.to_hex();
        let path = dir.path().join("blobs/b3").join(&hex[..2]).join(hex);
        fs::remove_file(&path).unwrap();
        fs::write(path, b"cOntents").unwrap();
    };
    let near = open(&dir, 1 << 30, &far);
    download_each(&near, &[digest]).await;
    damage();
    assert_eq!(get(&near, &digest).await.unwrap(), b"contents");
    drop(near);

    far.gone.store(true, Ordering::Relaxed);
    let near = NearBlobService::open(dir.path(), 1 << 30, WritePolicy::Back, far.clone()).unwrap();
    put(&near, b"contents").await;
    near.commit().await.unwrap();
    damage();
    assert!(get(&near, &digest).await.unwrap_err().to_string().contains("damaged"));
    assert!(is_near(dir.path(), &digest));
}

/// The local part, for whoever collects it.
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

#[tokio::test]
async fn a_collection_of_the_near_part_leaves_what_is_leased() {
    let (dir, far) = (tempfile::tempdir().unwrap(), Arc::<MemoryDirectoryService>::default());
    let far_dir = tempfile::tempdir().unwrap();
    let far_blobs = Arc::new(LocalBlobService::open(far_dir.path()).unwrap());
    let blobs = NearBlobService::open(dir.path(), 1 << 30, WritePolicy::Through, far_blobs.clone()).unwrap();
    let directories = NearDirectoryService::open(dir.path(), 1 << 30, WritePolicy::Through, far).unwrap();
    let [leased, other] = [put(&blobs, b"leased").await, put(&blobs, b"other").await];
    blobs.commit().await.unwrap();
    let tree = Directory::try_from_iter([(name("f"), file(b"leased", false))]).unwrap();
    put_tree(&directories, &tree).await;
    let lease = blobs.lease(&[tree.to_node()]).unwrap();
    collect_all(&dir);
    assert!(is_near(dir.path(), &leased) && !is_near(dir.path(), &other));
    assert_eq!(LocalStore::open(far_dir.path(), &far_dir.path().join("d")).unwrap().blobs().leased().unwrap().len(), 1);
    drop(lease);
    collect_all(&dir);
    assert!(!is_near(dir.path(), &leased));
}

async fn put_tree(directories: &dyn DirectoryService, root: &Directory) {
    let mut putter = directories.put_multiple_start();
    putter.put(root.clone()).await.unwrap();
    putter.close().await.unwrap();
}

#[tokio::test]
async fn the_far_store_gets_directories_after_their_blobs_and_none_is_lost_until_then() {
    let (dir, far) = (tempfile::tempdir().unwrap(), Far::memory());
    let far_directories = Arc::<MemoryDirectoryService>::default();
    let tree = Directory::try_from_iter([(name("f"), file(b"contents", false))]).unwrap();
    // So few bytes that all would go that may.
    let open_directories =
        || NearDirectoryService::open(dir.path(), 1, WritePolicy::Back, far_directories.clone()).unwrap();
    let open_blobs = || NearBlobService::open(dir.path(), 1, WritePolicy::Back, far.clone()).unwrap();
    far.gone.store(true, Ordering::Relaxed);
    {
        let (blobs, directories) = (open_blobs(), open_directories());
        put(&blobs, b"contents").await;
        blobs.commit().await.unwrap();
        put_tree(&directories, &tree).await;
        assert_eq!(directories.flush().await.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(directories.put(tree.clone()).await.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(directories.get(&tree.digest()).await.unwrap(), Some(tree.clone()));
    }
    collect_all(&dir);
    let directories = open_directories();
    assert!(directories.flush().await.is_err());
    assert_eq!(far_directories.get(&tree.digest()).await.unwrap(), None);
    far.gone.store(false, Ordering::Relaxed);
    let blobs = open_blobs();
    blobs.flush().await.unwrap();
    assert!(far.has(&B3Digest::of(b"contents")).await.unwrap());
    directories.flush().await.unwrap();
    assert_eq!(far_directories.get(&tree.digest()).await.unwrap(), Some(tree.clone()));
    assert!(!dir.path().join("directories.redb").exists());
    assert_eq!(directories.get(&tree.digest()).await.unwrap(), Some(tree));
}

#[tokio::test]
async fn the_end_of_an_upload_of_blobs_begins_that_of_their_directories() {
    let (dir, far) = (tempfile::tempdir().unwrap(), Far::memory());
    let far_directories = Announcing::default();
    let tree = Directory::try_from_iter([(name("f"), file(b"contents", false))]).unwrap();
    let blobs = NearBlobService::open(dir.path(), 1 << 30, WritePolicy::Back, far.clone()).unwrap();
    let directories =
        NearDirectoryService::open(dir.path(), 1 << 30, WritePolicy::Back, Arc::new(far_directories.clone())).unwrap();
    far.gone.store(true, Ordering::Relaxed);
    put(&blobs, b"contents").await;
    blobs.commit().await.unwrap();
    put_tree(&directories, &tree).await;
    assert!(directories.flush().await.is_err());
    far.gone.store(false, Ordering::Relaxed);
    blobs.flush().await.unwrap();
    far_directories.put.notified().await;
}

/// Says when it has got a tree.
#[derive(Clone, Default)]
struct Announcing {
    inner: Arc<MemoryDirectoryService>,
    put: Arc<Notify>,
}

#[async_trait]
impl DirectoryService for Announcing {
    async fn get(&self, digest: &B3Digest) -> io::Result<Option<Directory>> {
        self.inner.get(digest).await
    }

    async fn put(&self, directory: Directory) -> io::Result<B3Digest> {
        self.inner.put(directory).await
    }

    fn get_recursive(&self, root: &B3Digest) -> BoxStream<'_, io::Result<Directory>> {
        self.inner.get_recursive(root)
    }

    fn put_multiple_start(&self) -> Box<dyn DirectoryPutter + '_> {
        self.put.notify_one();
        self.inner.put_multiple_start()
    }
}
