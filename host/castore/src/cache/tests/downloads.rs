use super::*;

#[tokio::test]
async fn many_readers_share_one_download() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), Remote::memory());
    let contents = splitmix(1_000_000);
    let digest = put(&*remote, &contents).await;
    let cache = open(&dir, 1 << 30, &remote);
    remote.gate.forget_permits(Semaphore::MAX_PERMITS);
    let readers = (0..50).map(|_| get(&cache, &digest));
    let (read, ()) = tokio::join!(join_all(readers), async {
        // They all wait by now: each was polled before this.
        remote.gate.add_permits(1);
    });
    assert!(read.into_iter().all(|read| read.unwrap() == contents));
    assert_eq!(remote.read(), [digest]);
    assert_eq!(get(&cache, &digest).await.unwrap(), contents);
    assert_eq!(remote.read(), []);
}

#[tokio::test]
async fn a_slow_download_holds_up_no_other() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), Remote::memory());
    let [slow, fast] = [put(&*remote, b"slow").await, put(&*remote, b"fast").await];
    let cache = open(&dir, 1 << 30, &remote);
    get(&cache, &fast).await.unwrap();
    remote.gate.forget_permits(Semaphore::MAX_PERMITS);
    let mut waiting = Box::pin(get(&cache, &slow));
    assert!(futures::poll!(&mut waiting).is_pending());
    assert_eq!(get(&cache, &fast).await.unwrap(), b"fast");
    remote.gate.add_permits(1);
    assert_eq!(waiting.await.unwrap(), b"slow");
}

#[tokio::test]
async fn a_download_that_nobody_waits_for_ends_and_can_begin_anew() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), Remote::memory());
    let digest = put(&*remote, b"contents").await;
    let cache = open(&dir, 1 << 30, &remote);
    remote.gate.forget_permits(Semaphore::MAX_PERMITS);
    let mut waiting = Box::pin(get(&cache, &digest));
    assert!(futures::poll!(&mut waiting).is_pending());
    drop(waiting);
    remote.gate.add_permits(2);
    assert_eq!(get(&cache, &digest).await.unwrap(), b"contents");
}

#[tokio::test]
async fn a_missing_blob_is_downloaded_for_the_next_request() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), Remote::memory());
    let digest = put(&*remote, b"contents").await;
    let cache = open(&dir, 1 << 30, &remote);
    assert!(cache.open_file_if_ready(&digest).await.unwrap().is_none());
    assert_eq!(get(&cache, &digest).await.unwrap(), b"contents");
    assert_eq!(remote.read(), [digest]);
    assert!(cache.open_file_if_ready(&digest).await.unwrap().is_some());
}

#[tokio::test]
async fn only_missing_chunks_are_fetched() {
    let (dir, remote) =
        (tempfile::tempdir().unwrap(), Remote::new(blobservice::from_addr("objectstore+memory:///").unwrap()));
    let old = splitmix(4_000_000);
    let mut new = old.clone();
    new[2_000_000] ^= 1;
    let [old_digest, new_digest] = [put(&*remote, &old).await, put(&*remote, &new).await];
    let cache = open(&dir, 1 << 30, &remote);
    assert!(get(&cache, &old_digest).await.unwrap() == old);
    assert!(remote.read().len() > 10);
    assert!(get(&cache, &new_digest).await.unwrap() == new);
    assert_eq!(remote.read().len(), 1);
}

#[tokio::test]
async fn a_blob_that_comes_damaged_is_neither_served_nor_kept() {
    struct Liar(Arc<Remote>);
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
    let (dir, remote) = (tempfile::tempdir().unwrap(), Remote::memory());
    let digest = put(&*remote, b"truth").await;
    let cache =
        CacheBlobService::open(dir.path(), 1 << 30, WritePolicy::Through, Arc::new(Liar(remote.clone()))).unwrap();
    for _ in 0..2 {
        let error = cache.open_file(&digest).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(error.to_string().contains("its contents have the digest"), "{error}");
        assert_eq!(cache.open_read(&digest).await.err().unwrap().to_string(), error.to_string());
    }
    drop(cache);
    assert!(!is_cached(dir.path(), &digest) && !is_cached(dir.path(), &B3Digest::of(b"lies")));
    assert_eq!(get(&open(&dir, 1 << 30, &remote), &digest).await.unwrap(), b"truth");
}

#[tokio::test]
async fn downloads_survive_a_restart_without_the_remote_store() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), Remote::memory());
    let digest = put(&*remote, b"contents").await;
    assert_eq!(get(&open(&dir, 1 << 30, &remote), &digest).await.unwrap(), b"contents");
    remote.gone.store(true, Ordering::Relaxed);
    let cache = open(&dir, 1 << 30, &remote);
    assert_eq!(get(&cache, &digest).await.unwrap(), b"contents");
    assert!(cache.open_file(&B3Digest::of(b"other")).await.unwrap_err().to_string().contains("gone"));
}

#[tokio::test]
async fn a_damaged_cached_blob_is_downloaded_again() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), Remote::memory());
    let digest = put(&*remote, b"contents").await;
    let damage = || {
        let hex = digest.to_hex();
        let path = dir.path().join("blobs/b3").join(&hex[..2]).join(hex);
        fs::remove_file(&path).unwrap();
        fs::write(path, b"cOntents").unwrap();
    };
    let cache = open(&dir, 1 << 30, &remote);
    download_each(&cache, &[digest]).await;
    damage();
    assert_eq!(get(&cache, &digest).await.unwrap(), b"contents");
    drop(cache);

    remote.gone.store(true, Ordering::Relaxed);
    let cache = CacheBlobService::open(dir.path(), 1 << 30, WritePolicy::Back, remote.clone()).unwrap();
    put(&cache, b"contents").await;
    cache.commit().await.unwrap();
    damage();
    assert!(get(&cache, &digest).await.unwrap_err().to_string().contains("damaged"));
    assert!(is_cached(dir.path(), &digest));
}
