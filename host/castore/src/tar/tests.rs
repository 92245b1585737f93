use std::path::Path;

use ::tar::{Builder, EntryType, Header};
use futures::executor::block_on;
use proptest::prelude::*;

use super::*;
use crate::{
    Directory, Node, Store,
    archive::{ArchiveError, Compression, Compressor, Limits, MAX_DEPTH, decompress},
    export::export,
    import::import_path,
    testing::{Tree, arb_tree, file, name, symlink},
};

mod layers;

/// An archive made by the crate, entry by entry.
struct Made(Builder<Vec<u8>>);

impl Made {
    fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    fn entry(mut self, kind: EntryType, path: &[u8], target: &[u8], contents: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(if path.ends_with(b"x") { 0o755 } else { 0o644 });
        header.set_size(contents.len() as u64);
        let gnu = header.as_gnu_mut().unwrap();
        gnu.name[..path.len()].copy_from_slice(path);
        gnu.linkname[..target.len()].copy_from_slice(target);
        header.set_cksum();
        self.0.append(&header, contents).unwrap();
        self
    }

    fn file(self, path: &str, contents: &[u8]) -> Self {
        self.entry(EntryType::Regular, path.as_bytes(), b"", contents)
    }

    fn link(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Link, path.as_bytes(), target.as_bytes(), b"")
    }

    fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, path.as_bytes(), target.as_bytes(), b"")
    }

    fn directory(self, path: &str) -> Self {
        self.entry(EntryType::Directory, path.as_bytes(), b"", b"")
    }

    /// PAX records for the next entry, or with `XGlobalHeader` for all.
    fn pax(self, kind: EntryType, records: &[(&str, &str)]) -> Self {
        let mut contents = Vec::new();
        for (key, value) in records {
            let rest = format!(" {key}={value}\n");
            let length = (1..).find(|length| length == &(length.to_string().len() + rest.len())).unwrap();
            contents.extend_from_slice(format!("{length}{rest}").as_bytes());
        }
        self.entry(kind, b"pax", b"", &contents)
    }

    fn end(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }

    fn imported(self) -> Directory {
        let store = Store::memory();
        let Ok(Node::Directory { digest, size }) = import(&store, &*self.end(), Limits::default()) else {
            panic!("it is refused")
        };
        let root = block_on(store.directories.get(&digest)).unwrap().unwrap();
        assert_eq!(root.size(), size);
        root
    }

    fn refused(self) -> String {
        refused(&self.end())
    }
}

fn refused(bytes: &[u8]) -> String {
    let error = import(&Store::memory(), bytes, Limits::default()).unwrap_err();
    assert!(matches!(error, ArchiveError::Malformed { .. } | ArchiveError::Limit { .. }), "{error:?}");
    error.to_string()
}

fn written(store: &Store, node: &Node) -> Vec<u8> {
    let mut bytes = Vec::new();
    write(store, node, Path::new("tar"), &mut bytes, &|| false).unwrap();
    bytes
}

