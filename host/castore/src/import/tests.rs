use std::{
    fs,
    io::Write as _,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileExt as _, symlink},
        net::UnixListener,
    },
    sync::Arc,
};

use async_trait::async_trait;
use nix::{sys::stat::Mode, unistd::mkfifo};
use proptest::prelude::*;

use super::*;
use crate::{
    B3Digest, BlobReader, BlobService, BlobWriter, Directory, LocalBlobService, RedbDirectoryService,
    export::export,
    testing::{Tree, arb_tree, file, name},
};

fn local_store(dir: &Path) -> Store {
    Store {
        blobs: Arc::new(LocalBlobService::open(&dir.join("blobs")).unwrap()),
        directories: Arc::new(RedbDirectoryService::open(&dir.join("directories.redb")).unwrap()),
    }
}

fn refused(path: &Path) -> ImportError {
    import_path(&Store::memory(), path).unwrap_err()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn an_exported_tree_equals_the_imported_one(tree in arb_tree()) {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        tree.write(&source);
        for (store, copy) in [(Store::memory(), "memory"), (local_store(dir.path()), "local")] {
            let node = import_path(&store, &source).unwrap();
            prop_assert_eq!(&node, &tree.node());
            let copy = dir.path().join(copy);
            export(&store, &node, &copy).unwrap();
            prop_assert_eq!(&Tree::read(&copy), &tree);
        }
    }
}

#[test]
fn an_import_is_durable_and_seen_by_others() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("source")).unwrap();
    fs::write(dir.path().join("source/file"), "contents").unwrap();
    let node = import_path(&local_store(dir.path()), &dir.path().join("source")).unwrap();
    export(&local_store(dir.path()), &node, &dir.path().join("copy")).unwrap();
    assert_eq!(fs::read(dir.path().join("copy/file")).unwrap(), b"contents");
}

#[test]
fn a_symlink_at_the_root_is_imported_as_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("link");
    symlink("/etc", &path).unwrap();
    let node = import_path(&Store::memory(), &path).unwrap();
    assert_eq!(node, Node::Symlink { target: "/etc".try_into().unwrap() });
}

#[test]
fn wide_deep_and_large_is_imported_whole() {
    let dir = tempfile::tempdir().unwrap();
    let wide = dir.path().join("wide");
    fs::create_dir(&wide).unwrap();
    for number in 0..1000 {
        fs::write(wide.join(format!("{number}")), format!("{}", number % 10)).unwrap();
    }
    let mut deep = dir.path().to_owned();
    for _ in 0..200 {
        deep.push("d");
        fs::create_dir(&deep).unwrap();
    }
    fs::write(deep.join("bottom"), "x").unwrap();
    let large: Vec<u8> = (0..3_000_000_u32).map(|at| (at / 3) as u8).collect();
    fs::write(dir.path().join("large"), &large).unwrap();

    let store = Store::memory();
    let node = import_path(&store, dir.path()).unwrap();
    let Node::Directory { digest, size } = node else { panic!("{node:?} is no directory") };
    assert_eq!(size, 2 * (1 + 1000 + 200 + 1 + 1));
    let root = futures::executor::block_on(store.directories.get(&digest)).unwrap().unwrap();
    assert_eq!(root.get(b"large"), Some(&file(&large, false)));
    assert_eq!(Tree::read(dir.path()).node(), root.to_node());
}

#[test]
fn a_large_file_is_the_same_blob_when_the_store_has_it_already() {
    const BYTES: u64 = 80 * 1024 * 1024 + 7;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large");
    let large = fs::File::create(&path).unwrap();
    large.set_len(BYTES).unwrap();
    large.write_all_at(b"not all of it is empty", BYTES - 100).unwrap();
    let digest = blake3::Hasher::new().update_reader(fs::File::open(&path).unwrap()).unwrap().finalize().into();
    let node = Node::File { digest, size: BYTES, executable: false };
    let store = local_store(dir.path());
    for _ in 0..3 {
        assert_eq!(import_path(&store, &path).unwrap(), node);
    }
    assert_eq!(fs::read_dir(dir.path().join("blobs/staging")).unwrap().count(), 0);
    export(&store, &node, &dir.path().join("copy")).unwrap();
    assert!(fs::read(dir.path().join("copy")).unwrap() == fs::read(&path).unwrap());
}

