//! What every directory service must do, run on each.

use std::{any::Any, collections::HashSet, io, sync::Arc};

use futures::TryStreamExt as _;

use super::{
    CacheDirectoryService, DirectoryMemory, DirectoryMemoryError, DirectoryService, MemoryDirectoryService,
    ObjectStoreDirectoryService, RedbDirectoryService,
};
use crate::{
    B3Digest, Directory, Node, Store, WritePolicy,
    grpc::{
        GrpcDirectoryService, Package,
        testing::{serve_on_socket, serve_on_tcp},
    },
    objectstore::{self, testing::addresses},
    testing::{file, name, symlink},
    views::viewed,
};

/// The services, and what must outlive each.
fn services() -> Vec<(Box<dyn DirectoryService>, Box<dyn Any>)> {
    let dir = tempfile::tempdir().unwrap();
    let redb = RedbDirectoryService::open(&dir.path().join("new/directories.redb")).unwrap();
    let object_stores = addresses().into_iter().map(|(addr, guard)| {
        let objects = objectstore::open(&addr).unwrap().into();
        (Box::new(ObjectStoreDirectoryService::new(objects)) as Box<dyn DirectoryService>, guard)
    });
    let memory: Box<dyn DirectoryService> = Box::new(MemoryDirectoryService::default());
    let cache_dir = tempfile::tempdir().unwrap();
    let remote = Arc::<MemoryDirectoryService>::default();
    let cache = CacheDirectoryService::open(cache_dir.path(), 1 << 30, WritePolicy::Through, remote).unwrap();
    let back_dir = tempfile::tempdir().unwrap();
    let remote = Arc::<MemoryDirectoryService>::default();
    let back = CacheDirectoryService::open(back_dir.path(), 1 << 30, WritePolicy::Back, remote).unwrap();
    let viewed_dir = tempfile::tempdir().unwrap();
    let directories = RedbDirectoryService::open(&viewed_dir.path().join("directories.redb")).unwrap();
    let store = Store { directories: Arc::new(directories), ..Store::memory() };
    let (_, view) = viewed(store, &viewed_dir.path().join("grants.redb"));
    let others: [(_, Box<dyn Any>); 5] = [
        (memory, Box::new(())),
        (view, Box::new(viewed_dir)),
        (Box::new(redb), Box::new(dir)),
        (Box::new(cache), Box::new(cache_dir)),
        (Box::new(back), Box::new(back_dir)),
    ];
    others.into_iter().chain(object_stores).chain(grpc_services()).collect()
}

/// One under each name and over each transport that is not TLS, in front of different stores.
fn grpc_services() -> Vec<(Box<dyn DirectoryService>, Box<dyn Any>)> {
    let dir = tempfile::tempdir().unwrap();
    let redb = RedbDirectoryService::open(&dir.path().join("directories.redb")).unwrap();
    let on_tcp = GrpcDirectoryService::new(serve_on_tcp(&Store::memory()));
    let mut services: Vec<(Box<dyn DirectoryService>, Box<dyn Any>)> = vec![(Box::new(on_tcp), Box::new(()))];
    let memory = Arc::<MemoryDirectoryService>::default();
    let redb: (Package, Arc<dyn DirectoryService>, Box<dyn Any>) = (Package::Snix, Arc::new(redb), Box::new(dir));
    for (package, directories, guard) in [redb, (Package::Tvix, memory, Box::new(()))] {
        let (peer, socket_dir) = serve_on_socket(&Store { directories, ..Store::memory() }, &[package]);
        services.push((Box::new(GrpcDirectoryService::new(peer)), Box::new((socket_dir, guard))));
    }
    services
}

fn leaf() -> Directory {
    Directory::try_from_iter([(name("file"), file(b"x", true)), (name("link"), symlink("file"))]).unwrap()
}

/// A directory of these, named 0, 1, ….
fn above(children: &[&Directory]) -> Directory {
    let nodes = children.iter().enumerate().map(|(at, child)| (name(&at.to_string()), child.to_node()));
    Directory::try_from_iter(nodes).unwrap()
}

async fn put_tree(service: &dyn DirectoryService, directories: &[&Directory]) -> io::Result<B3Digest> {
    let mut putter = service.put_multiple_start();
    for directory in directories {
        putter.put((*directory).clone()).await?;
    }
    putter.close().await
}

async fn walk(service: &dyn DirectoryService, root: &B3Digest) -> io::Result<Vec<Directory>> {
    service.get_recursive(root).try_collect().await
}

fn refusal<T: std::fmt::Debug>(result: io::Result<T>) -> String {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    error.to_string()
}

#[tokio::test]
async fn a_directory_that_is_put_can_be_got() {
    for (service, _dir) in services() {
        for directory in [Directory::new(), leaf()] {
            assert_eq!(service.get(&directory.digest()).await.unwrap(), None);
            assert_eq!(service.put(directory.clone()).await.unwrap(), directory.digest());
            assert_eq!(service.put(directory.clone()).await.unwrap(), directory.digest());
            assert_eq!(service.get(&directory.digest()).await.unwrap(), Some(directory));
        }
    }
}

