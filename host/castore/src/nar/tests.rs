//! The archives here are written by hand from the format's description, and their hashes come from other programs.

use std::{io, path::Path};

use futures::executor::block_on;
use proptest::prelude::*;

use super::*;
use crate::{
    B3Digest, LocalBlobService, Node, Store,
    archive::{ArchiveError, Limits, MAX_DEPTH},
    export::{ExportError, export},
    import::import_path,
    testing::{Tree, arb_tree, file, put, put_directory, symlink},
};

/// One string of the format: length, bytes, zeros.
fn string(bytes: &[u8]) -> Vec<u8> {
    let zeros = (8 - bytes.len() % 8) % 8;
    [&(bytes.len() as u64).to_le_bytes(), bytes, &vec![0; zeros]].concat()
}

/// Words with spaces between; `''` is the empty one.
fn words(text: &str) -> Vec<u8> {
    text.split_whitespace().flat_map(|word| string(word.trim_matches('\'').as_bytes())).collect()
}

fn nar(store: &Store, node: &Node) -> Vec<u8> {
    let mut bytes = Vec::new();
    write(store, node, Path::new("nar"), &mut bytes, &|| false).unwrap();
    bytes
}

fn refused(bytes: &[u8]) -> String {
    let store = Store::memory();
    let error = import(&store, bytes, Limits::default()).unwrap_err();
    std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

/// A tree with every kind of node, as a NAR that is spelt out.
fn sample(store: &Store) -> (Node, Vec<u8>) {
    let below = put_directory(store, [("deep", put(store, b"12345678", false)), ("empty", put(store, b"", false))]);
    let nodes = [
        ("a", put(store, b"x", false)),
        ("d", below),
        ("e", put_directory(store, [])),
        ("l", symlink("../target")),
        ("x", put(store, b"#!", true)),
    ];
    let spelt = words(
        "nix-archive-1 ( type directory
         entry ( name a node ( type regular contents x ) )
         entry ( name d node ( type directory
             entry ( name deep node ( type regular contents 12345678 ) )
             entry ( name empty node ( type regular contents '' ) ) ) )
         entry ( name e node ( type directory ) )
         entry ( name l node ( type symlink target ../target ) )
         entry ( name x node ( type regular executable '' contents #! ) ) )",
    );
    (put_directory(store, nodes), spelt)
}

#[test]
fn a_nar_is_what_the_format_says() {
    let store = Store::memory();
    let (node, spelt) = sample(&store);
    assert_eq!(nar(&store, &node), spelt);
    assert_eq!(nar(&store, &put(&store, b"x", true)), words("nix-archive-1 ( type regular executable '' contents x )"));
    assert_eq!(nar(&store, &symlink("t")), words("nix-archive-1 ( type symlink target t )"));
}

#[test]
fn well_known_hashes_are_these() {
    let store = Store::memory();
    let known = |node: &Node| {
        let NarInfo { sha256, size } = info(&store, node, Path::new("nar"), &|| false).unwrap();
        (data_encoding::HEXLOWER.encode(&sha256), size)
    };
    for (node, hash, size) in [
        // Nix prints these two as sha256-pQpattmS9VmO3ZIQUFn66az8GSmB4IvYhTTCFn6SUmo= and
        // sha256-d6xi4mKdjkX2JFicDIv5niSzpyI0m/Hnm8GGAIU04kY=.
        (put_directory(&store, []), "a50a5ab6d992f5598edd92105059fae9acfc192981e08bd88534c2167e92526a", 96),
        (put(&store, b"", false), "77ac62e2629d8e45f624589c0c8bf99e24b3a722349bf1e79bc186008534e246", 112),
        (put(&store, b"hello\n", false), "1c37d01af40be2e80691de3cc3df44377a699afbb17c68f080964b2fd071fc13", 120),
        (put(&store, b"hello\n", true), "65436039d3f93ca19a8dbf1c60b15739ed58f53f14b8d372acc1b351533010fa", 152),
        (symlink("/nix/store"), "efc552ebda9a3233560a7dc3967867b168edae5f702b6ca67cf6d9d71c06d45a", 128),
        (sample(&store).0, "017f93ab485a37a4d34c2f3a4ea96a06ffb15735c2dcf0bc653593724e81baee", 1424),
    ] {
        assert_eq!(known(&node), (hash.to_owned(), size));
    }
}

#[test]
fn a_literal_nar_can_be_read() {
    let store = Store::memory();
    let (node, spelt) = sample(&Store::memory());
    assert_eq!(import(&store, &*spelt, Limits::default()).unwrap(), node);
    assert_eq!(nar(&store, &node), spelt);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_tree_comes_back_through_its_nar(tree in arb_tree()) {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        tree.write(&source);
        let (from, to) = (Store::memory(), Store::memory());
        let node = import_path(&from, &source).unwrap();
        let bytes = nar(&from, &node);
        prop_assert_eq!(import(&to, &*bytes, Limits::default()).unwrap(), node.clone());
        let copy = dir.path().join("copy");
        export(&to, &node, &copy).unwrap();
        prop_assert_eq!(Tree::read(&copy), tree);
        prop_assert_eq!(info(&to, &node, Path::new("nar"), &|| false).unwrap().size, bytes.len() as u64);
    }

    #[test]
    fn mangled_bytes_are_refused_or_are_another_canonical_archive(
        at in any::<proptest::sample::Index>(),
        bytes in proptest::collection::vec(any::<u8>(), 0..9),
        keep in any::<bool>(),
    ) {
        let (_, mut mangled) = sample(&Store::memory());
        let at = at.index(mangled.len());
        let end = (at + if keep { bytes.len() } else { 0 }).min(mangled.len());
        mangled.splice(at..end, bytes);
        let store = Store::memory();
        if let Ok(node) = import(&store, &*mangled, Limits::default()) {
            prop_assert_eq!(nar(&store, &node), mangled);
        }
    }
}

#[test]
fn every_end_but_the_last_is_too_early() {
    let (_, spelt) = sample(&Store::memory());
    for end in 0..spelt.len() {
        let error = refused(&spelt[..end]);
        assert!(error.contains("cut short"), "{end}: {error}");
    }
    assert!(refused(&[spelt, vec![0]].concat()).contains("goes on after its end"));
}

#[test]
fn broken_rules_are_named_with_their_place() {
    let entry = |name: &str| format!("entry ( name {name} node ( type regular contents x ) )");
    let directory = |entries: &[&str]| {
        let entries: String = entries.iter().map(|name| entry(name) + " ").collect();
        words(&format!("nix-archive-1 ( type directory {entries} )"))
    };
    for (bytes, expected) in [
        (words("nix-archive-2 ( type directory )"), "is not a NAR"),
        (b"\x1f\x8b some other archive, perhaps".to_vec(), "is not a NAR"),
        (words("nix-archive-1 ( much-longer-than-any-word"), "where at most 16 may be"),
        (words("nix-archive-1 ( type fifo )"), "here is \"fifo\" where \"regular\""),
        (words("nix-archive-1 ( type regular executable x contents x )"), "here is \"x\" where \"\""),
        (words("nix-archive-1 ( type regular )"), "where \"contents\""),
        (words("nix-archive-1 ( type symlink target '' )"), "is empty"),
        (directory(&["b", "a"]), "the entry \"a\" comes after \"b\"; entries are sorted"),
        (directory(&["a", "a"]), "the entry \"a\" comes after \"a\""),
        (directory(&[".."]), "the name \"..\" is reserved"),
        (directory(&["a/b"]), "holds a slash"),
        (directory(&["''"]), "is empty"),
    ] {
        let error = refused(&bytes);
        assert!(error.contains(expected), "{error}");
    }
    let nested = words(
        "nix-archive-1 ( type directory entry ( name d node ( type directory entry ( name l node ( type symlink target '' ) ) ) ) )",
    );
    assert!(refused(&nested).starts_with("d/l: the target"));
    let mut padded = words("nix-archive-1 ( type regular contents x )");
    let at = padded.iter().rposition(|&byte| byte == b'x').unwrap();
    padded[at + 1] = 1;
    assert!(refused(&padded).contains("padded with other bytes than zeros"));
}

#[test]
fn a_length_is_not_believed() {
    let endless = [words("nix-archive-1 ( type regular contents"), u64::MAX.to_le_bytes().to_vec()].concat();
    assert!(refused(&endless).contains("exceeds the limit of 68719476736 bytes"));
    let word = [words("nix-archive-1 ("), (1_u64 << 40).to_le_bytes().to_vec()].concat();
    assert!(refused(&word).contains("a string of 1099511627776 bytes"));
    let large = [words("nix-archive-1 ( type regular contents"), (1_u64 << 33).to_le_bytes().to_vec()].concat();
    assert!(refused(&large).contains("cut short"));
}

#[test]
fn depth_and_entries_have_limits() {
    let nested = |depth: usize| {
        let begin = "( type directory entry ( name d node ".repeat(depth);
        words(&format!("nix-archive-1 {begin} ( type directory ) {}", ") ) ".repeat(depth)))
    };
    let store = Store::memory();
    let node = import(&store, &*nested(MAX_DEPTH), Limits::default()).unwrap();
    assert_eq!(nar(&store, &node), nested(MAX_DEPTH));
    for depth in [MAX_DEPTH + 1, 10_000] {
        assert!(refused(&nested(depth)).contains("nested deeper than 512"));
    }
    let (_, spelt) = sample(&store);
    let exactly = Limits { entries: 8, bytes: 11 };
    import(&Store::memory(), &*spelt, exactly).unwrap();
    for (limits, what) in [
        (Limits { entries: 7, ..exactly }, "limit of 7 entries"),
        (Limits { bytes: 10, ..exactly }, "limit of 10 bytes"),
    ] {
        let error = import(&Store::memory(), &*spelt, limits).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
}

#[test]
fn an_archive_that_is_refused_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store { blobs: std::sync::Arc::new(LocalBlobService::open(dir.path()).unwrap()), ..Store::memory() };
    let bytes =
        words("nix-archive-1 ( type directory entry ( name a node ( type regular contents x ) ) entry ( name a");
    import(&store, &*bytes, Limits::default()).unwrap_err();
    block_on(store.blobs.commit()).unwrap();
    assert!(!block_on(store.blobs.has(&B3Digest::of(b"x"))).unwrap());
    assert_eq!(std::fs::read_dir(dir.path().join("staging")).unwrap().count(), 0);
}

#[test]
fn a_source_that_fails_is_not_taken_for_a_wrong_archive() {
    struct Failing;
    impl io::Read for Failing {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::other("disk on fire"))
        }
    }
    let failed = import(&Store::memory(), Failing, Limits::default());
    assert!(matches!(failed, Err(ArchiveError::Read { .. })));
}

#[test]
fn a_damaged_or_missing_blob_gives_no_nar() {
    let store = Store::memory();
    let short = Node::File { digest: B3Digest::of(b"three"), size: 3, executable: false };
    put(&store, b"three", false);
    let mut bytes = Vec::new();
    let failed = |node: &Node, bytes: &mut Vec<u8>| write(&store, node, Path::new("nar"), bytes, &|| false);
    assert!(matches!(failed(&short, &mut bytes), Err(ExportError::Size { expected: 3, actual: 5, .. })));
    let missing = put_directory(&store, [("f", file(b"never put", false))]);
    let Err(ExportError::Missing { path, .. }) = failed(&missing, &mut bytes) else { panic!("another outcome") };
    assert_eq!(path, Path::new("nar/f"));

    let dir = tempfile::tempdir().unwrap();
    let store = Store { blobs: std::sync::Arc::new(LocalBlobService::open(dir.path()).unwrap()), ..Store::memory() };
    let node = put(&store, b"right", false);
    block_on(store.blobs.commit()).unwrap();
    let hex = B3Digest::of(b"right").to_hex();
    let path = dir.path().join("b3").join(&hex[..2]).join(hex);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, b"wrong").unwrap();
    let error = info(&store, &node, Path::new("nar"), &|| false).unwrap_err();
    assert!(matches!(error, ExportError::Store { ref source, .. } if source.kind() == io::ErrorKind::InvalidData));
}
