//! What every blob service must do, run on each.

use std::{
    any::Any,
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    sync::Arc,
};

use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _};

use super::{
    BlobService, CacheBlobService, LocalBlobService, MAX_MEMORY_BYTES, MemoryBlobService, ObjectStoreBlobService,
    from_addr,
};
use crate::{
    B3Digest, Store, WritePolicy,
    grpc::{
        GrpcBlobService, Package,
        testing::{serve_on_socket, serve_on_tcp},
    },
    objectstore::{self, testing::addresses},
    testing::splitmix,
    views::viewed,
};

/// A size that every implementation has to keep in several pieces.
const LARGE_BYTES: usize = 1024 * 1024 + 7;

/// Services, and what must outlive each.
type Services = Vec<(Box<dyn BlobService>, Box<dyn Any>)>;

/// All services.
fn services() -> Services {
    let object_stores = addresses().into_iter().map(|(addr, guard)| {
        let objects = objectstore::open(&addr).unwrap().into();
        (Box::new(ObjectStoreBlobService::new(objects)) as Box<dyn BlobService>, guard)
    });
    batching_services().into_iter().chain(object_stores).chain(grpc_services()).collect()
}

/// One under each name and over each transport that is not TLS, in front of different stores.
fn grpc_services() -> Services {
    let dir = tempfile::tempdir().unwrap();
    let local = LocalBlobService::open(dir.path()).unwrap();
    let on_tcp: Box<dyn BlobService> = Box::new(GrpcBlobService::new(serve_on_tcp(&Store::memory())));
    let mut services: Services = vec![(on_tcp, Box::new(()))];
    let chunked = from_addr("objectstore+memory:///").unwrap();
    let local: (Package, Arc<dyn BlobService>, Box<dyn Any>) = (Package::Snix, Arc::new(local), Box::new(dir));
    for (package, blobs, guard) in [local, (Package::Tvix, chunked, Box::new(()))] {
        let (peer, socket_dir) = serve_on_socket(&Store { blobs, ..Store::memory() }, &[package]);
        services.push((Box::new(GrpcBlobService::new(peer)), Box::new((socket_dir, guard))));
    }
    services
}

/// The services in which blobs of a batch are invisible until a commit.
fn batching_services() -> Services {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let local = LocalBlobService::open(&dir.path().join("store")).unwrap();
    let memory: Box<dyn BlobService> = Box::new(MemoryBlobService::default());
    let mut services: Services = vec![(memory, Box::new(())), (Box::new(local), Box::new(dir.clone()))];
    for blobs in ["memory://".to_owned(), format!("file://{}/viewed", dir.path().display())] {
        let grants = tempfile::tempdir().unwrap();
        let store = Store { blobs: from_addr(&blobs).unwrap(), ..Store::memory() };
        let (blobs, _) = viewed(store, &grants.path().join("grants.redb"));
        services.push((blobs, Box::new((grants, dir.clone()))));
    }
    for (remote, policy) in [("memory://", WritePolicy::Through), ("objectstore+memory:///", WritePolicy::Back)] {
        let dir = tempfile::tempdir().unwrap();
        let remote = from_addr(remote).unwrap();
        let cache = CacheBlobService::open(dir.path(), 1 << 30, policy, remote).unwrap();
        services.push((Box::new(cache), Box::new(dir)));
    }
    services
}

fn large() -> Vec<u8> {
    (0..LARGE_BYTES).map(|at| (at * 31 / 7) as u8).collect()
}

async fn put(service: &dyn BlobService, pieces: &[&[u8]]) -> B3Digest {
    let mut writer = service.open_write().await;
    for piece in pieces {
        writer.write_all(piece).await.unwrap();
    }
    writer.close().await.unwrap()
}

async fn get(service: &dyn BlobService, digest: &B3Digest) -> Vec<u8> {
    let mut contents = Vec::new();
    service.open_read(digest).await.unwrap().unwrap().read_to_end(&mut contents).await.unwrap();
    contents
}

