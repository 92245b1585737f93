use std::pin::pin;

use futures::poll;
use tokio::task::yield_now;

use super::super::testing::{directory, file, inputs, name, resolve_all, symlink, unstored_directory};
use super::*;

fn digest_of(node: &Node) -> B3Digest {
    match node {
        Node::Directory { digest, .. } | Node::File { digest, .. } => *digest,
        Node::Symlink { .. } => unreachable!(),
    }
}

async fn refused(store: &Store, entries: &[(&str, Node)]) -> ResolveError {
    resolve_all(store, &inputs(entries)).await.unwrap_err()
}

#[tokio::test]
async fn directories_are_bounded_by_their_bytes_and_counted_once() {
    let directory = unstored_directory(&[("long", symlink(&"x".repeat(1000)))]);
    let place = || Place { input: 0, path: String::new() };
    let mut closure = Closure { bytes: MAX_BYTES - directory.encode().len(), ..Closure::default() };
    for _ in 0..2 {
        closure.memory.take(&directory.encode()).unwrap();
        closure.add(directory.clone(), place).await.unwrap();
    }
    let once = DirectoryMemory::unlimited();
    once.take(&directory.encode()).unwrap();
    assert_eq!(closure.memory.used(), once.used());
    let another = unstored_directory(&[("a", symlink("b"))]);
    let refused = closure.add(another, place).await;
    assert!(matches!(refused, Err(ResolveError::Limit { limit, .. }) if limit == MAX_BYTES as u64));
}

#[tokio::test]
async fn one_directory_is_bounded_by_its_bytes() {
    let target = symlink(&"x".repeat(4000));
    let names: Vec<_> = (0..=MAX_DIRECTORY_BYTES / 4000).map(|at| at.to_string()).collect();
    let entries: Vec<_> = names.iter().map(|name| (name.as_str(), target.clone())).collect();
    let place = || Place { input: 0, path: String::new() };
    let refused = Closure::default().add(unstored_directory(&entries), place).await;
    assert!(matches!(refused, Err(ResolveError::Limit { limit, .. }) if limit == MAX_DIRECTORY_BYTES as u64));
    Closure::default().add(unstored_directory(&entries[1000..]), place).await.unwrap();
}

#[tokio::test]
async fn the_closure_holds_every_directory_and_blob_once() {
    let store = Store::memory();
    let f = file(&store, b"f").await;
    let shared = directory(&store, &[("f", f.clone()), ("dangling", symlink("nowhere"))]).await;
    let top = directory(&store, &[("a", shared.clone()), ("b", shared.clone())]).await;
    let unrelated = file(&store, b"unrelated").await;
    let tree = resolve_all(&store, &inputs(&[("f", f.clone()), ("shared", shared), ("top", top)])).await.unwrap();
    assert_eq!((tree.directory_count(), tree.blob_count()), (2, 1));
    assert!(tree.has_blob(&digest_of(&f)) && !tree.has_blob(&digest_of(&unrelated)));
}

#[tokio::test]
async fn the_memory_of_directories_is_bounded_and_counted() {
    let store = Store::memory();
    let names: Vec<_> = (0..1000).map(|at| at.to_string()).collect();
    let many: Vec<_> = names.iter().map(|name| (name.as_str(), symlink("t"))).collect();
    let (small, large) = (directory(&store, &many[..10]).await, directory(&store, &many).await);
    let inputs = inputs(&[("large", large.clone()), ("small", small), ("twice", large)]);
    let tree = resolve_all(&store, &inputs).await.unwrap();
    let entries = 1000 + 10 + 3;
    assert!(tree.memory_bytes() > 300 * entries && tree.memory_bytes() < 500 * entries, "{}", tree.memory_bytes());
    let limit = tree.memory_bytes() - 1;
    let error = resolve(&store, &inputs, DirectoryMemory::limited(limit)).await.unwrap_err();
    let request_error = error.missing().unwrap();
    assert!(matches!(&error, ResolveError::Memory { place, .. } if place.path == "small"), "{error}");
    assert_eq!((request_error.field.as_str(), request_error.kind), ("inputs[1]", RequestErrorKind::Unsupported));
    assert!(request_error.rule.contains(&format!("inputs_memory, which is {limit} bytes")), "{request_error}");
    // The inputs' own names count, too.
    let error = resolve(&store, &inputs, DirectoryMemory::limited(1000)).await.unwrap_err();
    assert!(matches!(&error, ResolveError::Memory { place, .. } if place.path.is_empty()), "{error}");
}

#[tokio::test]
async fn missing_inputs_are_named_with_their_path() {
    let store = Store::memory();
    let lost = unstored_directory(&[("x", symlink("y"))]).to_node();
    let lost_blob = Node::File { digest: B3Digest::of(b"lost"), size: 4, executable: false };
    let holder = directory(&store, &[("deep", lost.clone())]).await;
    let there = file(&store, b"there").await;
    for (node, kind, path, missing) in [
        (lost.clone(), "directory", "in", &lost),
        (holder.clone(), "directory", "in/deep", &lost),
        (directory(&store, &[("a", holder)]).await, "directory", "in/a/deep", &lost),
        (lost_blob.clone(), "blob", "in", &lost_blob),
        (directory(&store, &[("b", lost_blob.clone())]).await, "blob", "in/b", &lost_blob),
    ] {
        let error = refused(&store, &[("first", there.clone()), ("in", node)]).await;
        let request_error = error.missing().unwrap();
        let ResolveError::Missing { place, kind: found, digest } = error else { panic!("{error}") };
        assert_eq!((place.input, place.path.as_str(), found, digest), (1, path, kind, digest_of(missing)));
        assert_eq!(request_error.field, "inputs[1]");
        assert!(request_error.to_string().contains(&digest.to_string()));
    }
}

