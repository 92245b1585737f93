use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File, Permissions, create_dir, create_dir_all},
    os::unix::{
        ffi::OsStringExt as _,
        fs::{PermissionsExt as _, symlink},
    },
    path::PathBuf,
};

use cofferdam_protocol::{
    frame::{FrameReader, MAX_FROM_GUEST_BYTES},
    tree::{Check, Limits},
};
use nix::{sys::stat::mknod, unistd::mkfifo};
use tempfile::TempDir;

use super::*;

/// Sends outputs, and returns one line for each message. Checks trees as the host does.
fn sent(root: &Path, outputs: &[&str]) -> Vec<String> {
    let mut wire = Vec::new();
    let directory = File::open(root).unwrap();
    let outputs: Vec<_> = outputs.iter().map(|output| (*output).to_owned()).collect();
    send_from(directory.as_fd(), &mut FrameWriter::new(&mut wire, MAX_FROM_GUEST_BYTES), &outputs, "build").unwrap();
    lines(&wire, UNLIMITED)
}

/// The same for kept files. The last line has the number of skipped entries.
fn kept(root: &Path, writable: &[(&str, &Path)], limits: Limits) -> Vec<String> {
    let mut wire = Vec::new();
    let directory = File::open(root).unwrap();
    let writable: BTreeMap<_, _> = writable.iter().map(|(at, path)| (at.into(), path.to_path_buf())).collect();
    let mut writer = FrameWriter::new(&mut wire, MAX_FROM_GUEST_BYTES);
    let skipped = send_kept_from(directory.as_fd(), &mut writer, &writable, limits).unwrap();
    let mut lines = lines(&wire, limits);
    lines.push(format!("{skipped} skipped"));
    lines
}

fn lines(wire: &[u8], limits: Limits) -> Vec<String> {
    let mut reader = FrameReader::new(wire, MAX_FROM_GUEST_BYTES);
    let mut check = Check::new(limits);
    let mut lines = Vec::new();
    while let Ok(message) = reader.read::<FromGuest<'_>>() {
        if let FromGuest::Tree(event) = &message {
            check.admit(event).unwrap();
            if check.is_complete() {
                check.next_tree().unwrap();
            }
        }
        lines.push(line(&message));
    }
    lines
}

const UNLIMITED: Limits = Limits { entries: u64::MAX, bytes: u64::MAX };

fn line(message: &FromGuest<'_>) -> String {
    match message {
        FromGuest::Missing { below_working_dir: false } => "missing".to_owned(),
        FromGuest::Missing { below_working_dir: true } => "missing, but below the working directory".to_owned(),
        FromGuest::Finished => "finished".to_owned(),
        FromGuest::Unsupported { path, kind } => format!("unsupported {} {kind:?}", path.escape_ascii()),
        FromGuest::Tree(Event::Directory { name }) => format!("directory {}", name.escape_ascii()),
        FromGuest::Tree(Event::File { name, executable }) => {
            format!("{} {}", if *executable { "program" } else { "file" }, name.escape_ascii())
        }
        FromGuest::Tree(Event::Data(bytes)) if bytes.len() > 16 => format!("data of {}", bytes.len()),
        FromGuest::Tree(Event::Data(bytes)) => format!("data {}", bytes.escape_ascii()),
        FromGuest::Tree(Event::End) => "end".to_owned(),
        FromGuest::Tree(Event::Symlink { name, target }) => {
            format!("symlink {} {}", name.escape_ascii(), target.escape_ascii())
        }
        other => panic!("{other:?}"),
    }
}

fn root() -> (TempDir, PathBuf) {
    let root = TempDir::new().unwrap();
    let path = root.path().to_path_buf();
    (root, path)
}

#[test]
fn a_tree_is_sent_depth_first_in_the_order_of_its_bytes() {
    let (_root, path) = root();
    create_dir_all(path.join("out/a/empty")).unwrap();
    fs::write(path.join("out/a.b"), "1").unwrap();
    fs::write(path.join("out").join(OsString::from_vec(b"\xff".to_vec())), "").unwrap();
    fs::write(path.join("out/B"), "2").unwrap();
    fs::set_permissions(path.join("out/B"), Permissions::from_mode(0o700)).unwrap();
    symlink("/nowhere", path.join("out/a/link")).unwrap();
    let expected = [
        "directory ",
        "program B",
        "data 2",
        "end",
        "directory a",
        "directory empty",
        "end",
        "symlink link /nowhere",
        "end",
        "file a.b",
        "data 1",
        "end",
        "file \\xff",
        "end",
        "end",
        "finished",
    ];
    assert_eq!(sent(&path, &["out"]), expected);
}

#[test]
fn outputs_are_sent_in_order_and_missing_ones_are_reported() {
    let (_root, path) = root();
    fs::write(path.join("b"), "b").unwrap();
    symlink("b", path.join("a")).unwrap();
    let expected = ["file ", "data b", "end", "missing", "symlink  b", "missing", "finished"];
    assert_eq!(sent(&path, &["b", "nothing", "a", "b/below"]), expected);
}

#[test]
fn only_the_owners_execute_bit_counts() {
    let (_root, path) = root();
    for (mode, expected) in [(0o677, "file "), (0o100, "program ")] {
        fs::write(path.join("x"), "").unwrap();
        fs::set_permissions(path.join("x"), Permissions::from_mode(mode | 0o400)).unwrap();
        assert_eq!(sent(&path, &["x"])[0], expected);
        fs::remove_file(path.join("x")).unwrap();
    }
}