#[tokio::test]
async fn blobs_can_be_read_before_and_after_a_commit() {
    let large = large();
    for (service, _dir) in services() {
        for contents in [b"x".as_slice(), b"some text", &large] {
            let digest = put(&*service, &[contents]).await;
            assert_eq!(digest, B3Digest::of(contents));
            for _ in 0..2 {
                assert!(service.has(&digest).await.unwrap());
                let chunks = service.chunks(&digest).await.unwrap().unwrap();
                let whole = chunks.iter().map(|chunk| chunk.size).sum::<u64>();
                assert!(chunks.is_empty() || whole == contents.len() as u64);
                for chunk in chunks {
                    let piece = get(&*service, &chunk.digest.as_ref().try_into().unwrap()).await;
                    assert_eq!(piece.len() as u64, chunk.size);
                }
                assert_eq!(get(&*service, &digest).await, contents);
                service.commit().await.unwrap();
            }
        }
    }
}

#[tokio::test]
async fn the_pieces_of_a_blob_do_not_matter() {
    let large = large();
    for (service, _dir) in services() {
        let pieces: Vec<_> = large.chunks(100_003).collect();
        let digest = put(&*service, &pieces).await;
        assert_eq!(digest, B3Digest::of(&large));
        assert_eq!(get(&*service, &digest).await, large);
    }
}

#[tokio::test]
async fn an_unknown_blob_is_not_there() {
    for (service, _dir) in services() {
        let digest = B3Digest::of(b"never put");
        assert!(!service.has(&digest).await.unwrap());
        assert!(service.open_read(&digest).await.unwrap().is_none());
        assert!(service.open_file(&digest).await.unwrap().is_none());
        assert!(service.chunks(&digest).await.unwrap().is_none());
    }
}