fn directory(nodes: impl IntoIterator<Item = (&'static str, Node)>) -> Directory {
    Directory::try_from_iter(nodes.into_iter().map(|(text, node)| (name(text), node))).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_tree_comes_back_through_tar(tree in arb_tree()) {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::Directory([(name("root"), tree)].into());
        let source = dir.path().join("source");
        tree.write(&source);
        let (from, to) = (Store::memory(), Store::memory());
        let node = import_path(&from, &source).unwrap();
        let bytes = written(&from, &node);
        prop_assert_eq!(import(&to, &*bytes, Limits::default()).unwrap(), node.clone());
        let copy = dir.path().join("copy");
        export(&to, &node, &copy).unwrap();
        prop_assert_eq!(Tree::read(&copy), tree);
        prop_assert_eq!(written(&to, &node), bytes);
    }

    #[test]
    fn mangled_bytes_never_panic(at in any::<proptest::sample::Index>(), bytes in proptest::collection::vec(any::<u8>(), 1..64)) {
        let mut mangled = Made::new().file("a", &[7; 700]).symlink("l", "t").pax(EntryType::XHeader, &[("path", "p")]).file("b", b"x").end();
        let at = at.index(mangled.len());
        let end = (at + bytes.len()).min(mangled.len());
        mangled.splice(at..end, bytes);
        let _ = import(&Store::memory(), &*mangled, Limits::default());
    }
}

#[test]
fn what_other_programs_write_is_read_and_the_other_way_round() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    let long = "d".repeat(200);
    std::fs::create_dir_all(source.join(&long).join(&long)).unwrap();
    std::fs::write(source.join(&long).join(&long).join("file"), "contents").unwrap();
    std::fs::write(source.join("one"), "one").unwrap();
    std::fs::hard_link(source.join("one"), source.join("other")).unwrap();
    std::os::unix::fs::symlink(format!("../{long}/{long}"), source.join("link")).unwrap();
    let sparse = std::fs::File::create(source.join("sparse")).unwrap();
    sparse.set_len(1 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"middle", 500_000).unwrap();

    let store = Store::memory();
    let node = import_path(&store, &source).unwrap();
    let tar = |arguments: &[&str]| {
        let done = std::process::Command::new("tar").args(arguments).current_dir(dir.path()).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        done.stdout
    };
    for format in ["gnu", "posix"] {
        for flags in [
            &["--verbose"][..],
            &["--gzip"],
            &["--label=a label"],
            &["--sparse"],
            &["--sparse", "--sparse-version=0.1"],
            &["--sparse", "--sparse-version=0.0"],
        ] {
            let bytes = tar(&[&["-c", "--format", format, "-C", "source"], flags, &["."]].concat());
            let bytes = decompress(&*bytes).unwrap();
            assert_eq!(import(&Store::memory(), bytes, Limits::default()).unwrap(), node, "{format} {flags:?}");
        }
    }

    for (compression, flag) in [(Compression::None, "--verbose"), (Compression::Gzip, "--gzip")] {
        let mut compressor = Compressor::new(Vec::new(), compression).unwrap();
        write(&store, &node, Path::new("tar"), &mut compressor, &|| false).unwrap();
        std::fs::write(dir.path().join("archive"), compressor.finish().unwrap()).unwrap();
        let copy = dir.path().join(flag);
        std::fs::create_dir(&copy).unwrap();
        tar(&["-x", flag, "-f", "archive", "-C", &format!("./{flag}")]);
        assert_eq!(Tree::read(&copy), Tree::read(&source));
    }
}

#[test]
fn paths_are_cleaned_and_parents_are_made() {
    let root = Made::new().file("./a//b/./c", b"x").directory("./").directory("a/").file("ax", b"#!").imported();
    let c = directory([("c", file(b"x", false))]);
    let a = directory([("b", c.to_node())]);
    assert_eq!(root, directory([("a", a.to_node()), ("ax", file(b"#!", true))]));
    assert_eq!(Made::new().imported(), Directory::new());
}

#[test]
fn paths_that_lead_elsewhere_are_refused() {
    for path in ["/etc/passwd", "//a", "/"] {
        assert!(Made::new().file(path, b"x").refused().contains("its path is absolute"), "{path}");
    }
    for path in ["../a", "a/../b", "a/..", ".."] {
        assert!(Made::new().file(path, b"x").refused().contains("\"..\" is reserved"), "{path}");
    }
    assert!(Made::new().file(".", b"x").refused().contains("root of the archive is not a directory"));
    let through = Made::new().symlink("a", "/etc").file("a/passwd", b"x").refused();
    assert!(through.starts_with("a/passwd: \"a\" in its path is a file or symbolic link"), "{through}");
    let through = Made::new().file("a", b"x").directory("a").refused();
    assert!(through.starts_with("a: \"a\" in its path"), "{through}");
    assert!(Made::new().file("a/b", b"x").file("a", b"x").refused().contains("would replace a directory"));
}

