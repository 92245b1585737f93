use super::*;

#[tokio::test]
async fn the_least_recently_used_blob_is_evicted_first() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), Remote::memory());
    let mut digests = Vec::new();
    for at in 0..10 {
        digests.push(put(&*remote, &[at; 1_000]).await);
    }
    let cache = open(&dir, 5_000, &remote);
    download_each(&cache, &digests[..4]).await;
    for (minutes_ago, digest) in [(5, digests[0]), (4, digests[1]), (3, digests[2]), (2, digests[3])] {
        set_age(dir.path(), &digest, Duration::from_secs(minutes_ago * 60));
    }
    get(&cache, &digests[0]).await.unwrap();
    download_each(&cache, &digests[4..6]).await;
    let there: Vec<_> = (0..6).filter(|at| is_cached(dir.path(), &digests[*at])).collect();
    assert_eq!(there, [0, 3, 4, 5]);
    // What has gone comes back.
    assert_eq!(get(&cache, &digests[1]).await.unwrap(), [1; 1_000]);
}

#[tokio::test]
async fn the_time_of_use_is_renewed_once_a_minute() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), Remote::memory());
    let digest = put(&*remote, b"contents").await;
    let cache = open(&dir, 1 << 30, &remote);
    download_each(&cache, &[digest]).await;
    for (seconds, is_renewed) in [(30, false), (90, true)] {
        let before = set_age(dir.path(), &digest, Duration::from_secs(seconds));
        get(&cache, &digest).await.unwrap();
        let after = committed(dir.path(), &digest).metadata().unwrap().modified().unwrap();
        assert_eq!(after > before, is_renewed, "after {seconds} s");
    }
    // As a clock that was set back leaves it.
    let before = SystemTime::now() + Duration::from_secs(3600);
    committed(dir.path(), &digest).set_modified(before).unwrap();
    get(&cache, &digest).await.unwrap();
    assert!(committed(dir.path(), &digest).metadata().unwrap().modified().unwrap() < before);
}

fn committed(dir: &Path, digest: &B3Digest) -> File {
    let hex = digest.to_hex();
    File::open(dir.join("blobs/b3").join(&hex[..2]).join(hex)).unwrap()
}

/// Sets the age of a committed blob, and returns its time.
fn set_age(dir: &Path, digest: &B3Digest, age: Duration) -> SystemTime {
    let file = committed(dir, digest);
    file.set_modified(SystemTime::now() - age).unwrap();
    file.metadata().unwrap().modified().unwrap()
}

#[tokio::test]
async fn used_blobs_are_not_evicted() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), Remote::memory());
    let mut digests = Vec::new();
    for at in 0..10 {
        digests.push(put(&*remote, &[at; 1_000]).await);
    }
    let cache = open(&dir, 3_000, &remote);
    let open_file: File = cache.open_file(&digests[0]).await.unwrap().unwrap();
    let batch = cache.batch();
    drop(batch.open_file(&digests[1]).await.unwrap());
    download_each(&cache, &digests[2..]).await;
    assert!(is_cached(dir.path(), &digests[0]) && is_cached(dir.path(), &digests[1]));
    drop((open_file, batch));
    download_each(&cache, &digests[2..6]).await;
    assert!(!is_cached(dir.path(), &digests[0]) && !is_cached(dir.path(), &digests[1]));
}

#[tokio::test]
async fn a_blob_larger_than_the_bound_is_served() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), Remote::memory());
    let contents = splitmix(100_000);
    let digest = put(&*remote, &contents).await;
    let cache = open(&dir, 1_000, &remote);
    assert_eq!(get(&cache, &digest).await.unwrap(), contents);
    cache.sweep_now().await.unwrap();
    assert!(!is_cached(dir.path(), &digest));
}

#[tokio::test]
async fn garbage_collection_of_a_cache_keeps_leased_blobs() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), Arc::<MemoryDirectoryService>::default());
    let remote_dir = tempfile::tempdir().unwrap();
    let remote_blobs = Arc::new(LocalBlobService::open(remote_dir.path()).unwrap());
    let blobs = CacheBlobService::open(dir.path(), 1 << 30, WritePolicy::Through, remote_blobs.clone()).unwrap();
    let directories = CacheDirectoryService::open(dir.path(), 1 << 30, WritePolicy::Through, remote).unwrap();
    let [leased, other] = [put(&blobs, b"leased").await, put(&blobs, b"other").await];
    blobs.commit().await.unwrap();
    let tree = Directory::try_from_iter([(name("f"), file(b"leased", false))]).unwrap();
    put_tree(&directories, &tree).await;
    let lease = blobs.lease(&[tree.to_node()]).unwrap();
    collect_all(&dir);
    assert!(is_cached(dir.path(), &leased) && !is_cached(dir.path(), &other));
    assert_eq!(
        LocalStore::open(remote_dir.path(), &remote_dir.path().join("d")).unwrap().blobs().leased().unwrap().len(),
        1
    );
    drop(lease);
    collect_all(&dir);
    assert!(!is_cached(dir.path(), &leased));
}
