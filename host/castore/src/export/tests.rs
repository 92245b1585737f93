use std::os::unix::fs::{PermissionsExt as _, symlink};

use nix::libc;

use super::*;
use crate::testing::{failing, file, name, put, put_directory, symlink as link};

/// The error of an export that must leave nothing behind.
fn refused(store: &Store, node: &Node) -> ExportError {
    let dir = tempfile::tempdir().unwrap();
    let error = export(store, node, &dir.path().join("out")).unwrap_err();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    error
}

#[test]
fn a_file_system_without_rename_flags_will_do() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    failing((libc::SYS_renameat2, 4, libc::RENAME_NOREPLACE as libc::c_int), Errno::EINVAL, move || {
        let store = Store::memory();
        let plain = put(&store, b"contents", false);
        let tree = put_directory(&store, [("below", plain.clone())]);
        for (name, node) in [("file", &plain), ("link", &link("nowhere")), ("tree", &tree)] {
            export(&store, node, &path.join(name)).unwrap();
        }
        // A destination that appears during the export.
        for node in [&plain, &tree] {
            let taken = path.join("taken");
            let appears = || {
                fs::write(&taken, "old").unwrap();
                false
            };
            assert!(matches!(
                export_unless(&store, node, &taken, Existing::Refused, &appears),
                Err(ExportError::Exists(_))
            ));
            fs::remove_file(taken).unwrap();
        }
    });
    assert_eq!(fs::read(dir.path().join("file")).unwrap(), b"contents");
    assert_eq!(fs::read_link(dir.path().join("link")).unwrap(), Path::new("nowhere"));
    assert_eq!(fs::read(dir.path().join("tree/below")).unwrap(), b"contents");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
}

#[test]
fn nothing_is_left_when_descriptors_run_out() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("out");
    // The first of a directory that is new.
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
    failing((libc::SYS_openat, 2, flags.bits()), Errno::EMFILE, move || {
        let error = export(&Store::memory(), &link("t"), &dest).unwrap_err();
        assert!(matches!(error, ExportError::Write { action: "open the directory", .. }));
    });
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn files_and_directories_get_the_modes_that_users_expect() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::memory();
    let nodes = [("plain", put(&store, b"x", false)), ("program", put(&store, b"#!", true))];
    let out = dir.path().join("out");
    export(&store, &put_directory(&store, nodes), &out).unwrap();
    // The umask of this process may remove some permissions.
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7700;
    assert_eq!((mode(&out), mode(&out.join("plain")), mode(&out.join("program"))), (0o700, 0o600, 0o700));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn an_interrupted_export_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::memory();
    let node = put_directory(&store, [("a", put(&store, b"a", false)), ("b", put(&store, b"b", false))]);
    let asked = std::cell::Cell::new(0);
    let interrupted = || asked.replace(asked.get() + 1) == 1;
    let ended = export_unless(&store, &node, &dir.path().join("out"), Existing::Refused, &interrupted);
    assert!(matches!(ended, Err(ExportError::Interrupted)));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn the_export_of_a_single_file_can_be_interrupted() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::memory();
    let node = put(&store, b"a", false);
    let ended = export_unless(&store, &node, &dir.path().join("out"), Existing::Refused, &|| true);
    assert!(matches!(ended, Err(ExportError::Interrupted)));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn nothing_is_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::memory();
    let node = put(&store, b"new", false);
    let (taken, dangling) = (dir.path().join("file"), dir.path().join("link"));
    fs::write(&taken, "old").unwrap();
    symlink("nowhere", &dangling).unwrap();
    for path in [&taken, &dangling, dir.path()] {
        assert!(matches!(export(&store, &node, path), Err(ExportError::Exists(_))));
    }
    assert_eq!(fs::read(&taken).unwrap(), b"old");
    assert!(!dir.path().join("nowhere").exists());
}

#[test]
fn a_symlink_in_the_tree_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::memory();
    let node = put_directory(&store, [("a", link("/")), ("b", link("a/etc")), ("c", put(&store, b"c", false))]);
    let out = dir.path().join("out");
    export(&store, &node, &out).unwrap();
    assert_eq!(fs::read_link(out.join("a")).unwrap(), Path::new("/"));
    assert_eq!(fs::read_link(out.join("b")).unwrap(), Path::new("a/etc"));
}