#[tokio::test]
async fn only_missing_directories_are_reported_as_missing() {
    let store = Store::memory();
    let deep = directory(&store, &[("deep", directory(&store, &[("l", symlink("t"))]).await)]).await;
    let absent = unstored_directory(&[("x", symlink("y"))]).to_node();
    let top = directory(&store, &[("a", deep), ("b", absent.clone())]).await;
    let error = refused(&store, &[("in", top)]).await;
    let ResolveError::Missing { place, digest, .. } = error else { panic!("{error}") };
    assert_eq!((place.path.as_str(), digest), ("in/b", digest_of(&absent)));
}

#[tokio::test]
async fn a_reference_with_a_wrong_size_is_refused() {
    let store = Store::memory();
    let real = directory(&store, &[("x", symlink("y"))]).await;
    let wrong = Node::Directory { digest: digest_of(&real), size: 3 };
    let holder = directory(&store, &[("d", wrong)]).await;
    let error = refused(&store, &[("in", holder)]).await;
    assert!(matches!(&error, ResolveError::Size { place, actual: 2, claimed: 3, .. } if place.path == "in/d"));
}

#[tokio::test]
async fn depth_is_bounded_whichever_way_a_directory_is_reached() {
    let store = Store::memory();
    let mut node = directory(&store, &[]).await;
    for _ in 1..MAX_DEPTH {
        node = directory(&store, &[("d", node)]).await;
    }
    resolve_all(&store, &inputs(&[("in", node.clone())])).await.unwrap();
    let deeper = directory(&store, &[("d", node.clone())]).await;
    for entries in [vec![("in", deeper.clone())], vec![("a", node), ("b", deeper)]] {
        let error = refused(&store, &entries).await;
        assert!(matches!(error, ResolveError::Limit { what: "nested directories", .. }), "{error}");
    }
}

#[tokio::test]
async fn a_tree_of_too_many_paths_is_refused_without_walking_them() {
    let store = Store::memory();
    let mut node = directory(&store, &[]).await;
    for _ in 0..48 {
        node = directory(&store, &[("a", node.clone()), ("b", node)]).await;
    }
    let error = refused(&store, &[("in", node)]).await;
    assert!(matches!(error, ResolveError::Limit { limit: MAX_PATHS, .. }), "{error}");
}

#[tokio::test]
async fn a_file_that_no_offset_can_reach_the_end_of_is_refused() {
    let store = Store::memory();
    let digest = digest_of(&file(&store, b"f").await);
    let error = refused(&store, &[("f", Node::File { digest, size: 1 << 63, executable: false })]).await;
    assert!(matches!(error, ResolveError::Limit { what: "bytes in a file", .. }), "{error}");
}

/// How often the rest of the thread has its turn meanwhile.
async fn turns_for_others(store: &Store, entries: &[(&str, Node)]) -> usize {
    let inputs = inputs(entries);
    let mut resolving = pin!(resolve_all(store, &inputs));
    let mut turns = 0;
    while poll!(&mut resolving).is_pending() {
        turns += 1;
        yield_now().await;
    }
    turns
}

#[tokio::test]
async fn resolving_yields_between_directories_entries_and_blobs() {
    let store = Store::memory();
    let (mut directories, mut same, mut different) = (Vec::new(), Vec::new(), Vec::new());
    for index in 0..2000 {
        let text = index.to_string();
        directories.push((name(&text), directory(&store, &[("to", symlink(&text))]).await));
        same.push((name(&text), file(&store, b"same").await));
        different.push((name(&text), file(&store, text.as_bytes()).await));
    }
    let mut turns = Vec::new();
    for nodes in [directories, same, different] {
        let top = Directory::try_from_iter(nodes).unwrap();
        let node = top.to_node();
        store.directories.put(top).await.unwrap();
        turns.push(turns_for_others(&store, &[("in", node)]).await);
    }
    let [directories, same, different] = turns[..] else { unreachable!() };
    assert!(directories >= 2001 && same >= 10 && different >= same + 10, "{turns:?}");
}

#[tokio::test]
async fn ten_thousand_directories_are_resolved_in_one_pass() {
    let store = Store::memory();
    let mut all = Vec::new();
    for index in 0..10_000 {
        let target = index.to_string();
        all.push((name(&target), directory(&store, &[("to", symlink(&target))]).await));
    }
    let top = Directory::try_from_iter(all).unwrap();
    let node = top.to_node();
    store.directories.put(top).await.unwrap();
    let tree = resolve_all(&store, &inputs(&[("in", node)])).await.unwrap();
    assert_eq!(tree.directory_count(), 10_001);
}
