use std::{collections::BTreeMap, fs};

use cofferdam_castore::{Node, PathComponent, Store, export::export, import::import_path};

use super::*;

/// A root on disk, in a store.
struct Root {
    dir: tempfile::TempDir,
    store: Store,
}

impl Root {
    fn new(files: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (path, contents) in files {
            let path = dir.path().join("root").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, contents).unwrap();
        }
        Self { dir, store: Store::memory() }
    }

    fn link(self, path: &str, target: &str) -> Self {
        std::os::unix::fs::symlink(target, self.dir.path().join("root").join(path)).unwrap();
        self
    }

    fn node(&self) -> Node {
        import_path(&self.store, &self.dir.path().join("root")).unwrap()
    }

    async fn composed(&self, at: &str, inputs: &[&str]) -> Result<BTreeMap<PathComponent, Node>, CliError> {
        let link = Node::Symlink { target: "input".try_into().unwrap() };
        let inputs = inputs.iter().map(|name| (PathComponent::try_from(*name).unwrap(), link.clone())).collect();
        Ok(Composed::of(&self.store, &self.node()).await?.with_inputs(at, inputs).await?.entries())
    }

    /// The contents of a file of a composed root.
    fn read(&self, entries: &BTreeMap<PathComponent, Node>, path: &str) -> Option<String> {
        let to = tempfile::tempdir().unwrap();
        let (first, rest) = path.split_once('/').unwrap_or((path, ""));
        export(&self.store, entries.get(first.as_bytes())?, &to.path().join("x")).unwrap();
        fs::read_to_string(to.path().join("x").join(rest)).ok()
    }
}

fn names(entries: &BTreeMap<PathComponent, Node>) -> String {
    entries.keys().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn accounts_are_completed_only_where_they_lack_the_builds_user() {
    let root = Root::new(&[
        ("etc/passwd", "root:x:0:0::/:/bin/sh"),
        ("etc/group", "users:x:100:\n"),
        ("etc/hosts", ""),
        ("etc/resolv.conf", "nameserver 10.0.0.1\n"),
        ("etc/other", "stays"),
    ]);
    let composed = root.composed("inputs", &[]).await.unwrap();
    let read = |path: &str| root.read(&composed, path);
    let passwd = "root:x:0:0::/:/bin/sh\nnixbld:x:1000:100:build user:/build:/noshell\n";
    assert_eq!(read("etc/passwd").as_deref(), Some(passwd));
    assert_eq!(read("etc/group").as_deref(), Some("users:x:100:\n"));
    assert_eq!(read("etc/hosts").as_deref(), Some("127.0.0.1 localhost\n"));
    assert_eq!(read("etc/resolv.conf"), None);
    assert_eq!(read("etc/other").as_deref(), Some("stays"));
    let own = Root::new(&[("etc/passwd", "me:x:1000:1000::/:\n"), ("etc/hosts", "::1 ip6 localhost\n")]);
    assert_eq!(
        own.composed("", &[]).await.unwrap()[b"etc".as_slice()],
        import_path(&own.store, &own.dir.path().join("root/etc")).unwrap()
    );
    let without = Root::new(&[("bin/x", "")]);
    assert_eq!(names(&without.composed("", &[]).await.unwrap()), "bin");
}

#[tokio::test]
async fn inputs_are_added_beside_what_the_root_has() {
    let root = Root::new(&[("usr/a", "a"), ("dev/null", ""), ("proc/x", ""), ("sys/x", ""), ("file", "")]);
    assert_eq!(names(&root.composed("inputs", &[]).await.unwrap()), "file usr");
    assert_eq!(names(&root.composed("inputs", &["x"]).await.unwrap()), "file inputs usr");
    assert_eq!(names(&root.composed("", &["x", "y"]).await.unwrap()), "file usr x y");
    let deep = root.composed("usr/lib/in", &["x"]).await.unwrap();
    assert_eq!(root.read(&deep, "usr/a").as_deref(), Some("a"));
    let in_deep = Node::Directory { digest: digest(&deep[b"usr".as_slice()]), size: 0 };
    assert!(has(&root.store, &in_deep, "lib/in/x").await.is_ok_and(|has| !has), "its link leads nowhere");
    assert!(has(&root.store, &in_deep, "lib/in").await.unwrap());
    for (at, input, words) in [
        ("", "usr", "the root has \"usr\" itself"),
        ("usr", "a", "the root has \"a\" itself"),
        ("file", "a", "no directory"),
        ("..", "a", "can't be in a root"),
    ] {
        let error = root.composed(at, &[input]).await.unwrap_err();
        assert_eq!(error.exit().code(), 2);
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[tokio::test]
async fn a_source_takes_the_place_of_what_the_root_has() {
    let root = Root::new(&[("usr/src/old", ""), ("usr/a", ""), ("file", "")]);
    let source = Node::Symlink { target: "source".try_into().unwrap() };
    let at = async |path: &str| {
        let composed = Composed::of(&root.store, &root.node()).await?;
        Ok::<_, CliError>(composed.with_source(path, source.clone()).await?.entries())
    };
    assert_eq!(names(&at("build").await.unwrap()), "build file usr");
    assert_eq!(at("file").await.unwrap()[b"file".as_slice()], source);
    let usr = Node::Directory { digest: digest(&at("usr/src").await.unwrap()[b"usr".as_slice()]), size: 0 };
    assert!(has(&root.store, &usr, "a").await.unwrap());
    assert!(!has(&root.store, &usr, "src/old").await.unwrap());
    for (path, words) in [("", "can't be the build's root"), ("file/below", "no directory")] {
        let error = at(path).await.unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
}

fn digest(node: &Node) -> cofferdam_castore::B3Digest {
    match node {
        Node::Directory { digest, .. } | Node::File { digest, .. } => *digest,
        Node::Symlink { .. } => panic!("a link has no digest"),
    }
}

#[tokio::test]
async fn only_a_directory_is_a_root() {
    let store = Store::memory();
    let file = Node::File { digest: cofferdam_castore::B3Digest::EMPTY, size: 0, executable: false };
    let error = Composed::of(&store, &file).await.err().unwrap();
    assert!(error.to_string().contains("a root must be a directory"), "{error}");
    let missing = Node::Directory { digest: cofferdam_castore::B3Digest::of(b"none"), size: 1 };
    let error = Composed::of(&store, &missing).await.err().unwrap();
    assert!(error.to_string().contains("the store doesn't have dir:"), "{error}");
}

#[tokio::test]
async fn paths_of_a_root_lead_through_its_links() {
    let root =
        Root::new(&[("usr/bin/sh", "")]).link("bin", "/usr/bin").link("loop", "loop").link("up", "../../usr/bin");
    let node = root.node();
    for (path, expected) in [
        ("bin/sh", true),
        ("usr/bin/sh", true),
        ("up/sh", true),
        ("bin/none", false),
        ("loop/x", false),
        ("bin/sh/x", false),
    ] {
        assert_eq!(has(&root.store, &node, path).await.unwrap(), expected, "{path}");
    }
}
