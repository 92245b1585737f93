use std::{
    fs::{self, File},
    path::Path,
};

use futures::executor::block_on;
use proptest::prelude::*;
use tokio::io::AsyncWriteExt as _;

use super::*;
use crate::{
    Directory, Node, RootError, Store,
    archive::Limits,
    nar, tar,
    testing::{file, name, symlink},
    verify::{verify, verify_node},
};

/// Longer than any test takes.
const LONG: Duration = Duration::from_secs(3600);

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn local(&self) -> LocalStore {
        LocalStore::open(&self.0.path().join("blobs"), &self.0.path().join("d.redb")).unwrap()
    }

    fn store(&self) -> Store {
        let dir = self.0.path().display();
        Store::from_addrs(&format!("file://{dir}/blobs"), &format!("redb://{dir}/d.redb")).unwrap()
    }

    fn collect(&self, keep: Duration) -> Collected {
        collect(&self.local(), keep, false).unwrap()
    }

    /// Lets a day go by for all that is there.
    fn age(&self) {
        let then = SystemTime::now() - Duration::from_secs(86400);
        let local = self.local();
        // Batches that live grow older, too, and none begins meanwhile.
        let staging = self.0.path().join("blobs/staging");
        let none_begins = lock(&staging, FlockArg::LockExclusive).unwrap();
        for owner in fs::read_dir(&staging).unwrap() {
            if let Ok(begun) = File::open(owner.unwrap().path().join("begun")) {
                begun.set_modified(then - LONG).unwrap();
            }
        }
        for (digest, _) in local.stored_blobs().unwrap() {
            let hex = digest.to_hex();
            let path = self.0.path().join("blobs/b3").join(&hex[..2]).join(hex);
            // Locked, so that no look-up renews it at the same time.
            let _alone = lock(path.parent().unwrap(), FlockArg::LockExclusive).unwrap();
            if let Ok(file) = File::open(path) {
                file.set_modified(then).unwrap();
            }
        }
        drop(none_begins);
        local.directories().age_all(then).unwrap();
    }

    fn has(&self, contents: &[u8]) -> bool {
        let hex = B3Digest::of(contents).to_hex();
        self.0.path().join("blobs/b3").join(&hex[..2]).join(hex).exists()
    }
}

fn write(store: &Store, contents: &[u8]) -> Node {
    let mut writer = block_on(store.blobs.open_write());
    block_on(writer.write_all(contents)).unwrap();
    block_on(writer.close()).unwrap();
    file(contents, false)
}

/// A directory in a directory, around a file.
fn tree(contents: &[u8]) -> [Directory; 2] {
    let below = Directory::try_from_iter([(name("f"), file(contents, false)), (name("l"), symlink("t"))]).unwrap();
    let root = Directory::try_from_iter([(name("d"), below.to_node())]).unwrap();
    [below, root]
}

fn put_tree(store: &Store, contents: &[u8]) -> Node {
    let directories = tree(contents);
    let node = directories[1].to_node();
    let mut putter = store.directories.put_multiple_start();
    for directory in directories {
        block_on(putter.put(directory)).unwrap();
    }
    block_on(putter.close()).unwrap();
    node
}

/// As an import does it.
fn import(store: &Store, contents: &[u8]) -> Node {
    let batch = store.batch();
    write(&batch, contents);
    block_on(batch.blobs.commit()).unwrap();
    put_tree(&batch, contents)
}

fn sound(place: &Place, node: &Node) {
    verify_node(&place.store(), node, Path::new("node"), &|| false).unwrap();
    assert!(verify(&place.local()).unwrap().faults.is_empty());
}

