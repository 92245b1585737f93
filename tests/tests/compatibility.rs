//! Digests equal those of castore's definition, computed here independently.

use std::{
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{PermissionsExt, symlink},
    },
};

use cofferdam_tests::{
    Cofferdam,
    castore::{self, NodeText},
};
use nix::sys::stat::Mode;

#[test]
fn well_known_digests_are_these() {
    let cofferdam = Cofferdam::new();
    let empty = "blake3-rxNJufX5oaagQE3qNtzJSZvLJcmtwRK3zJqTyuQfMmI=";
    let directory = cofferdam.files().join("empty");
    fs::create_dir(&directory).unwrap();
    assert_eq!(cofferdam.import(&directory).as_str(), format!("dir:{empty}:0"));
    assert_eq!(cofferdam.import(&cofferdam.file("nothing", "")).as_str(), format!("file:{empty}:0"));
    let hello = cofferdam.import(&cofferdam.file("hello", "hello\n"));
    assert_eq!(hello, NodeText::file(b"hello\n", false));
}

#[test]
fn imported_trees_have_castores_digests_and_export_unchanged() {
    let cofferdam = Cofferdam::new();
    let tree = cofferdam.files().join("tree");
    for (number, name) in [&b"a"[..], b"a.b", b"a-b", b"A", b"~", b"\xff", b"\xc3\xa4", b" ", b"\n"].iter().enumerate()
    {
        let place = tree.join(OsStr::from_bytes(name));
        fs::create_dir_all(place.join("empty")).unwrap();
        fs::write(place.join(OsStr::from_bytes(name)), vec![b'x'; 70_000 * number]).unwrap();
        symlink(OsStr::from_bytes(b"../\xff\n"), place.join("zz-link")).unwrap();
        let mut directory = place.join("0");
        for _ in 0..number {
            directory.push("d");
        }
        fs::create_dir_all(directory).unwrap();
    }
    for (mode, name) in [(0o100, "owner"), (0o011, "others"), (0o4755, "set-user-id")] {
        let path = cofferdam.file(&format!("tree/{name}"), "x");
        fs::set_permissions(path, PermissionsExt::from_mode(mode | 0o400)).unwrap();
    }
    for number in 0..300 {
        cofferdam.file(&format!("tree/many/{number}"), number.to_string());
    }

    let imported = cofferdam.import(&tree);
    assert_eq!(imported, castore::node_of(&tree));
    assert_eq!(cofferdam.import(&tree), imported, "another import gives another digest");
    let exported = cofferdam.export(imported.as_str());
    assert_eq!(castore::node_of(&exported), imported);
    cofferdam.verified_blobs();
}

#[test]
fn unsupported_files_are_refused_by_path() {
    let cofferdam = Cofferdam::new();
    cofferdam.file("tree/a/file", "x");
    nix::unistd::mkfifo(&cofferdam.files().join("tree/a/pipe"), Mode::S_IRWXU).unwrap();
    let refused = cofferdam.command(["import", "tree", "--json"]);
    refused.is_refused("command_line").says("tree/a/pipe").says("pipe");
    assert!(cofferdam.verified_blobs().is_empty(), "half a tree is in the store");
}

#[test]
fn exports_never_write_over_anything() {
    let cofferdam = Cofferdam::new();
    let node = cofferdam.import(&cofferdam.file("new", "new"));
    let existing = cofferdam.file("existing", "old");
    let refused = cofferdam.command(["export".as_ref(), OsStr::new(node.as_str()), existing.as_os_str()]);
    assert!(refused.stderr.contains("existing"), "{refused}");
    assert_eq!(fs::read_to_string(existing).unwrap(), "old");
    let missing = cofferdam.command(["export", "blake3-BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=", "nowhere"]);
    assert!(missing.stderr.contains("blake3-BwcH") && !cofferdam.files().join("nowhere").exists(), "{missing}");
}