#[test]
fn what_the_store_lacks_is_named_and_nothing_is_left() {
    let store = Store::memory();
    let missing = file(b"never put", false);
    let tree = put_directory(&store, [("a", put(&store, b"a", false)), ("b", missing.clone())]);
    let ExportError::Missing { path, what, digest } = refused(&store, &tree) else { panic!("another error") };
    assert!(path.ends_with("out/b"));
    assert_eq!((what, digest), ("blob", B3Digest::of(b"never put")));
    assert!(matches!(refused(&store, &missing), ExportError::Missing { what: "blob", .. }));

    let unknown = Directory::try_from_iter([(name("x"), link("t"))]).unwrap().to_node();
    assert!(matches!(refused(&store, &unknown), ExportError::Missing { what: "directory", .. }));
    let above = put_directory(&store, [("d", put_directory(&store, [("a", link("t")), ("deep", unknown.clone())]))]);
    let ExportError::Missing { path, what, digest } = refused(&store, &above) else { panic!("another error") };
    assert!(path.ends_with("out/d/deep"));
    assert_eq!((what, Node::Directory { digest, size: 2 }), ("directory", unknown));
}

#[test]
fn a_node_that_lies_about_a_size_is_refused() {
    let store = Store::memory();
    put(&store, b"three", false);
    let short = Node::File { digest: B3Digest::of(b"three"), size: 3, executable: false };
    assert!(matches!(refused(&store, &short), ExportError::Size { what: "blob", expected: 3, actual: 5, .. }));
    let Node::Directory { digest, .. } = put_directory(&store, [("l", link("t"))]) else { unreachable!() };
    let large = Node::Directory { digest, size: 9 };
    assert!(matches!(refused(&store, &large), ExportError::Size { what: "directory", expected: 9, actual: 2, .. }));
}

#[test]
fn a_destination_is_a_name_in_an_existing_directory() {
    let dir = tempfile::tempdir().unwrap();
    let (store, node) = (Store::memory(), link("t"));
    let error = export(&store, &node, &dir.path().join("nowhere/out")).unwrap_err();
    assert!(matches!(&error, ExportError::Write { path, .. } if path.ends_with("nowhere")));
    assert!(matches!(export(&store, &node, &dir.path().join("x/..")), Err(ExportError::Unnamed(_))));
}

#[test]
fn what_killed_exports_have_left_goes_with_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let leftover = |of: &str| dir.path().join(format!(".cofferdam-export-{of}-0"));
    for of in ["1", &std::process::id().to_string(), "living"] {
        fs::create_dir_all(leftover(of).join("content/half")).unwrap();
    }
    symlink(dir.path(), leftover("2")).unwrap();
    let living = File::open(leftover("living")).unwrap();
    living.lock().unwrap();
    export(&Store::memory(), &link("t"), &dir.path().join("out")).unwrap();
    assert_eq!(fs::read_link(dir.path().join("out")).unwrap(), Path::new("t"));
    let mut left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    left.sort();
    assert_eq!(left, [leftover("2"), leftover("living"), dir.path().join("out")]);
}

#[test]
fn what_is_there_is_replaced_by_a_whole_export_only_on_request() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    let replace = move |base: &Path| {
        let store = Store::memory();
        let plain = put(&store, b"contents", false);
        let tree = put_directory(&store, [("below", plain.clone())]);
        for node in [&plain, &link("nowhere"), &tree] {
            let taken = base.join("taken");
            fs::create_dir_all(taken.join("old")).unwrap();
            export_unless(&store, node, &taken, Existing::Replaced, &|| false).unwrap();
            assert!(fs::symlink_metadata(taken.join("old")).is_err());
            // An export that fails replaces nothing.
            let stopped = export_unless(&store, &tree, &taken, Existing::Replaced, &|| true);
            assert!(matches!(stopped, Err(ExportError::Interrupted)));
            export_unless(&store, &plain, &taken, Existing::Replaced, &|| false).unwrap();
            assert_eq!(fs::read(&taken).unwrap(), b"contents");
            fs::remove_file(taken).unwrap();
        }
        assert_eq!(fs::read_dir(base).unwrap().count(), 0, "something is left beside the destination");
    };
    replace(&path);
    for flags in [libc::RENAME_NOREPLACE, libc::RENAME_EXCHANGE] {
        let path = path.clone();
        failing((libc::SYS_renameat2, 4, flags as libc::c_int), Errno::EINVAL, move || replace(&path));
    }
}