#[test]
fn files_without_a_node_are_refused_by_path_and_kind() {
    let dir = tempfile::tempdir().unwrap();
    let nested = dir.path().join("a/b");
    fs::create_dir_all(&nested).unwrap();
    let fifo = nested.join(std::ffi::OsStr::from_bytes(b"fi\xfffo"));
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    for root in [dir.path(), &fifo] {
        let ImportError::Unsupported { path, kind } = refused(root) else { panic!("another error") };
        assert_eq!((path, kind), (fifo.clone(), UnsupportedKind::Fifo));
    }
    fs::remove_file(&fifo).unwrap();

    let socket = nested.join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    let error = refused(dir.path());
    assert!(error.to_string().ends_with(
        "a/b/socket is a socket; only directories, regular files and symbolic links \
                                         can be imported: remove it"
    ));
    let error = refused(Path::new("/dev/null"));
    assert!(error.to_string().starts_with("/dev/null is a character device"));
}

#[test]
fn a_path_that_is_not_there_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let ImportError::Read { path, source, .. } = refused(&dir.path().join("nothing")) else { panic!("another error") };
    assert_eq!((path, source.kind()), (dir.path().join("nothing"), io::ErrorKind::NotFound));
}

/// A memory store in which something happens when a blob is opened to write, or that can't commit.
struct Interfering {
    inner: Arc<dyn BlobService>,
    on_write: Arc<dyn Fn() + Send + Sync>,
    commits: bool,
}

impl Interfering {
    fn store(on_write: impl Fn() + Send + Sync + 'static, commits: bool) -> Store {
        let store = Store::memory();
        Store { blobs: Arc::new(Self { inner: store.blobs, on_write: Arc::new(on_write), commits }), ..store }
    }
}

#[async_trait]
impl BlobService for Interfering {
    async fn has(&self, digest: &B3Digest) -> io::Result<bool> {
        self.inner.has(digest).await
    }

    async fn open_read(&self, digest: &B3Digest) -> io::Result<Option<Box<dyn BlobReader>>> {
        self.inner.open_read(digest).await
    }

    async fn open_write(&self) -> Box<dyn BlobWriter> {
        (self.on_write)();
        self.inner.open_write().await
    }

    fn batch(&self) -> Arc<dyn BlobService> {
        let Self { inner, on_write, commits } = self;
        Arc::new(Self { inner: inner.batch(), on_write: on_write.clone(), commits: *commits })
    }

    async fn commit(&self) -> io::Result<()> {
        if self.commits { self.inner.commit().await } else { Err(io::ErrorKind::StorageFull.into()) }
    }
}

fn import_while(path: &Path, on_write: impl Fn() + Send + Sync + 'static) -> ImportError {
    import_path(&Interfering::store(on_write, true), path).unwrap_err()
}

#[test]
fn files_whose_contents_the_kernel_makes_up_have_what_can_be_read() {
    // One says that it has no byte, the other that it has a page.
    for path in ["/proc/version", "/sys/devices/system/cpu/online"] {
        let contents = fs::read(path).unwrap();
        let node = import_path(&Store::memory(), Path::new(path)).unwrap();
        let expected = Node::File { digest: B3Digest::of(&contents), size: contents.len() as u64, executable: false };
        assert!(!contents.is_empty());
        assert_eq!(node, expected, "{path}");
    }
}