#[tokio::test]
async fn a_walk_lists_each_directory_once_and_after_a_parent() {
    let (leaf, empty) = (leaf(), Directory::new());
    let middle = above(&[&leaf, &empty]);
    let root = above(&[&middle, &leaf, &middle, &empty]);
    for (service, _dir) in services() {
        let digest = put_tree(&*service, &[&leaf, &empty, &middle, &root]).await.unwrap();
        assert_eq!(digest, root.digest());
        let found = walk(&*service, &digest).await.unwrap();
        assert_eq!(found.len(), 4);
        let mut announced = HashSet::from([digest]);
        for directory in found {
            assert!(announced.contains(&directory.digest()));
            announced.extend(directory.children().map(|(child, _)| child));
        }
    }
}

#[tokio::test]
async fn an_unknown_root_gives_an_empty_stream() {
    for (service, _dir) in services() {
        assert_eq!(walk(&*service, &leaf().digest()).await.unwrap(), []);
    }
}

#[tokio::test]
async fn a_directory_can_be_put_if_its_children_exist() {
    let leaf = leaf();
    let middle = above(&[&leaf]);
    // The leaf is below the middle, too, and comes before it as well as after it.
    for root in [above(&[&leaf, &middle]), above(&[&middle, &leaf])] {
        for (service, _dir) in services() {
            for directory in [&leaf, &middle, &root] {
                assert_eq!(service.put(directory.clone()).await.unwrap(), directory.digest());
            }
            assert_eq!(walk(&*service, &root.digest()).await.unwrap().len(), 3);
        }
    }
}

#[tokio::test]
async fn a_hole_gives_an_error() {
    for (service, _dir) in services() {
        let root = above(&[&leaf()]);
        // A service that keeps whole trees refuses this one.
        let error = match service.put(root).await {
            Ok(digest) => walk(&*service, &digest).await.unwrap_err(),
            Err(error) => error,
        };
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(error.to_string().contains(&leaf().digest().to_string()));
    }
}

#[tokio::test]
async fn a_putter_takes_leaves_first_and_the_root_last() {
    let leaf = leaf();
    let root = above(&[&leaf]);
    for (service, _dir) in services() {
        assert!(refusal(put_tree(&*service, &[&root, &leaf]).await).contains("put leaves first"));
        assert!(refusal(put_tree(&*service, &[&Directory::new(), &leaf]).await).contains("is not below the root"));
        assert!(refusal(put_tree(&*service, &[&leaf, &root, &leaf]).await).contains("put the root last"));
        assert!(refusal(put_tree(&*service, &[]).await).contains("at least one directory"));
        put_tree(&*service, &[&leaf, &leaf, &root]).await.unwrap();
    }
}

#[tokio::test]
async fn a_putter_checks_the_sizes_of_children() {
    let leaf = leaf();
    let wrong = Node::Directory { digest: leaf.digest(), size: leaf.size() + 1 };
    let root = Directory::try_from_iter([(name("d"), wrong)]).unwrap();
    let once = Node::Directory { digest: leaf.digest(), size: leaf.len() as u64 };
    let counted_once = Directory::try_from_iter([(name("d"), once)]).unwrap();
    for (service, _dir) in services() {
        assert!(refusal(put_tree(&*service, &[&leaf, &root]).await).contains("has size 5, but it has size 4"));
        let root = put_tree(&*service, &[&leaf, &counted_once]).await.unwrap();
        let tree: Vec<_> = service.get_recursive(&root).try_collect().await.unwrap();
        assert_eq!(tree, [counted_once.clone(), leaf.clone()]);
    }
}

#[tokio::test]
async fn a_walk_ends_where_the_memory_for_directories_does() {
    let leaf = leaf();
    let root = above(&[&leaf]);
    for (service, _dir) in services() {
        put_tree(&*service, &[&leaf, &root]).await.unwrap();
        let memory = DirectoryMemory::unlimited();
        let tree: Vec<_> = service.get_recursive_within(&root.digest(), &memory).try_collect().await.unwrap();
        assert_eq!(tree, [root.clone(), leaf.clone()]);
        let needed = memory.used();
        let enough = DirectoryMemory::limited(needed);
        assert_eq!(service.get_recursive_within(&root.digest(), &enough).try_collect::<Vec<_>>().await.unwrap(), tree);
        let limit = needed - 1;
        let too_little = DirectoryMemory::limited(limit);
        let walked: io::Result<Vec<_>> = service.get_recursive_within(&root.digest(), &too_little).try_collect().await;
        let error = walked.unwrap_err();
        assert_eq!(DirectoryMemoryError::of(&error), Some(DirectoryMemoryError { limit }), "{error}");
        assert!(too_little.used() < needed);
    }
}

#[tokio::test]
async fn a_closed_putter_takes_no_more() {
    for (service, _dir) in services() {
        let mut putter = service.put_multiple_start();
        putter.put(leaf()).await.unwrap();
        putter.close().await.unwrap();
        refusal(putter.put(leaf()).await);
        refusal(putter.close().await);
    }
}

#[tokio::test]
async fn wide_and_deep_trees_come_whole() {
    let leaves: Vec<_> =
        (0..600).map(|at| Directory::try_from_iter([(name(&format!("{at}")), symlink("t"))]).unwrap()).collect();
    let mut chain = vec![above(&leaves.iter().collect::<Vec<_>>())];
    for _ in 0..50 {
        chain.push(above(&[chain.last().unwrap()]));
    }
    let all: Vec<_> = leaves.iter().chain(&chain).collect();
    for (service, _dir) in services() {
        let root = put_tree(&*service, &all).await.unwrap();
        assert_eq!(walk(&*service, &root).await.unwrap().len(), 651);
    }
}