#[tokio::test]
async fn the_empty_blob_is_always_there() {
    for (service, _dir) in services() {
        for _ in 0..2 {
            assert!(service.has(&B3Digest::EMPTY).await.unwrap());
            assert_eq!(get(&*service, &B3Digest::EMPTY).await, b"");
            let mut file = service.open_file(&B3Digest::EMPTY).await.unwrap().unwrap();
            assert_eq!(file.read(&mut [0]).unwrap(), 0);
            assert_eq!(put(&*service, &[]).await, B3Digest::EMPTY);
            service.commit().await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_blob_that_is_put_twice_is_there_once() {
    let large = large();
    for (service, _dir) in services() {
        for contents in [b"twice".as_slice(), &large] {
            let first = put(&*service, &[contents]).await;
            assert_eq!(put(&*service, &[contents]).await, first);
            service.commit().await.unwrap();
            assert_eq!(put(&*service, &[contents]).await, first);
            service.commit().await.unwrap();
            assert_eq!(get(&*service, &first).await, contents);
        }
    }
}

#[tokio::test]
async fn a_writer_that_is_dropped_leaves_nothing() {
    let large = large();
    for (service, _dir) in services() {
        for contents in [b"dropped".as_slice(), &large] {
            let mut writer = service.open_write().await;
            writer.write_all(contents).await.unwrap();
            drop(writer);
            service.commit().await.unwrap();
            assert!(!service.has(&B3Digest::of(contents)).await.unwrap());
        }
    }
}

#[tokio::test]
async fn a_closed_writer_repeats_its_digest_and_takes_no_more() {
    for (service, _dir) in services() {
        let mut writer = service.open_write().await;
        writer.write_all(b"closed").await.unwrap();
        let digest = writer.close().await.unwrap();
        assert!(writer.write_all(b"more").await.is_err());
        assert_eq!(writer.close().await.unwrap(), digest);
        assert_eq!(get(&*service, &digest).await, b"closed");
    }
}

#[tokio::test]
async fn readers_seek() {
    let large = large();
    for (service, _dir) in services() {
        let digest = put(&*service, &[&large]).await;
        let mut reader = service.open_read(&digest).await.unwrap().unwrap();
        let mut piece = [0; 16];
        assert_eq!(reader.seek(SeekFrom::Start(500_000)).await.unwrap(), 500_000);
        reader.read_exact(&mut piece).await.unwrap();
        assert_eq!(piece, large[500_000..500_016]);
        assert_eq!(reader.seek(SeekFrom::Current(-16)).await.unwrap(), 500_000);
        assert_eq!(reader.seek(SeekFrom::End(-16)).await.unwrap(), LARGE_BYTES as u64 - 16);
        reader.read_exact(&mut piece).await.unwrap();
        assert_eq!(piece, large[LARGE_BYTES - 16..]);
        assert_eq!(reader.read(&mut piece).await.unwrap(), 0);
    }
}

#[tokio::test]
async fn the_file_of_a_blob_is_whole_at_its_start_and_read_only() {
    let large = large();
    for (service, _dir) in services() {
        let digest = put(&*service, &[&large]).await;
        for _ in 0..2 {
            let mut file = service.open_file(&digest).await.unwrap().unwrap();
            let mut contents = Vec::new();
            file.read_to_end(&mut contents).unwrap();
            assert_eq!(contents, large);
            assert!(file.write(b"x").is_err());
            // Another one has an offset of its own.
            let mut other = service.open_file(&digest).await.unwrap().unwrap();
            assert_eq!(other.stream_position().unwrap(), 0);
            service.commit().await.unwrap();
        }
    }
}

#[tokio::test]
async fn the_file_of_a_huge_blob_is_whole() {
    let service = MemoryBlobService::default();
    let contents = splitmix(MAX_MEMORY_BYTES as usize + 1);
    let digest = put(&service, &[&contents]).await;
    let mut file = service.open_file(&digest).await.unwrap().unwrap();
    let mut copy = Vec::new();
    file.read_to_end(&mut copy).unwrap();
    assert!(copy == contents && file.write(b"x").is_err());
}

#[tokio::test]
async fn several_writers_are_open_at_once() {
    for (service, _dir) in services() {
        let mut one = service.open_write().await;
        let mut other = service.open_write().await;
        one.write_all(b"on").await.unwrap();
        other.write_all(b"oth").await.unwrap();
        one.write_all(b"e").await.unwrap();
        other.write_all(b"er").await.unwrap();
        assert_eq!(one.close().await.unwrap(), B3Digest::of(b"one"));
        assert_eq!(other.close().await.unwrap(), B3Digest::of(b"other"));
    }
}

#[tokio::test]
async fn a_batch_is_seen_by_others_once_it_is_committed() {
    let large = large();
    for (service, _dir) in batching_services() {
        let known = put(&*service, &[b"known"]).await;
        service.commit().await.unwrap();
        for contents in [b"batch".as_slice(), &large] {
            let (batch, other) = (service.batch(), service.batch());
            assert_eq!(get(&*batch, &known).await, b"known");
            let digest = put(&*batch, &[contents]).await;
            assert_eq!(get(&*batch, &digest).await, contents);
            other.commit().await.unwrap();
            service.commit().await.unwrap();
            assert!(!service.has(&digest).await.unwrap());
            assert!(!other.has(&digest).await.unwrap());
            batch.commit().await.unwrap();
            for service in [&*service, &*other, &*batch, &*batch.batch()] {
                assert_eq!(get(service, &digest).await, contents);
            }
        }
    }
}

#[tokio::test]
async fn a_batch_that_is_dropped_leaves_nothing() {
    let large = large();
    for (service, _dir) in batching_services() {
        for contents in [b"dropped".as_slice(), &large] {
            let digest = put(&*service.batch(), &[contents]).await;
            service.commit().await.unwrap();
            assert!(!service.has(&digest).await.unwrap());
        }
    }
}