#[test]
fn a_file_that_changes_while_it_is_read_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, "contents").unwrap();
    let growing = path.clone();
    let error = import_while(dir.path(), move || {
        fs::OpenOptions::new().append(true).open(&growing).unwrap().write_all(b"more").unwrap();
    });
    assert!(matches!(&error, ImportError::Changed(changed) if *changed == path), "{error}");

    let shrinking = path.clone();
    let error = import_while(&path, move || fs::write(&shrinking, "").unwrap());
    assert!(matches!(&error, ImportError::Changed(changed) if *changed == path), "{error}");

    fs::write(&path, "contents").unwrap();
    let replaced = path.clone();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let error = import_while(&path, move || fs::write(&replaced, "CONTENTS").unwrap());
    assert!(matches!(&error, ImportError::Changed(changed) if *changed == path), "{error}");
}

#[test]
fn a_file_that_vanishes_is_named() {
    let dir = tempfile::tempdir().unwrap();
    // One batch reads both in any order, and reading the first one removes the other.
    let paths = [dir.path().join("a"), dir.path().join("b")];
    paths.iter().for_each(|path| fs::write(path, "x").unwrap());
    let victims = paths.clone();
    let error = import_while(dir.path(), move || victims.iter().for_each(|path| drop(fs::remove_file(path))));
    let ImportError::Read { path, source, .. } = error else { panic!("another error: {error}") };
    assert!(paths.contains(&path));
    assert_eq!(source.kind(), io::ErrorKind::NotFound);
}

#[test]
fn errors_of_the_store_are_reported() {
    let dir = tempfile::tempdir().unwrap();
    let error = import_path(&Interfering::store(|| {}, false), dir.path()).unwrap_err();
    assert!(matches!(&error, ImportError::Store { source, .. } if source.kind() == io::ErrorKind::StorageFull));
}

#[test]
fn an_import_that_fails_leaves_nothing_visible() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "contents").unwrap();
    mkfifo(&source.join("fifo"), Mode::S_IRWXU).unwrap();
    let store = local_store(dir.path());
    import_path(&store, &source).unwrap_err();
    // Nor does the next commit bring it.
    futures::executor::block_on(store.blobs.commit()).unwrap();
    assert!(!futures::executor::block_on(store.blobs.has(&B3Digest::of(b"contents"))).unwrap());
    assert_eq!(fs::read_dir(dir.path().join("blobs/staging")).unwrap().count(), 0);
}

#[test]
fn only_the_owners_execute_bit_counts() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    for (mode, executable) in [(0o644, false), (0o455, false), (0o744, true), (0o500, true), (0o4711, true)] {
        let path = dir.path().join("file");
        fs::write(&path, "x").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(import_path(&Store::memory(), &path).unwrap(), file(b"x", executable), "{mode:o}");
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn empty_directories_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("empty")).unwrap();
    let expected = Directory::try_from_iter([(name("empty"), Directory::new().to_node())]).unwrap().to_node();
    assert_eq!(import_path(&Store::memory(), dir.path()).unwrap(), expected);
}

#[test]
fn an_observer_learns_of_every_file_and_byte() {
    let dir = tempfile::tempdir().unwrap();
    let large = vec![7; 1_500_000];
    for (name, contents) in [("a", &b"one"[..]), ("b", b""), ("c", &large)] {
        fs::write(dir.path().join(name), contents).unwrap();
    }
    let seen = std::sync::Mutex::new((0, 0, 0));
    let observe = |files, bytes| {
        let mut seen = seen.lock().unwrap();
        *seen = (seen.0 + files, seen.1 + bytes, seen.2 + 1);
    };
    let options = Options { observe: Some(&observe), ..Options::default() };
    for path in [dir.path().to_owned(), dir.path().join("c")] {
        import_with(&Store::memory(), &path, &options).unwrap();
    }
    let (files, bytes, times) = *seen.lock().unwrap();
    assert_eq!((files, bytes), (4, 3 + 2 * 1_500_000));
    assert!(times > 8, "only {times} times");
}