#[test]
fn the_last_of_several_entries_counts() {
    let root = Made::new()
        .file("a", b"old")
        .symlink("b", "old")
        .file("a", b"new")
        .file("b", b"new")
        .directory("d")
        .directory("d");
    let expected = [("a", file(b"new", false)), ("b", file(b"new", false)), ("d", Directory::new().to_node())];
    assert_eq!(root.imported(), directory(expected));
}

#[test]
fn hard_links_become_what_they_are_links_to() {
    let root = Made::new()
        .file("d/x", b"#!")
        .link("a", "./d/x")
        .file("d/x", b"later")
        .link("b", "a")
        .symlink("s", "t")
        .link("t", "s");
    let d = directory([("x", file(b"later", true))]);
    let expected = [
        ("d", d.to_node()),
        ("a", file(b"#!", true)),
        ("b", file(b"#!", true)),
        ("s", symlink("t")),
        ("t", symlink("t")),
    ];
    assert_eq!(root.imported(), directory(expected));
    for target in ["later", "d", "d/none", "a/b", ""] {
        let error = Made::new().directory("d").file("a", b"x").link("l", target).file("later", b"x").refused();
        assert!(error.contains("no file before it has that path"), "{target}: {error}");
    }
    assert!(Made::new().file("a", b"x").link("l", "/a").refused().contains("absolute"));
}

#[test]
fn what_castore_can_not_hold_is_refused_by_kind() {
    for (kind, expected) in [
        (EntryType::Char, "character device"),
        (EntryType::Block, "block device"),
        (EntryType::Fifo, "fifo"),
        (EntryType::new(b'M'), "of the kind 'M'"),
    ] {
        let error = Made::new().entry(kind, b"dev/it", b"", b"").refused();
        assert!(error.starts_with("dev/it: is") && error.contains(expected), "{error}");
    }
    assert!(Made::new().symlink("l", "").refused().contains("the target \"\" is empty"));
    assert_eq!(Made::new().entry(EntryType::new(b'V'), b"label", b"", b"").imported(), Directory::new());
}

#[test]
fn pax_records_name_the_next_entry() {
    let long = "n".repeat(250);
    let records = [("path", long.as_str()), ("linkpath", "p/t"), ("comment", "any")];
    let root = Made::new().pax(EntryType::XGlobalHeader, &[("comment", "a commit")]).pax(EntryType::XHeader, &records);
    let root = root.symlink("short", "t").imported();
    assert_eq!(root.get(long.as_bytes()), Some(&symlink("p/t")));

    let error = Made::new().pax(EntryType::XGlobalHeader, &[("path", "p")]).file("a", b"x").refused();
    assert!(error.contains("gives all entries the same \"path\""), "{error}");
    let error = Made::new().pax(EntryType::XHeader, &[("GNU.sparse.major", "1")]).file("a", b"x").refused();
    assert!(error.contains("a: is a sparse file, and it has no size"), "{error}");
}

#[test]
fn depth_names_and_headers_have_limits() {
    let deep = |depth: usize| Made::new().pax(EntryType::XHeader, &[("path", &"d/".repeat(depth))]).directory("d");
    deep(MAX_DEPTH).imported();
    for depth in [MAX_DEPTH + 1, 10_000] {
        assert!(deep(depth).refused().contains("nested deeper than 512"));
    }
    let name = "n".repeat(256);
    let error = Made::new().pax(EntryType::XHeader, &[("path", &name)]).file("n", b"x").refused();
    assert!(error.contains("longer than 255 bytes"), "{error}");
    let huge = "h".repeat(2 << 20);
    for kind in [EntryType::XHeader, EntryType::GNULongName] {
        let error = Made::new().entry(kind, b"huge", b"", huge.as_bytes()).file("n", b"x").refused();
        assert!(error.contains("the headers of one entry exceed 1048576 bytes"), "{error}");
    }
}

