use super::*;

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
    let (dir, remote) = (tempfile::tempdir().unwrap(), MemoryDirectoryService::default());
    let [leaf, middle, root] = tree();
    for directory in [&leaf, &middle, &root] {
        remote.put(directory.clone()).await.unwrap();
    }
    let cache = CacheDirectoryService::open(dir.path(), 1 << 30, WritePolicy::Through, Arc::new(remote)).unwrap();
    assert_eq!(walk(&cache, &root.digest()).await.unwrap().len(), 3);
    drop(cache);
    let empty = Arc::<MemoryDirectoryService>::default();
    let cache = CacheDirectoryService::open(dir.path(), 1 << 30, WritePolicy::Through, empty.clone()).unwrap();
    assert_eq!(walk(&cache, &root.digest()).await.unwrap().len(), 3);
    assert_eq!(cache.get(&middle.digest()).await.unwrap(), Some(middle));
    // A put directory is in both.
    let mut putter = cache.put_multiple_start();
    putter.put(Directory::new()).await.unwrap();
    putter.close().await.unwrap();
    assert_eq!(empty.get(&B3Digest::EMPTY).await.unwrap(), Some(Directory::new()));
}

#[tokio::test]
async fn a_tree_that_is_not_whole_is_not_kept() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), Arc::<MemoryDirectoryService>::default());
    let [leaf, middle, root] = tree();
    remote.put(middle).await.unwrap();
    remote.put(root.clone()).await.unwrap();
    let cache = CacheDirectoryService::open(dir.path(), 1 << 30, WritePolicy::Through, remote.clone()).unwrap();
    for _ in 0..2 {
        assert_eq!(walk(&cache, &root.digest()).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
    // Nor one whose reader stops.
    remote.put(leaf).await.unwrap();
    assert!(cache.get_recursive(&root.digest()).try_next().await.unwrap().is_some());
    assert_eq!(walk(&cache, &root.digest()).await.unwrap().len(), 3);
}

#[tokio::test]
async fn damaged_and_evicted_directories_are_fetched_again() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), Arc::<MemoryDirectoryService>::default());
    for directory in tree() {
        remote.put(directory).await.unwrap();
    }
    let [leaf, _, root] = tree();
    let cache = CacheDirectoryService::open(dir.path(), 1 << 30, WritePolicy::Through, remote.clone()).unwrap();
    walk(&cache, &root.digest()).await.unwrap();
    let path = dir.path().join("directories.redb");
    let mut file = fs::read(&path).unwrap();
    // Its encoding is in some page.
    let at = file.windows(leaf.encode().len()).position(|window| window == leaf.encode()).unwrap();
    file[at + 4] ^= 1;
    fs::write(&path, file).unwrap();
    let memory = DirectoryMemory::unlimited();
    let fetched = cache.get_recursive_within(&root.digest(), &memory).try_collect::<Vec<_>>().await.unwrap();
    assert_eq!(fetched.len(), 3);
    // The root, which the cache and the remote store gave, is counted once; the leaf also as it was damaged.
    let expected = DirectoryMemory::unlimited();
    for directory in tree().iter().chain([&leaf]) {
        expected.take(&directory.encode()).unwrap();
    }
    assert_eq!(memory.used(), expected.used());
    assert_eq!(cache.get(&leaf.digest()).await.unwrap(), Some(leaf));

    let cache = CacheDirectoryService::open(dir.path(), 1, WritePolicy::Through, remote).unwrap();
    let mut putter = cache.put_multiple_start();
    putter.put(Directory::new()).await.unwrap();
    putter.close().await.unwrap();
    assert!(!path.exists());
    assert_eq!(walk(&cache, &root.digest()).await.unwrap().len(), 3);
}

#[tokio::test]
async fn directories_are_written_back_after_their_blobs() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), Remote::memory());
    let remote_directories = Arc::<MemoryDirectoryService>::default();
    let tree = Directory::try_from_iter([(name("f"), file(b"contents", false))]).unwrap();
    // So few bytes that all would go that may.
    let open_directories =
        || CacheDirectoryService::open(dir.path(), 1, WritePolicy::Back, remote_directories.clone()).unwrap();
    let open_blobs = || CacheBlobService::open(dir.path(), 1, WritePolicy::Back, remote.clone()).unwrap();
    remote.gone.store(true, Ordering::Relaxed);
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
    assert_eq!(remote_directories.get(&tree.digest()).await.unwrap(), None);
    remote.gone.store(false, Ordering::Relaxed);
    let blobs = open_blobs();
    blobs.flush().await.unwrap();
    assert!(remote.has(&B3Digest::of(b"contents")).await.unwrap());
    directories.flush().await.unwrap();
    assert_eq!(remote_directories.get(&tree.digest()).await.unwrap(), Some(tree.clone()));
    assert!(!dir.path().join("directories.redb").exists());
    assert_eq!(directories.get(&tree.digest()).await.unwrap(), Some(tree));
}

#[tokio::test]
async fn uploaded_blobs_start_the_upload_of_their_directories() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), Remote::memory());
    let remote_directories = Announcing::default();
    let tree = Directory::try_from_iter([(name("f"), file(b"contents", false))]).unwrap();
    let blobs = CacheBlobService::open(dir.path(), 1 << 30, WritePolicy::Back, remote.clone()).unwrap();
    let directories =
        CacheDirectoryService::open(dir.path(), 1 << 30, WritePolicy::Back, Arc::new(remote_directories.clone()))
            .unwrap();
    remote.gone.store(true, Ordering::Relaxed);
    put(&blobs, b"contents").await;
    blobs.commit().await.unwrap();
    put_tree(&directories, &tree).await;
    assert!(directories.flush().await.is_err());
    remote.gone.store(false, Ordering::Relaxed);
    blobs.flush().await.unwrap();
    remote_directories.put.notified().await;
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
