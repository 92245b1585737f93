use std::{
    fs, io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use nix::errno::Errno;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

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

/// Otherwise the time of a put would tell whether somebody else has the same.
#[tokio::test]
async fn an_unseen_writer_writes_what_the_store_has_and_leaves_it_once() {
    let dir = tempfile::tempdir().unwrap();
    let service = LocalBlobService::open(dir.path()).unwrap();
    let large = vec![0; 1024 * 1024];
    for contents in [b"small".as_slice(), &large] {
        let digest = put(&service, contents).await;
        service.commit().await.unwrap();
        let files = || files_below(&dir.path().join(BLOBS)) + files_below(&dir.path().join(STAGING));
        let before = files();
        put(&service, contents).await;
        assert_eq!(files(), before);
        let mut writer = service.open_write_unseen().await;
        writer.write_all(contents).await.unwrap();
        assert_eq!(writer.close().await.unwrap(), digest);
        assert_eq!(files(), before + 1);
        service.commit().await.unwrap();
        assert_eq!(files(), before);
    }
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

/// A store of one blob whose file now has other contents, the file, and its digest.
async fn damaged_store(contents: &[u8], damaged: &[u8]) -> (tempfile::TempDir, PathBuf, B3Digest) {
    let dir = tempfile::tempdir().unwrap();
    let service = LocalBlobService::open(dir.path()).unwrap();
    let digest = put(&service, contents).await;
    service.commit().await.unwrap();
    let path = dir.path().join(BLOBS).join(blob_path(&digest));
    fs::remove_file(&path).unwrap();
    fs::write(&path, damaged).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
    (dir, path, digest)
}

/// Puts the right contents, and checks that the file has them for everybody.
async fn put_repairs(dir: &Path, path: &Path, contents: &[u8]) {
    let service = LocalBlobService::open(dir).unwrap();
    let digest = put(&service, contents).await;
    service.commit().await.unwrap();
    assert_eq!(fs::read(path).unwrap(), contents);
    assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o7777, 0o444);
    assert_eq!((files_below(&dir.join(BLOBS)), files_below(&dir.join(STAGING))), (1, 0));
    for service in [service, LocalBlobService::open(dir).unwrap()] {
        assert!(service.has(&digest).await.unwrap());
        let mut read = Vec::new();
        service.open_read(&digest).await.unwrap().unwrap().read_to_end(&mut read).await.unwrap();
        assert_eq!(read, contents);
    }
}

#[tokio::test]
async fn a_blob_that_was_found_damaged_is_replaced_by_the_next_put() {
    for bytes in [9, 1024 * 1024] {
        let (contents, damaged) = (vec![1; bytes], vec![2; bytes]);
        for by_descriptor in [true, false] {
            let (dir, path, digest) = damaged_store(&contents, &damaged).await;
            let finder = LocalBlobService::open(dir.path()).unwrap();
            assert!(finder.has(&digest).await.unwrap(), "nothing has read it yet");
            let error = if by_descriptor {
                finder.open_file(&digest).await.unwrap_err()
            } else {
                let mut reader = finder.open_read(&digest).await.unwrap().unwrap();
                reader.read_to_end(&mut Vec::new()).await.unwrap_err()
            };
            let fix = "the store is damaged: import or build the contents again, which replaces this file";
            assert!(error.to_string().ends_with(fix), "{error}");
            assert!(!finder.has(&digest).await.unwrap(), "or a client would not send it");
            put_repairs(dir.path(), &path, &contents).await;
            assert!(finder.has(&digest).await.unwrap());
        }
    }
}

#[tokio::test]
async fn a_blob_of_the_wrong_size_is_replaced_by_the_next_put() {
    for (bytes, wrong) in [(9, 0), (9, 10), (1024 * 1024, 1024 * 1024 - 1)] {
        let contents = vec![1; bytes];
        let (dir, path, digest) = damaged_store(&contents, &vec![1; wrong]).await;
        let finder = LocalBlobService::open(dir.path()).unwrap();
        assert!(finder.has(&digest).await.unwrap(), "nothing has looked at its size yet");
        assert!(!finder.has_whole(&digest, bytes as u64).await.unwrap());
        put_repairs(dir.path(), &path, &contents).await;
        let (dir, path, _) = damaged_store(&contents, &vec![1; wrong]).await;
        put_repairs(dir.path(), &path, &contents).await;
    }
}

#[tokio::test]
async fn a_sound_blob_is_not_replaced_by_a_put() {
    let dir = tempfile::tempdir().unwrap();
    let (one, other) = (LocalBlobService::open(dir.path()).unwrap(), LocalBlobService::open(dir.path()).unwrap());
    let digest = put(&one, b"sound").await;
    put(&other, b"sound").await;
    one.commit().await.unwrap();
    let inode = || fs::metadata(dir.path().join(BLOBS).join(blob_path(&digest))).unwrap().ino();
    let before = inode();
    other.commit().await.unwrap();
    put(&one, b"sound").await;
    one.commit().await.unwrap();
    assert_eq!(inode(), before);
}

#[test]
fn a_blob_of_the_wrong_size_that_may_not_be_marked_is_an_error() {
    let (dir, path, digest) = futures::executor::block_on(damaged_store(b"contents", b"content"));
    let store = dir.path().to_owned();
    failing((nix::libc::SYS_fchmod, 1, 0o1444), Errno::EPERM, move || {
        futures::executor::block_on(async {
            let service = LocalBlobService::open(&store).unwrap();
            let mut writer = service.open_write().await;
            writer.write_all(b"contents").await.unwrap();
            let error = writer.close().await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            let message = "has 7 bytes instead of 8: the store is damaged: remove this file, and import";
            assert!(error.to_string().contains(message), "{error}");
        });
    });
    assert_eq!(digest, B3Digest::of(b"contents"));
    assert_eq!(fs::read(path).unwrap(), b"content");
}
