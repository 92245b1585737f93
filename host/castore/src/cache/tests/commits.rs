use super::*;

#[tokio::test]
async fn a_commit_writes_through() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), Remote::memory());
    let cache = open(&dir, 1 << 30, &remote);
    let batch = cache.batch();
    let digest = put(&*batch, b"contents").await;
    assert!(!remote.has(&digest).await.unwrap());
    batch.commit().await.unwrap();
    assert!(remote.has(&digest).await.unwrap() && is_cached(dir.path(), &digest));
}

#[tokio::test]
async fn a_commit_that_fails_can_be_repeated() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), Remote::memory());
    let cache = open(&dir, 1 << 30, &remote);
    let digest = put(&cache, b"contents").await;
    remote.gone.store(true, Ordering::Relaxed);
    cache.commit().await.unwrap_err();
    assert!(!is_cached(dir.path(), &digest));
    remote.gone.store(false, Ordering::Relaxed);
    cache.commit().await.unwrap();
    assert!(remote.has(&digest).await.unwrap() && is_cached(dir.path(), &digest));
}

#[tokio::test]
async fn a_commit_beside_one_that_fails_brings_what_that_one_did_not() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), Remote::memory());
    let cache = open(&dir, 1 << 30, &remote);
    let digest = put(&cache, b"contents").await;
    remote.questions.forget_permits(Semaphore::MAX_PERMITS);
    let (mut first, mut second) = (cache.commit(), cache.commit());
    assert!(futures::poll!(&mut first).is_pending());
    assert!(futures::poll!(&mut second).is_pending());
    remote.gone.store(true, Ordering::Relaxed);
    remote.questions.add_permits(1);
    let failed = async {
        let failed = first.await;
        remote.gone.store(false, Ordering::Relaxed);
        remote.questions.add_permits(2);
        failed
    };
    let (failed, committed) = tokio::join!(failed, second);
    failed.unwrap_err();
    committed.unwrap();
    assert!(remote.has(&digest).await.unwrap() && is_cached(dir.path(), &digest));
}

#[tokio::test]
async fn a_commit_that_is_given_up_can_be_repeated() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), Remote::memory());
    let cache = open(&dir, 1 << 30, &remote);
    let digest = put(&cache, b"contents").await;
    remote.questions.forget_permits(Semaphore::MAX_PERMITS);
    let mut given_up = cache.commit();
    assert!(futures::poll!(&mut given_up).is_pending());
    drop(given_up);
    remote.questions.add_permits(2);
    cache.commit().await.unwrap();
    assert!(remote.has(&digest).await.unwrap() && is_cached(dir.path(), &digest));
}

#[tokio::test]
async fn blobs_stay_cached_until_written_back_even_over_a_restart() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), Remote::memory());
    let back = || CacheBlobService::open(dir.path(), 1, WritePolicy::Back, remote.clone()).unwrap();
    remote.gone.store(true, Ordering::Relaxed);
    let cache = back();
    let digest = put(&cache, b"contents").await;
    cache.commit().await.unwrap();
    cache.flush().await.unwrap_err();
    cache.sweep_now().await.unwrap();
    assert!(is_cached(dir.path(), &digest));
    drop(cache);
    remote.gone.store(false, Ordering::Relaxed);
    assert!(!remote.has(&digest).await.unwrap());
    let cache = back();
    cache.flush().await.unwrap();
    assert!(remote.has(&digest).await.unwrap());
    cache.sweep_now().await.unwrap();
    assert!(!is_cached(dir.path(), &digest));
    assert_eq!(fs::read_dir(dir.path().join("blobs/pending-blobs")).unwrap().count(), 0);
}