#[test]
fn entries_and_bytes_have_limits() {
    let made = || Made::new().file("d/e/a", b"12345").symlink("l", "t").end();
    let exactly = Limits { entries: 4, bytes: 2048 };
    let import = |limits| import(&Store::memory(), &*made(), limits);
    import(exactly).unwrap();
    let error = import(Limits { entries: 3, ..exactly }).unwrap_err().to_string();
    assert_eq!(error, "l: the archive exceeds the limit of 3 entries here");
    let error = import(Limits { bytes: 4, ..exactly }).unwrap_err().to_string();
    assert_eq!(error, "d/e/a: the archive exceeds the limit of 4 bytes here");
}

#[test]
fn a_sparse_file_is_not_as_small_as_it_looks() {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNUSparse);
    header.set_path("bomb").unwrap();
    header.set_size(0);
    let gnu = header.as_gnu_mut().unwrap();
    gnu.realsize = *b"777777777777";
    gnu.sparse[0].offset = *b"777777777777";
    gnu.sparse[0].numbytes = *b"00000000000\0";
    header.set_cksum();
    let bytes = [header.as_bytes().as_slice(), &[0; 1024]].concat();
    let limits = Limits { entries: 9, bytes: 1 << 20 };
    let error = import(&Store::memory(), &*bytes, limits).unwrap_err();
    assert!(matches!(error, ArchiveError::Limit { .. } | ArchiveError::Malformed { .. }), "{error}");
    let records = [("GNU.sparse.size", "9000000000000000000"), ("GNU.sparse.map", "")];
    let bytes = Made::new().pax(EntryType::XHeader, &records).file("bomb", b"").end();
    let error = import(&Store::memory(), &*bytes, limits).unwrap_err();
    assert!(matches!(error, ArchiveError::Limit { .. }), "{error}");
}

#[test]
fn a_bomb_is_stopped_at_the_limit() {
    for compression in [Compression::Gzip, Compression::Zstd] {
        // 64 MiB of zeros, as one file and after the archive's end.
        let mut header = Header::new_gnu();
        header.set_path("zeros").unwrap();
        header.set_mode(0o644);
        header.set_size(64 << 20);
        header.set_cksum();
        for begin in [header.as_bytes().as_slice(), &[0; 1024]] {
            let mut bomb = Compressor::new(Vec::new(), compression).unwrap();
            std::io::Write::write_all(&mut bomb, begin).unwrap();
            std::io::copy(&mut std::io::Read::take(std::io::repeat(0), 64 << 20), &mut bomb).unwrap();
            let bomb = bomb.finish().unwrap();
            assert!(bomb.len() < 128 << 10);
            let limits = Limits { entries: 9, bytes: 1 << 20 };
            let error = import(&Store::memory(), decompress(&*bomb).unwrap(), limits).unwrap_err();
            assert!(error.to_string().contains("exceeds the limit of 1048576 bytes"), "{error}");
        }
    }
}

#[test]
fn an_archive_that_is_cut_short_is_refused() {
    let whole = Made::new().file("a", &[7; 700]).file("b", b"x").end();
    let end = whole.len() - 1024;
    for cut in (0..=end).step_by(100).chain([512, 1024, end]) {
        let error = refused(&whole[..cut]);
        assert!(error.contains("cut short"), "{cut}: {error}");
    }
    // One of the two blocks that end an archive is enough, and padding may follow.
    import(&Store::memory(), &whole[..end + 512], Limits::default()).unwrap();
    import(&Store::memory(), &*[whole, vec![0; 9000]].concat(), Limits::default()).unwrap();
}

#[test]
fn bytes_that_are_no_archive_are_refused() {
    let error = refused(&[b'x'; 2000]);
    assert!(error.contains("not a tar archive, or is damaged"), "{error}");
    let mut bytes = Made::new().file("a", b"x").end();
    bytes[0] = b'b';
    assert!(refused(&bytes).contains("checksum"));
}

#[test]
fn a_tar_holds_a_directory_only() {
    let error = write(&Store::memory(), &symlink("t"), Path::new("x.tar"), &mut Vec::new(), &|| false).unwrap_err();
    assert!(error.to_string().contains("x.tar"), "{error}");
}