#[test]
fn what_nothing_needs_goes_and_the_rest_stays() {
    let place = Place::new();
    let store = place.store();
    let [rooted, old, leased] = [b"rooted".as_slice(), b"old", b"leased"].map(|contents| import(&store, contents));
    place.local().add_root("r", &rooted).unwrap();
    place.age();
    let new = import(&store, b"new");
    let lease = store.blobs.lease(&[leased.clone(), symlink("t")]).unwrap();

    let dry = collect(&place.local(), LONG, true).unwrap();
    sound(&place, &old);
    let collected = place.collect(LONG);
    assert_eq!(collected, dry);
    let expected = Collected { blobs: 1, bytes: 3, directories: 2, blobs_left: 3, directories_left: 6 };
    assert_eq!(collected, expected);
    assert!(!place.has(b"old"));
    [&rooted, &leased, &new].into_iter().for_each(|node| sound(&place, node));

    drop(lease);
    place.age();
    place.local().remove_root("r").unwrap();
    let collected = place.collect(LONG);
    let expected = Collected { blobs: 3, bytes: 15, directories: 6, ..Collected::default() };
    assert_eq!(collected, expected);
    assert_eq!(place.collect(Duration::ZERO), Collected::default());
}

/// Puts one directory in another, deeper than the stack of a thread would be with a call for each; at the bottom is a file.
fn put_deep_tree(store: &Store) -> Node {
    let bottom = write(store, b"bottom");
    block_on(store.blobs.commit()).unwrap();
    let mut directory = Directory::try_from_iter([(name("f"), bottom)]).unwrap();
    let mut putter = store.directories.put_multiple_start();
    block_on(putter.put(directory.clone())).unwrap();
    for _ in 1..DEPTH {
        directory = Directory::try_from_iter([(name("d"), directory.to_node())]).unwrap();
        block_on(putter.put(directory.clone())).unwrap();
    }
    block_on(putter.close()).unwrap();
    directory.to_node()
}

const DEPTH: usize = 10_000;

#[test]
fn a_deep_tree_is_verified_kept_and_collected() {
    let place = Place::new();
    let node = put_deep_tree(&place.store());
    place.local().add_root("deep", &node).unwrap();
    place.age();
    let kept = Collected { blobs_left: 1, directories_left: DEPTH as u64, ..Collected::default() };
    assert_eq!(place.collect(LONG), kept);
    let verified = verify(&place.local()).unwrap();
    assert!(verified.faults.is_empty() && verified.directories == DEPTH as u64, "{:?}", verified.faults);
    place.local().remove_root("deep").unwrap();
    place.age();
    let gone = Collected { blobs: 1, bytes: 6, directories: DEPTH as u64, ..Collected::default() };
    assert_eq!(place.collect(LONG), gone);
}

#[test]
fn exported_archives_may_be_too_deep_to_import() {
    let store = Store::memory();
    let node = put_deep_tree(&store);
    verify_node(&store, &node, Path::new("node"), &|| false).unwrap();
    let (mut nar, mut tar) = (Vec::new(), Vec::new());
    nar::write(&store, &node, Path::new("nar"), &mut nar, &|| false).unwrap();
    tar::write(&store, &node, Path::new("tar"), &mut tar, &|| false).unwrap();
    let [nar, tar] = [nar::import(&store, &*nar, Limits::default()), tar::import(&store, &*tar, Limits::default())];
    for error in [nar.unwrap_err(), tar.unwrap_err()] {
        assert!(error.to_string().ends_with("directories are nested deeper than 512"), "{error}");
    }
}

#[test]
fn a_tree_of_more_than_one_batch_is_kept_whole() {
    let place = Place::new();
    let store = place.store();
    let target = "t".repeat(4000);
    let large = |at: usize| {
        let links = (0..200).map(|entry| (name(&format!("{at}-{entry}")), symlink(&target)));
        Directory::try_from_iter(links).unwrap()
    };
    let mut directories: Vec<_> = (0..5).map(large).collect();
    let children = directories.iter().enumerate().map(|(at, child)| (name(&at.to_string()), child.to_node()));
    directories.push(Directory::try_from_iter(children).unwrap());
    let node = crate::import::put_directories(&store, directories).unwrap();
    assert_eq!(place.collect(LONG).directories_left, 6);
    place.local().add_root("r", &node).unwrap();
    place.age();
    assert_eq!(place.collect(Duration::ZERO).directories_left, 6);
    sound(&place, &node);
}