#[test]
fn parents_that_are_symlinks_stay_within_the_root() {
    let (_root, path) = root();
    create_dir(path.join("real")).unwrap();
    fs::write(path.join("real/file"), "x").unwrap();
    symlink("/real", path.join("absolute")).unwrap();
    symlink("../../../..", path.join("up")).unwrap();
    symlink("/proc/self/root", path.join("magic")).unwrap();
    symlink("loop", path.join("loop")).unwrap();
    for output in ["absolute/file", "up/real/file", "up/up/absolute/file"] {
        assert_eq!(sent(&path, &[output])[0], "file ", "{output}");
    }
    for output in ["up/etc/passwd", "magic/etc/passwd", "loop/file"] {
        assert_eq!(sent(&path, &[output]), ["missing", "finished"], "{output}");
    }
}

#[test]
fn large_files_are_sent_in_several_frames() {
    let (_root, path) = root();
    fs::write(path.join("large"), vec![7; MAX_DATA_BYTES + 100]).unwrap();
    let expected = ["file ", &format!("data of {MAX_DATA_BYTES}"), "data of 100", "end", "finished"];
    assert_eq!(sent(&path, &["large"]), expected);
}

#[test]
fn an_unsupported_file_ends_the_outputs() {
    let (_root, path) = root();
    create_dir_all(path.join("out/d")).unwrap();
    fs::write(path.join("out/a"), "").unwrap();
    mkfifo(&path.join("out/d/pipe"), Mode::S_IRWXU).unwrap();
    let sent_lines = sent(&path, &["out", "never"]);
    assert_eq!(sent_lines.last().unwrap(), "unsupported d/pipe Fifo");
    assert_eq!(sent(&path, &["out/d/pipe"]), ["unsupported  Fifo"]);
    mknod(&path.join("socket"), SFlag::S_IFSOCK, Mode::S_IRWXU, 0).unwrap();
    assert_eq!(sent(&path, &["socket"]), ["unsupported  Socket"]);
}

#[test]
fn depth_is_limited_as_on_the_host() {
    for (depth, last) in [(MAX_DEPTH, "finished".to_owned()), (MAX_DEPTH + 1, too_deep())] {
        let (_root, path) = root();
        let out: PathBuf = std::iter::repeat_n("d", depth).collect();
        create_dir_all(path.join(out)).unwrap();
        assert_eq!(*sent(&path, &["d"]).last().unwrap(), last);
    }
}

fn too_deep() -> String {
    format!("unsupported {} TooDeep", vec!["d"; MAX_DEPTH].join("/"))
}

#[test]
fn many_names_in_one_directory_are_sorted() {
    let (_root, path) = root();
    create_dir(path.join("out")).unwrap();
    for n in 0..2000 {
        fs::write(path.join(format!("out/{n}")), "").unwrap();
    }
    // `Check` refuses any other order.
    assert_eq!(sent(&path, &["out"]).len(), 2 * 2000 + 3);
}

#[test]
fn remains_have_the_builds_layout_without_unsupported_files() {
    // Whiteouts can't be made on an overlay, which /tmp is in a container.
    let root = TempDir::new_in("/dev/shm").unwrap();
    let path = root.path();
    create_dir_all(path.join("root/a/store")).unwrap();
    create_dir_all(path.join("root/b/c")).unwrap();
    for (front, file) in [("0", "outer"), ("1", "inner"), ("2", "deep")] {
        create_dir(path.join(front)).unwrap();
        fs::write(path.join(front).join(file), file).unwrap();
    }
    create_dir(path.join("0/store")).unwrap();
    fs::write(path.join("0/store/hidden by a mount"), "").unwrap();
    mkfifo(&path.join("2/a-pipe"), Mode::S_IRWXU).unwrap();
    mknod(&path.join("2/removed"), SFlag::S_IFCHR, Mode::S_IRWXU, 0).unwrap();
    let [outer, inner, deep] = ["0", "1", "2"].map(|front| path.join(front));
    let writable = [("a", outer.as_path()), ("a/store", &inner), ("b/c", &deep)];
    let expected = [
        "directory ",
        "directory a",
        "file outer",
        "data outer",
        "end",
        "directory store",
        "file inner",
        "data inner",
        "end",
        "end",
        "end",
        "directory b",
        "directory c",
        "file deep",
        "data deep",
        "end",
        "end",
        "end",
        "end",
        "1 skipped",
    ];
    assert_eq!(kept(&path.join("root"), &writable, UNLIMITED), expected);
}

#[test]
fn kept_files_stay_within_the_limits() {
    let (_root, path) = root();
    create_dir(path.join("d")).unwrap();
    for (name, contents) in [("a", "1234"), ("b", "123456"), ("c", "12")] {
        fs::write(path.join(name), contents).unwrap();
    }
    let skipped = |entries, bytes| kept(&path, &[], Limits { entries, bytes }).pop().unwrap();
    assert_eq!(skipped(5, 12), "0 skipped");
    assert_eq!(skipped(5, 6), "1 skipped");
    assert_eq!(skipped(3, 12), "2 skipped");
    assert_eq!(kept(&path, &[], Limits { entries: 0, bytes: 0 }), ["0 skipped"]);
}

#[test]
fn a_writable_root_is_kept_whole() {
    let (_root, path) = root();
    create_dir(path.join("front")).unwrap();
    symlink("t", path.join("front/link")).unwrap();
    let expected = ["directory ", "symlink link t", "end", "0 skipped"];
    assert_eq!(kept(&path, &[("", &path.join("front"))], UNLIMITED), expected);
}
