use cofferdam_castore::{Directory, SymlinkTarget};
use cofferdam_nix::Hash;

use super::*;
use crate::small_disk::{SmallDisk, is_full};

const ALICE: Client = Client::User(1);
const BOB: Client = Client::User(2);

fn path(name: &str) -> StorePath {
    StorePath::compute("source", &Hash::of(name.as_bytes()), name).unwrap()
}

fn known(target: &str, references: &[&str]) -> Known {
    let node = Node::Symlink { target: SymlinkTarget::try_from(target.as_bytes().to_vec()).unwrap() };
    let info = PathInfo {
        deriver: None,
        nar_hash: Hash::of(target.as_bytes()),
        nar_size: 128,
        references: references.iter().map(|name| path(name)).collect(),
        registration_time: 7,
        ultimate: true,
        signatures: BTreeSet::from(["key:signature".to_owned()]),
        content_address: None,
    };
    Known { node, info }
}

fn paths() -> (tempfile::TempDir, StorePaths, Store) {
    let dir = tempfile::tempdir().unwrap();
    let paths = StorePaths::open(&dir.path().join("nix")).unwrap();
    (dir, paths, Store::memory())
}

#[test]
fn a_path_is_what_its_own_client_says_and_survives_a_restart() {
    let (dir, paths, store) = paths();
    paths.register(&ALICE, &[(path("a"), known("alice", &["a"]))]).unwrap();
    assert_eq!(paths.get(&BOB, &store, &path("a")).unwrap(), None);
    paths.register(&BOB, &[(path("a"), known("bob", &[]))]).unwrap();
    drop(paths);
    let paths = StorePaths::open(&dir.path().join("nix")).unwrap();
    assert_eq!(paths.get(&ALICE, &store, &path("a")).unwrap(), Some(known("alice", &["a"])));
    assert_eq!(paths.get(&BOB, &store, &path("a")).unwrap(), Some(known("bob", &[])));
}

#[test]
fn a_path_without_all_that_it_refers_to_is_not_valid() {
    let (_dir, paths, store) = paths();
    let given = [(path("a"), known("a", &["b"])), (path("b"), known("b", &["b", "c"])), (path("d"), known("d", &[]))];
    paths.register(&ALICE, &given).unwrap();
    let all = ["a", "b", "c", "d"].map(path).into();
    let valid: Vec<_> = paths.closure(&ALICE, &store, &all).unwrap().into_keys().collect();
    assert_eq!(valid, [path("d")]);
    paths.register(&ALICE, &[(path("c"), known("c", &[]))]).unwrap();
    let closure = paths.closure(&ALICE, &store, &[path("a")].into()).unwrap();
    assert_eq!(closure.into_keys().collect::<BTreeSet<_>>(), ["a", "b", "c"].map(path).into());
}

#[test]
fn a_path_whose_contents_are_gone_is_not_valid() {
    let (_dir, paths, store) = paths();
    let directory = Directory::new();
    let one = Known { node: directory.to_node(), ..known("a", &[]) };
    paths.register(&ALICE, &[(path("a"), one.clone())]).unwrap();
    assert_eq!(paths.get(&ALICE, &store, &path("a")).unwrap(), None);
    block_on(store.directories.put(directory)).unwrap();
    assert_eq!(paths.get(&ALICE, &store, &path("a")).unwrap(), Some(one));
}

#[test]
fn a_path_is_found_by_its_hash_part_among_those_of_its_client() {
    let (_dir, paths, store) = paths();
    paths.register(&ALICE, &[(path("a"), known("a", &[])), (path("b"), known("b", &[]))]).unwrap();
    for name in ["a", "b"] {
        let found = paths.with_hash_part(&ALICE, &store, path(name).hash_part()).unwrap().map(|(path, _)| path);
        assert_eq!(found, Some(path(name)));
        assert_eq!(paths.with_hash_part(&BOB, &store, path(name).hash_part()).unwrap(), None);
    }
    assert_eq!(paths.with_hash_part(&ALICE, &store, path("c").hash_part()).unwrap(), None);
}

#[test]
fn wherever_the_disk_ends_paths_are_registered_together_or_not_at_all() {
    let disk = SmallDisk::new();
    let dir = disk.path().join("nix");
    let made = |_| StorePaths::open(&dir).map(drop);
    disk.at_each_point(made, |_, opened| {
        assert!(opened.as_ref().err().is_none_or(|error| is_full(error)), "{opened:?}");
        let files: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(files, if opened.is_ok() { vec!["paths.redb"] } else { vec![] });
    });
    let (paths, store) = (StorePaths::open(&dir).unwrap(), Store::memory());
    paths.register(&ALICE, &[(path("before"), known("before", &[]))]).unwrap();
    let names = |number: usize| (0..500).map(move |index| format!("{number}-{index}"));
    let register = |number| {
        let given: Vec<_> = names(number).map(|name| (path(&name), known(&name, &[]))).collect();
        paths.register(&ALICE, &given)
    };
    disk.at_each_point(register, |number, registered| {
        assert!(registered.as_ref().err().is_none_or(|error| is_full(error)), "{registered:?}");
        assert!(paths.get(&ALICE, &store, &path("before")).unwrap().is_some());
        let found = names(number).filter(|name| paths.get(&ALICE, &store, &path(name)).unwrap().is_some()).count();
        assert_eq!(found, if registered.is_ok() { 500 } else { 0 });
    });
}

#[test]
fn paths_whose_contents_are_gone_are_forgotten_and_no_others() {
    let (_dir, paths, store) = paths();
    let (gone, kept) = (Directory::new(), "there");
    let lost = Known { node: gone.to_node(), ..known("lost", &[]) };
    // More than are looked at in one transaction, at both ends of the order.
    for client in [&ALICE, &BOB] {
        let many: Vec<_> = (0..300).map(|at| path(&format!("{at}"))).collect();
        let known: Vec<_> = many
            .iter()
            .enumerate()
            .map(|(at, path)| (path.clone(), if at % 2 == 0 { lost.clone() } else { known(kept, &[]) }))
            .collect();
        paths.register(client, &known).unwrap();
    }
    assert_eq!(paths.prune(&store).unwrap(), 300);
    assert_eq!(paths.prune(&store).unwrap(), 0);
    block_on(store.directories.put(gone)).unwrap();
    for client in [&ALICE, &BOB] {
        assert_eq!(paths.get(client, &store, &path("0")).unwrap(), None, "its metadata went, too");
        assert_eq!(paths.get(client, &store, &path("299")).unwrap(), Some(known(kept, &[])));
    }
}

#[test]
fn recent_paths_keep_what_they_refer_to() {
    let (_dir, paths, _store) = paths();
    let at = |time, target: &str, references: &[&str]| {
        let mut known = known(target, references);
        known.info.registration_time = time;
        known
    };
    let given = [
        (path("new"), at(100, "new", &["new", "old"])),
        (path("old"), at(1, "old", &["older"])),
        (path("older"), at(0, "older", &[])),
        (path("unused"), at(99, "unused", &[])),
    ];
    paths.register(&ALICE, &given).unwrap();
    // Another client's paths of the same names are others.
    paths.register(&BOB, &[(path("old"), at(99, "bob", &[]))]).unwrap();
    let targets = |since| {
        let nodes = paths.since(since).unwrap();
        let target = |node: &Node| known("new", &[]).node == *node;
        (nodes.len(), nodes.iter().filter(|node| target(node)).count())
    };
    assert_eq!([targets(100), targets(99), targets(101)], [(3, 1), (5, 1), (0, 0)]);
}