#[test]
fn the_time_counts_from_when_something_was_found_last() {
    let place = Place::new();
    let store = place.store();
    import(&store, b"tree");
    let single = write(&store, b"single");
    block_on(store.blobs.commit()).unwrap();
    place.age();
    let again = import(&store, b"tree");
    write(&store, b"single");
    place.collect(LONG);
    sound(&place, &again);
    sound(&place, &single);
}

#[test]
fn a_batch_keeps_what_it_counts_on_at_every_step() {
    let place = Place::new();
    let store = place.store();
    import(&store, b"there");
    place.age();
    for contents in [b"there".as_slice(), b"fresh"] {
        let batch = store.batch();
        write(&batch, contents);
        place.age();
        place.collect(Duration::ZERO);
        block_on(batch.blobs.commit()).unwrap();
        place.age();
        place.collect(Duration::ZERO);
        // The directories of the first tree have gone, the blobs have not.
        assert!(place.has(contents));
        let node = put_tree(&batch, contents);
        place.collect(LONG);
        drop(batch);
        sound(&place, &node);
        place.age();
        place.collect(LONG);
        assert!(!place.has(contents));
    }
}

#[test]
fn a_batch_publishes_what_another_has_published_before() {
    let place = Place::new();
    let store = place.store();
    let (one, other) = (store.batch(), store.batch());
    write(&one, b"same");
    write(&other, b"same");
    block_on(other.blobs.commit()).unwrap();
    drop(other);
    block_on(one.blobs.commit()).unwrap();
    place.age();
    place.collect(Duration::ZERO);
    assert!(place.has(b"same"));
    drop(one);
    place.collect(Duration::ZERO);
    assert!(!place.has(b"same"));
}

#[test]
fn what_the_dead_have_left_keeps_nothing() {
    let place = Place::new();
    import(&place.store(), b"there");
    place.age();
    // What a killed process leaves: its directory, with a link in it and a note, and no lock on it.
    let leftover = place.0.path().join("blobs/staging/1-0");
    fs::create_dir(&leftover).unwrap();
    File::create(leftover.join("begun")).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
    let hex = B3Digest::of(b"there").to_hex();
    fs::hard_link(place.0.path().join("blobs/b3").join(&hex[..2]).join(&hex), leftover.join("0")).unwrap();
    fs::write(place.local().roots_dir().unwrap().join(".1-0"), "half a ro").unwrap();
    assert_eq!(place.collect(LONG).blobs, 1);
    assert!(!leftover.exists() && !place.has(b"there"));
    assert_eq!(fs::read_dir(place.local().roots_dir().unwrap()).unwrap().count(), 0);
}

#[test]
fn a_root_whose_directories_are_missing_stops_everything() {
    let place = Place::new();
    let node = import(&place.store(), b"there");
    place.local().add_root("r", &node).unwrap();
    place.age();
    // Another file of directories beside the same blobs, as a slip of the hand in an address brings it about.
    let other = LocalStore::open(&place.0.path().join("blobs"), &place.0.path().join("other.redb")).unwrap();
    let error = collect(&other, Duration::ZERO, false).unwrap_err();
    assert!(matches!(&error, CollectError::Incomplete { name, .. } if *name == self::name("r")), "{error}");
    sound(&place, &node);
}

#[test]
fn roots_are_added_whole_replaced_and_removed() {
    let place = Place::new();
    let (store, local) = (place.store(), place.local());
    let [one, other] = [b"one".as_slice(), b"other"].map(|contents| import(&store, contents));
    local.add_root("b", &one).unwrap();
    local.add_root("a", &other).unwrap();
    local.add_root("b", &other).unwrap();
    assert_eq!(local.roots().unwrap(), [(name("a"), other.clone()), (name("b"), other)]);
    local.remove_root("a").unwrap();
    assert!(matches!(local.remove_root("a"), Err(RootError::Unknown(_))));
    assert!(matches!(local.add_root("a/b", &one), Err(RootError::Name(_))));
    assert!(matches!(local.add_root(".a", &one), Err(RootError::Hidden(_))));
    let missing = file(b"never put", false);
    assert!(matches!(local.add_root("m", &missing), Err(RootError::Missing { what: "blob", .. })));
    let missing = tree(b"never put")[1].to_node();
    assert!(matches!(local.add_root("m", &missing), Err(RootError::Missing { what: "directory", .. })));
    assert_eq!(local.roots().unwrap().len(), 1);
}

