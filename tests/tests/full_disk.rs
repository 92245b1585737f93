//! Operations on a store whose disk ends at each point where they write.

use std::{
    collections::BTreeMap,
    error::Error,
    fs,
    iter::successors,
    path::{Path, PathBuf},
    time::Duration,
};

use cofferdam_castore::{
    B3Digest, Directory, LocalStore, Node, PathComponent, Store, Views, archive::Limits, gc, tar::import, verify,
    views::Grants,
};
use cofferdam_tests::{Cofferdam, SmallDisk, castore};
use futures::executor::block_on;
use tokio::io::AsyncWriteExt as _;

const TENANT: &str = "user:1001";

/// Bytes of a page of the file system.
const PAGE: u64 = 4096;

/// An error's causes, one after the other.
fn chain(error: impl Error + 'static) -> String {
    let first: &(dyn Error + 'static) = &error;
    successors(Some(first), |error| (*error).source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Has an operation end for want of space at each point where it writes, with more and more room until it succeeds. `check` is
/// called after each attempt, while there is no more room and again when there is.
fn at_each_point(disk: &SmallDisk, attempt: impl Fn(usize) -> Result<(), String>, check: impl Fn(usize, bool)) {
    with_rooms((0..).map(|pages| pages * PAGE), disk, attempt, check);
}

fn with_rooms(
    rooms: impl Iterator<Item = u64>,
    disk: &SmallDisk,
    attempt: impl Fn(usize) -> Result<(), String>,
    check: impl Fn(usize, bool),
) {
    for (number, room) in rooms.enumerate() {
        disk.fill(room);
        let done = attempt(number);
        assert!(done.as_ref().err().is_none_or(|error| error.contains("No space left on device")), "{done:?}");
        check(number, done.is_ok());
        disk.relieve();
        check(number, done.is_ok());
        if done.is_ok() {
            assert!(number > 0, "it must need some room");
            return;
        }
    }
}

/// All files below a directory but the filler, with their paths from there and their sizes.
fn files(dir: &Path) -> BTreeMap<PathBuf, u64> {
    let mut found = BTreeMap::new();
    let mut left = vec![dir.to_owned()];
    while let Some(at) = left.pop() {
        for entry in fs::read_dir(at).expect("it is a directory").map(|entry| entry.expect("it can be read")) {
            let (path, metadata) = (entry.path(), entry.metadata().expect("it is there"));
            if metadata.is_dir() {
                left.push(path);
            } else {
                found.insert(path.strip_prefix(dir).expect("it is in there").to_owned(), metadata.len());
            }
        }
    }
    found
}

/// A store on a small disk, divided among tenants.
struct Place {
    _dir: tempfile::TempDir,
    disk: SmallDisk,
    path: PathBuf,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        let path = dir.path().join("disk");
        let disk = SmallDisk::at(&path, 32);
        Self { _dir: dir, disk, path }
    }

    fn local(&self) -> LocalStore {
        LocalStore::open(&self.path.join("blobs"), &self.path.join("directories.redb")).expect("it can be opened")
    }

    fn views(&self) -> Views {
        let grants = Grants::open(&self.path.join("grants.redb"), Some(&self.path.join("blobs")));
        Views::divided(self.local().store(), grants.expect("they can be opened"))
    }

    /// Blobs that are in the store, and everything else that may be left.
    fn left(&self) -> (usize, Vec<PathBuf>) {
        let is_blob = |path: &Path| path.starts_with("blobs/b3");
        let is_known = |path: &Path| {
            let known = ["directories.redb", "grants.redb", "blobs/collected", "blobs/format", "filler"];
            known.iter().any(|known| path == Path::new(known))
        };
        let (blobs, others): (Vec<_>, Vec<_>) = files(&self.path).into_keys().partition(|path| is_blob(path));
        (blobs.len(), others.into_iter().filter(|path| !is_known(path)).collect())
    }
}

fn put(store: &Store, contents: &[u8]) -> Result<B3Digest, String> {
    block_on(async {
        let batch = store.batch();
        let mut writer = batch.blobs.open_write().await;
        writer.write_all(contents).await?;
        let digest = writer.close().await?;
        batch.blobs.commit().await?;
        Ok(digest)
    })
    .map_err(|error: std::io::Error| chain(error))
}

fn has(store: &Store, contents: &[u8]) -> bool {
    block_on(store.blobs.has(&B3Digest::of(contents))).expect("a full disk can be read")
}

/// A tree of directories, new for each number, root last.
fn tree(number: usize) -> Vec<Directory> {
    let mut directories = Vec::new();
    let mut below = Directory::new();
    for depth in 0..200 {
        directories.push(below.clone());
        let name = format!("{number}-{depth}").as_str().try_into().expect("it is a name");
        below = Directory::try_from_iter([(name, below.to_node())]).expect("it has one entry");
    }
    directories.push(below);
    directories
}

/// A tree of so many directories that few of them fit in a page, root last.
fn wide_tree() -> Vec<Directory> {
    let name = |number: usize| PathComponent::try_from(number.to_string().as_str()).expect("it is a name");
    let link = |number: usize| {
        let target = number.to_string().as_str().try_into().expect("it is a target");
        Node::Symlink { target }
    };
    let leaf = |number| Directory::try_from_iter([(name(number), link(number))]).expect("it has one entry");
    let mut directories: Vec<_> = (0..20_000).map(leaf).collect();
    let entries = directories.iter().enumerate().map(|(number, leaf)| (name(number), leaf.to_node()));
    directories.push(Directory::try_from_iter(entries).expect("their names differ"));
    directories
}

fn put_tree(store: &Store, directories: &[Directory]) -> Result<(), String> {
    block_on(async {
        let mut putter = store.directories.put_multiple_start();
        for directory in directories {
            putter.put(directory.clone()).await?;
        }
        putter.close().await.map(drop)
    })
    .map_err(|error: std::io::Error| chain(error))
}

#[test]
fn wherever_the_disk_ends_a_put_is_granted_whole_or_not_at_all() {
    let place = Place::new();
    let views = place.views();
    let view = views.of(TENANT);
    put(&view, b"before").expect("there is room");
    put_tree(&view, &tree(usize::MAX)).expect("there is room");
    let before = views.usage(TENANT).expect("it can be read").expect("it is divided");

    let blob = |number: usize| number.to_le_bytes().repeat(5000);
    at_each_point(
        &place.disk,
        |number| put(&view, &blob(number)).map(drop),
        |number, is_done| {
            assert!(has(&view, b"before"));
            assert_eq!(has(&view, &blob(number)), is_done);
            let usage = views.usage(TENANT).expect("it can be read").expect("it is divided");
            assert_eq!(usage.bytes - before.bytes, if is_done { 40_000 } else { 0 });
            assert_eq!(place.left().1, Vec::<PathBuf>::new());
        },
    );
    views.flush().expect("there is room");
    at_each_point(
        &place.disk,
        |number| put_tree(&view, &tree(number)),
        |number, is_done| {
            assert!(has(&view, b"before"));
            let root = tree(number).pop().expect("it has a root").digest();
            let found = block_on(view.directories.get(&root)).expect("a full disk can be read");
            assert_eq!(found.is_some(), is_done);
            assert_eq!(place.left().1, Vec::<PathBuf>::new());
        },
    );
    drop((view, views));
    assert_eq!(verify::verify(&place.local()).expect("it can be read").faults.len(), 0);
}

#[test]
fn wherever_the_disk_ends_a_new_store_is_made_whole_or_not_at_all() {
    let place = Place::new();
    let make = |_| {
        let store = LocalStore::open(&place.path.join("blobs"), &place.path.join("directories.redb")).map_err(chain)?;
        let grants = Grants::open(&place.path.join("grants.redb"), Some(store.dir())).map_err(chain)?;
        put_tree(&Views::divided(store.store(), grants).of(TENANT), &tree(0))
    };
    at_each_point(&place.disk, make, |_, _| assert_eq!(place.left().1, Vec::<PathBuf>::new()));
}

#[test]
fn wherever_the_disk_ends_an_archive_is_imported_whole_or_leaves_nothing_to_be_seen() {
    let place = Place::new();
    let views = place.views();
    let view = views.of(TENANT);
    let archive = |number: usize| {
        let mut archive = tar::Builder::new(Vec::new());
        for index in 0..10 {
            let contents = format!("{number} {index} ").repeat(1000);
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_size(contents.len() as u64);
            archive.append_data(&mut header, format!("{index}/file"), contents.as_bytes()).expect("memory has room");
        }
        archive.into_inner().expect("memory has room")
    };
    let root = |number| import(&Store::digests_only(), &*archive(number), Limits::default()).expect("it is an archive");
    at_each_point(
        &place.disk,
        |number| import(&view, &*archive(number), Limits::default()).map(drop).map_err(chain),
        |number, is_done| {
            let Node::Directory { digest, .. } = root(number) else { panic!("an archive is a directory") };
            let found = block_on(view.directories.get(&digest)).expect("a full disk can be read");
            assert_eq!(found.is_some(), is_done);
            assert_eq!(place.left().1, Vec::<PathBuf>::new());
        },
    );
    drop((view, views));
    // What the failed ones have left is garbage, which goes.
    let store = place.local();
    assert_eq!(verify::verify(&store).expect("it can be read").faults.len(), 0);
    gc::collect(&store, Duration::ZERO, false).expect("there is room");
    assert_eq!(place.left(), (0, Vec::new()));
}

#[test]
fn garbage_is_collected_on_a_full_disk_and_hinders_no_reader_until_its_grants_can_go() {
    let place = Place::new();
    let views = place.views();
    let view = views.of(TENANT);
    put(&view, b"kept").expect("there is room");
    let kept = Node::File { digest: B3Digest::of(b"kept"), size: 4, executable: false };
    place.local().add_root("kept", &kept).expect("there is room");
    put(&view, b"garbage").expect("there is room");
    put_tree(&view, &wide_tree()).expect("there is room");
    place.disk.fill(0);
    gc::collect(&place.local(), Duration::ZERO, false).expect("it needs no room");
    assert_eq!(place.left(), (1, vec!["blobs/roots/kept".into()]));
    place.disk.fill(0);
    let usage = || views.usage(TENANT).expect("a full disk can be read").expect("it is divided").bytes;
    assert!(has(&view, b"kept") && !has(&view, b"garbage"));
    // The grants need room to be removed.
    assert!(usage() > 4);
    assert!(put(&view, b"garbage").expect_err("the disk is full").contains("No space left on device"));
    place.disk.relieve();
    assert!(has(&view, b"kept") && !has(&view, b"garbage"));
    assert_eq!(usage(), 4);
    put(&view, b"garbage").expect("there is room");
    assert!(has(&view, b"garbage"));
}

#[test]
fn wherever_the_disk_ends_an_image_is_imported_whole_or_leaves_nothing() {
    let cofferdam = Cofferdam::with_image("/nonexistent");
    let state = cofferdam.state_directory();
    let disk = SmallDisk::at(&state, 32);
    let before = cofferdam.file("before/file", "before");
    let before = before.parent().expect("it has one");
    cofferdam.command([Path::new("import"), before]).succeeds();
    let image = |number: usize| {
        let mut layer = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        let contents = format!("{number} ").repeat(5000);
        header.set_mode(0o644);
        header.set_size(contents.len() as u64);
        layer.append_data(&mut header, "etc/file", contents.as_bytes()).expect("memory has room");
        oci_layout(&cofferdam, &number.to_string(), &layer.into_inner().expect("memory has room"))
    };
    let import = |number| {
        let image = image(number);
        let done = cofferdam.command(["import".as_ref(), "--format".as_ref(), "oci".as_ref(), image.as_os_str()]);
        if done.stdout.is_empty() {
            return Err(done.exits_with(3).stderr.clone());
        }
        done.succeeds();
        Ok(())
    };
    let rooms = (0..).map(|step| if step == 0 { 0 } else { PAGE << (3 * step) });
    with_rooms(rooms, &disk, import, |_, _| {
        let staged = files(&state.join("store/blobs/staging"));
        assert!(staged.is_empty(), "{staged:?}");
    });
    cofferdam.command(["store", "verify", castore::node_of(before).as_str()]).succeeds();
    cofferdam.command(["store", "verify"]).succeeds();
    drop(disk);
}

/// Writes the OCI layout of an image of one layer below the test's files.
fn oci_layout(cofferdam: &Cofferdam, name: &str, layer: &[u8]) -> PathBuf {
    use data_encoding::HEXLOWER;
    use serde_json::json;
    use sha2::{Digest as _, Sha256};
    let blob = |kind: &str, bytes: &[u8]| {
        let hex = HEXLOWER.encode(&Sha256::digest(bytes));
        cofferdam.file(&format!("{name}/blobs/sha256/{hex}"), bytes);
        let media_type = format!("application/vnd.oci.image.{kind}");
        json!({ "mediaType": media_type, "digest": format!("sha256:{hex}"), "size": bytes.len() })
    };
    let layer = blob("layer.v1.tar", layer);
    let rootfs = json!({ "type": "layers", "diff_ids": [layer["digest"]] });
    let config = json!({ "os": "linux", "architecture": "amd64", "config": {}, "rootfs": rootfs }).to_string();
    let config = blob("config.v1+json", config.as_bytes());
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({ "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [layer] });
    let manifest = blob("manifest.v1+json", manifest.to_string().as_bytes());
    cofferdam.file(&format!("{name}/oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#);
    cofferdam.file(&format!("{name}/index.json"), json!({ "schemaVersion": 2, "manifests": [manifest] }).to_string());
    cofferdam.files().join(name)
}
