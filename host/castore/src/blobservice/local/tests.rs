use std::{
    fs, io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
};

use nix::errno::Errno;
use tokio::io::AsyncWriteExt as _;

use super::{
    LocalBlobService,
    layout::{BLOBS, STAGING, blob_path},
};
use crate::{B3Digest, BlobService as _, testing::failing};

async fn put(service: &LocalBlobService, contents: &[u8]) -> B3Digest {
    let mut writer = service.open_write().await;
    writer.write_all(contents).await.unwrap();
    writer.close().await.unwrap()
}

fn files_below(dir: &Path) -> usize {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { files_below(&path) } else { 1 }).sum()
}

#[tokio::test]
async fn a_committed_blob_is_a_read_only_file_named_by_its_digest() {
    let dir = tempfile::tempdir().unwrap();
    let service = LocalBlobService::open(dir.path()).unwrap();
    let digest = put(&service, b"contents").await;
    assert_eq!(files_below(&dir.path().join(BLOBS)), 0);
    service.commit().await.unwrap();
    let hex = digest.to_hex();
    let path = dir.path().join("b3").join(&hex[..2]).join(&hex);
    assert_eq!(fs::read(&path).unwrap(), b"contents");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o444);
    assert_eq!(files_below(&dir.path().join(STAGING)), 0);
}

#[tokio::test]
async fn uncommitted_blobs_are_private_and_deleted_with_their_service() {
    let dir = tempfile::tempdir().unwrap();
    let service = LocalBlobService::open(dir.path()).unwrap();
    let digest = put(&service, b"uncommitted").await;
    let other = LocalBlobService::open(dir.path()).unwrap();
    assert!(service.has(&digest).await.unwrap());
    assert!(!other.has(&digest).await.unwrap());
    drop(service);
    assert!(!LocalBlobService::open(dir.path()).unwrap().has(&digest).await.unwrap());
    assert_eq!(files_below(&dir.path().join(STAGING)) + files_below(&dir.path().join(BLOBS)), 0);
}

#[tokio::test]
async fn what_a_killed_process_left_is_swept_at_open() {
    let dir = tempfile::tempdir().unwrap();
    let living = LocalBlobService::open(dir.path()).unwrap();
    let staged = put(&living, b"in use").await;
    // A killed process runs no destructors, and the kernel drops its locks.
    let leftover = dir.path().join(STAGING).join("1-0");
    fs::create_dir(&leftover).unwrap();
    fs::write(leftover.join("0"), b"half a bl").unwrap();
    let service = LocalBlobService::open(dir.path()).unwrap();
    assert!(!leftover.exists());
    assert!(!service.has(&B3Digest::of(b"half a bl")).await.unwrap());
    living.commit().await.unwrap();
    assert!(service.has(&staged).await.unwrap());
}

#[tokio::test]
async fn two_services_may_commit_the_same_blob() {
    let dir = tempfile::tempdir().unwrap();
    let one = LocalBlobService::open(dir.path()).unwrap();
    let other = LocalBlobService::open(dir.path()).unwrap();
    let digest = put(&one, b"same").await;
    assert_eq!(put(&other, b"same").await, digest);
    one.commit().await.unwrap();
    other.commit().await.unwrap();
    assert_eq!(files_below(&dir.path().join(BLOBS)), 1);
    assert_eq!(files_below(&dir.path().join(STAGING)), 0);
}

#[test]
fn a_file_system_without_rename_flags_will_do() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    let renaming = (nix::libc::SYS_renameat2, 4, nix::libc::RENAME_NOREPLACE as nix::libc::c_int);
    failing(renaming, Errno::EINVAL, move || {
        futures::executor::block_on(async {
            let (one, other) = (LocalBlobService::open(&path).unwrap(), LocalBlobService::open(&path).unwrap());
            let digest = put(&one, b"same").await;
            assert_eq!(put(&other, b"same").await, digest);
            one.commit().await.unwrap();
            let first = fs::metadata(path.join(BLOBS).join(blob_path(&digest))).unwrap();
            other.commit().await.unwrap();
            let second = fs::metadata(path.join(BLOBS).join(blob_path(&digest))).unwrap();
            assert_eq!((first.ino(), first.nlink()), (second.ino(), second.nlink()), "it has been replaced");
        });
    });
    assert_eq!(files_below(&dir.path().join(STAGING)), 0);
}

#[test]
fn a_full_disk_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    const BYTES: usize = 64 * 1024;
    failing((nix::libc::SYS_write, 2, BYTES as nix::libc::c_int), Errno::ENOSPC, move || {
        futures::executor::block_on(async {
            let service = LocalBlobService::open(&path).unwrap();
            // The first is written when it is closed, the other one at once.
            for contents in [vec![0; BYTES], vec![0; BYTES + 1024 * 1024]] {
                let mut writer = service.open_write().await;
                let written = writer.write_all(&contents).await;
                let error = match written {
                    Ok(()) => writer.close().await.unwrap_err(),
                    Err(error) => error,
                };
                assert_eq!(error.kind(), io::ErrorKind::StorageFull);
                let place = format!("{}: No space left", path.join(STAGING).display());
                assert!(error.to_string().starts_with(&place), "{error}");
            }
        });
    });
}

#[tokio::test]
async fn a_blob_known_already_is_not_staged() {
    let dir = tempfile::tempdir().unwrap();
    let service = LocalBlobService::open(dir.path()).unwrap();
    let large = vec![7; 1024 * 1024];
    for contents in [b"known".as_slice(), &large] {
        put(&service, contents).await;
        put(&service, contents).await;
    }
    assert_eq!(files_below(&dir.path().join(STAGING)), 2);
    service.commit().await.unwrap();
    put(&service, b"known").await;
    put(&service, &large).await;
    assert_eq!(files_below(&dir.path().join(STAGING)), 0);
}