#[test]
fn imports_and_collections_at_once_lose_nothing() {
    let place = Place::new();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let importers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    // Each a process of its own, as far as the store can tell, which all write the same.
                    let store = place.store();
                    for round in 0..40_u32 {
                        let batch = store.batch();
                        let contents = (round % 7).to_le_bytes();
                        write(&batch, &contents);
                        block_on(batch.blobs.commit()).unwrap();
                        put_tree(&batch, &contents);
                        assert!(place.has(&contents));
                    }
                })
            })
            .collect();
        let collector = scope.spawn(|| {
            let mut collections = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                place.age();
                place.collect(LONG);
                collections += 1;
            }
            collections
        });
        let imported: Vec<_> = importers.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(collector.join().unwrap() > 0);
        assert!(imported.iter().all(Result::is_ok));
    });
    assert!(verify(&place.local()).unwrap().faults.is_empty());
}

/// What can happen to a store.
#[derive(Debug, Clone)]
enum Step {
    Import(u8),
    Root(u8),
    Unroot(u8),
    Age,
    Collect,
}

fn arb_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..5_u8).prop_map(Step::Import),
        (0..5_u8).prop_map(Step::Root),
        (0..5_u8).prop_map(Step::Unroot),
        Just(Step::Age),
        Just(Step::Collect),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Against a model: a tree is there exactly if it is new or rooted.
    #[test]
    fn exactly_new_and_rooted_blobs_are_left(steps in proptest::collection::vec(arb_step(), 1..24)) {
        let place = Place::new();
        let store = place.store();
        let (mut there, mut new, mut rooted) = (HashSet::new(), HashSet::new(), HashSet::new());
        for step in steps {
            match step {
                Step::Import(id) => {
                    import(&store, &[id]);
                    there.insert(id);
                    new.insert(id);
                }
                Step::Root(id) => {
                    let node = tree(&[id])[1].to_node();
                    let added = place.local().add_root(&id.to_string(), &node);
                    prop_assert_eq!(added.is_ok(), there.contains(&id));
                    if added.is_ok() {
                        rooted.insert(id);
                    }
                }
                Step::Unroot(id) => {
                    let removed = place.local().remove_root(&id.to_string());
                    prop_assert_eq!(removed.is_ok(), rooted.remove(&id));
                }
                Step::Age => {
                    place.age();
                    new.clear();
                }
                Step::Collect => {
                    place.collect(LONG);
                    there.retain(|id| new.contains(id) || rooted.contains(id));
                }
            }
            for id in 0..5 {
                let root = tree(&[id])[1].digest();
                prop_assert_eq!(block_on(store.directories.get(&root)).unwrap().is_some(), there.contains(&id));
            }
            prop_assert!(verify(&place.local()).unwrap().faults.is_empty());
        }
    }
}

#[test]
fn a_tree_whose_time_is_renewed_stays_and_a_missing_one_is_not_made() {
    let place = Place::new();
    let directory = |name: &str| Directory::try_from_iter([(name.try_into().unwrap(), symlink("target"))]).unwrap();
    let (kept, lost) = (directory("kept"), directory("lost"));
    let store = place.local().store();
    for directory in [&kept, &lost] {
        block_on(store.directories.put(directory.clone())).unwrap();
    }
    place.age();
    for directory in [&kept, &directory("never put")] {
        block_on(store.directories.renew(&directory.digest())).unwrap();
    }
    assert_eq!(place.collect(LONG).directories, 1);
    let found = [&kept, &lost].map(|directory| block_on(store.directories.get(&directory.digest())).unwrap());
    assert_eq!(found, [Some(kept), None]);
    // The database has no root without its tree.
    assert_eq!(place.collect(Duration::ZERO).directories, 1);
}
