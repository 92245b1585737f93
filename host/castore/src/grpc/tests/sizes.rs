//! The largest trees that have to pass, and the smallest that don't.

use futures::TryStreamExt as _;

use super::{
    super::{GrpcDirectoryService, MAX_DIRECTORY_ENTRIES, Package, testing::serve_on_socket},
    above, leaf, numbered,
};
use crate::{
    Directory, DirectoryService as _, Store,
    testing::{file, name, symlink},
};

#[tokio::test]
async fn a_tree_that_is_ten_thousand_deep_comes_whole() {
    const DEPTH: usize = 10_000;
    let (peer, _dir) = serve_on_socket(&Store::memory(), &[Package::Snix]);
    let directories = GrpcDirectoryService::new(peer);
    let mut putter = directories.put_multiple_start();
    let mut top = leaf("bottom");
    for _ in 1..DEPTH {
        putter.put(top.clone()).await.unwrap();
        top = above(&top);
    }
    putter.put(top.clone()).await.unwrap();
    assert_eq!(putter.close().await.unwrap(), top.digest());
    let walked: Vec<_> = directories.get_recursive(&top.digest()).try_collect().await.unwrap();
    assert_eq!((walked.len(), walked.first(), walked.last()), (DEPTH, Some(&top), Some(&leaf("bottom"))));
}

#[tokio::test]
async fn a_million_entries_fit_into_a_directory() {
    let (peer, _dir) = serve_on_socket(&Store::memory(), &[Package::Snix]);
    let directories = GrpcDirectoryService::new(peer);
    let node = file(b"x", false);
    let mut large = Directory::try_from_iter((0..1_000_000).map(|at| (numbered(at), node.clone()))).unwrap();
    let digest = directories.put(large.clone()).await.unwrap();
    assert!(directories.get(&digest).await.unwrap().as_ref() == Some(&large));
    for at in 1_000_000..=MAX_DIRECTORY_ENTRIES {
        large.add(numbered(at), symlink("t")).unwrap();
    }
    let error = directories.put(large).await.unwrap_err();
    assert!(error.to_string().contains("has 1048577 entries; the limit over gRPC is 1048576"), "{error}");
}

#[tokio::test]
async fn a_directory_with_too_many_bytes_is_refused() {
    let (peer, _dir) = serve_on_socket(&Store::memory(), &[Package::Snix]);
    let target = "t".repeat(4000);
    let large = Directory::try_from_iter((0..17_000).map(|at| (name(&format!("{at}")), symlink(&target)))).unwrap();
    let error = GrpcDirectoryService::new(peer).put(large).await.unwrap_err();
    assert!(error.to_string().contains("the limit over gRPC is 67108864"), "{error}");
}
