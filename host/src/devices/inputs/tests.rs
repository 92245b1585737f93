//! The file system as the guest's kernel asks it, over a connection to a real server.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use cofferdam_castore::{Node, Store};
use virtiofsd::filesystem::{
    Context, DirectoryIterator as _, Entry, Extensions, FileSystem as _, FsOptions, ListxattrReply, SetattrValid,
    SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::SetattrIn;
use virtiofsd::oslib::{ReadvFlags, WritevFlags};

use super::blobs::MAX_OPEN;
use super::fs::InputsFs;
use super::resolve::{NIX_TIME, TIME};
use super::testing::{directory, executable, file, serve, serve_writable, symlink};

const ROOT: u64 = 1;

fn context() -> Context {
    Context { uid: 1000.into(), gid: 100.into(), pid: 1 }
}

/// Guest memory of some size.
struct Buffer {
    room: usize,
    bytes: Vec<u8>,
}

impl ZeroCopyWriter for &mut Buffer {
    fn read_from_file_at(&mut self, f: &File, count: usize, off: u64, _: Option<ReadvFlags>) -> io::Result<usize> {
        let mut bytes = vec![0; count.min(self.room)];
        let length = f.read_at(&mut bytes, off)?;
        self.bytes.extend_from_slice(&bytes[..length]);
        Ok(length)
    }
}

struct Nothing;

impl ZeroCopyReader for Nothing {
    fn write_to_file_at(&mut self, _: &File, _: usize, _: u64, _: Option<WritevFlags>) -> io::Result<usize> {
        unreachable!("nothing is ever written")
    }
}

fn lookup(fs: &InputsFs, path: &str) -> Entry {
    let names = path.split('/').map(|name| CString::new(name).unwrap());
    let mut at = fs.lookup(context(), ROOT, c".none").unwrap();
    at.inode = ROOT;
    names.fold(at, |at, name| fs.lookup(context(), at.inode, &name).unwrap())
}

fn read(fs: &InputsFs, inode: u64, size: u32, offset: u64) -> io::Result<Vec<u8>> {
    let mut buffer = Buffer { room: 1 << 20, bytes: Vec::new() };
    let length = fs.read(context(), inode, 0, &mut buffer, size, offset, None, 0)?;
    assert_eq!(length, buffer.bytes.len());
    Ok(buffer.bytes)
}

fn list(fs: &InputsFs, inode: u64, offset: u64) -> Vec<(CString, u64, u64)> {
    let mut entries = fs.readdir(context(), inode, 0, 4096, offset).unwrap();
    let mut found = Vec::new();
    while let Some(entry) = entries.next() {
        found.push((entry.name.to_owned(), entry.ino, entry.offset));
    }
    found
}

fn errno<T>(result: io::Result<T>) -> i32 {
    result.err().unwrap().raw_os_error().unwrap()
}

/// `bin/cc` executable, `bin/ld` a link to it, `lib/a/x` and `lib/b/x` in one directory that is at two places.
async fn some_fs() -> InputsFs {
    let store = Store::memory();
    let cc = executable(file(&store, b"#!/bin/sh\n").await);
    let shared = directory(&store, &[("x", file(&store, b"same").await), ("y", symlink("x"))]).await;
    let bin = directory(&store, &[("cc", cc), ("ld", symlink("cc"))]).await;
    let lib = directory(&store, &[("a", shared.clone()), ("b", shared)]).await;
    let empty = directory(&store, &[]).await;
    let entries =
        [("bin", bin), ("empty", empty), ("lib", lib), ("nothing", file(&store, b"").await), ("to", symlink("lib/a"))];
    let (host, _) = serve(&store, &entries).await;
    InputsFs::new(host)
}

#[tokio::test]
async fn what_has_a_writable_copy_is_the_builds() {
    let store = Store::memory();
    let program = executable(file(&store, b"x").await);
    let shared = directory(&store, &[("program", program), ("text", file(&store, b"y").await)]).await;
    let tree = directory(&store, &[("copied", shared.clone()), ("other", shared.clone())]).await;
    let entries = [("link", symlink("tree")), ("tree", tree), ("whole", shared)];
    let (host, _) = serve_writable(&store, &entries, &["link/other", "tree/copied", "tree/missing", "whole"]).await;
    let fs = InputsFs::new(host);
    for (path, mode, is_writable) in [
        ("tree", 0o555, false),
        ("tree/copied", 0o755, true),
        ("tree/copied/program", 0o755, true),
        ("tree/copied/text", 0o644, true),
        ("tree/other", 0o555, false),
        ("tree/other/program", 0o555, false),
        ("whole", 0o755, true),
        ("whole/text", 0o644, true),
    ] {
        let attr = lookup(&fs, path).attr;
        let owner = if is_writable { (1000.into(), 100.into()) } else { (0.into(), 0.into()) };
        let time = if is_writable { TIME } else { NIX_TIME };
        assert_eq!((attr.mode & 0o7777, (attr.uid, attr.gid), attr.mtime), (mode, owner, time), "{path}");
    }
}

#[tokio::test]
async fn attributes_are_those_of_castore_and_hold_for_ever() {
    let fs = some_fs().await;
    for (path, mode, size) in [
        ("bin", libc::S_IFDIR | 0o555, 4),
        ("bin/cc", libc::S_IFREG | 0o555, 10),
        ("bin/ld", libc::S_IFLNK | 0o777, 2),
        ("lib", libc::S_IFDIR | 0o555, 12),
        ("lib/a/x", libc::S_IFREG | 0o444, 4),
        ("nothing", libc::S_IFREG | 0o444, 0),
    ] {
        let entry = lookup(&fs, path);
        let (attr, valid) = fs.getattr(context(), entry.inode, None).unwrap();
        for attr in [entry.attr, attr] {
            assert_eq!((attr.mode, attr.size, attr.ino), (mode, size, entry.inode), "{path}");
            assert_eq!((attr.mtime, attr.ctime, attr.atime, attr.mtimensec), (1, 1, 1, 0), "{path}");
            assert_eq!((attr.uid, attr.gid, attr.nlink), (0.into(), 0.into(), 1), "{path}");
        }
        assert!(valid.as_secs() > 1 << 30 && entry.attr_timeout == valid && entry.entry_timeout == valid);
    }
}

#[tokio::test]
async fn a_missing_name_is_remembered_for_ever_too() {
    let fs = some_fs().await;
    let entry = fs.lookup(context(), ROOT, c"missing").unwrap();
    assert_eq!(entry.inode, 0);
    assert!(entry.entry_timeout.as_secs() > 1 << 30);
}

#[tokio::test]
async fn equal_directories_at_two_paths_have_different_inodes() {
    let fs = some_fs().await;
    let paths = ["bin", "bin/cc", "bin/ld", "empty", "lib", "lib/a", "lib/a/x", "lib/a/y", "lib/b", "lib/b/x", "to"];
    let inodes: BTreeSet<u64> = paths.iter().map(|path| lookup(&fs, path).inode).collect();
    assert_eq!(inodes.len(), paths.len());
    assert_eq!(read(&fs, lookup(&fs, "lib/a/x").inode, 10, 0).unwrap(), b"same");
    assert_eq!(read(&fs, lookup(&fs, "lib/b/x").inode, 10, 0).unwrap(), b"same");
}

#[tokio::test]
async fn listings_have_dots_and_entries_from_any_offset() {
    let fs = some_fs().await;
    let lib = lookup(&fs, "lib").inode;
    let (a, b) = (lookup(&fs, "lib/a").inode, lookup(&fs, "lib/b").inode);
    let all = list(&fs, lib, 0);
    let numbers = [(c".", lib), (c"..", ROOT), (c"a", a), (c"b", b)];
    assert_eq!(all.iter().map(|(name, inode, _)| (name.as_c_str(), *inode)).collect::<Vec<_>>(), numbers);
    for (index, (_, _, offset)) in all.iter().enumerate() {
        assert_eq!(list(&fs, lib, *offset), all[index + 1..]);
    }
    assert_eq!(list(&fs, b, 0)[1], (c"..".into(), lib, 2));
    assert_eq!(list(&fs, ROOT, 0)[1], (c"..".into(), ROOT, 2));
    assert!(list(&fs, lib, u64::MAX).is_empty());
    assert_eq!(errno(fs.readdir(context(), lookup(&fs, "bin/cc").inode, 0, 4096, 0).map(drop)), libc::ENOTDIR);
}

#[tokio::test]
async fn symlinks_read_as_stored() {
    let fs = some_fs().await;
    assert_eq!(fs.readlink(context(), lookup(&fs, "to").inode).unwrap(), b"lib/a");
    assert_eq!(errno(fs.readlink(context(), lookup(&fs, "bin/cc").inode)), libc::EINVAL);
    assert_eq!(errno(fs.readlink(context(), ROOT)), libc::EINVAL);
}

#[tokio::test]
async fn reads_end_at_the_end_of_the_file() {
    let fs = some_fs().await;
    let cc = lookup(&fs, "bin/cc").inode;
    assert_eq!(read(&fs, cc, u32::MAX, 0).unwrap(), b"#!/bin/sh\n");
    assert_eq!(read(&fs, cc, 3, 2).unwrap(), b"/bi");
    for (size, offset) in [(1, 10), (1, 11), (0, 0), (1, u64::MAX), (u32::MAX, i64::MAX.unsigned_abs())] {
        assert_eq!(read(&fs, cc, size, offset).unwrap(), b"", "{size} at {offset}");
    }
    assert_eq!(read(&fs, lookup(&fs, "nothing").inode, 10, 0).unwrap(), b"");
    assert_eq!(errno(read(&fs, lookup(&fs, "bin").inode, 1, 0)), libc::EISDIR);
    assert_eq!(errno(read(&fs, ROOT, 1, 0)), libc::EISDIR);
}

#[tokio::test]
async fn numbers_that_are_no_inode_are_refused() {
    let fs = some_fs().await;
    for inode in [0, 5, 6, 23, 24, u64::MAX, u64::MAX - 1, 1 << 63] {
        assert_eq!(errno(fs.getattr(context(), inode, None)), libc::ENOENT, "{inode}");
        assert_eq!(errno(fs.lookup(context(), inode, c"a").map(drop)), libc::ENOENT);
        assert_eq!(errno(fs.readdir(context(), inode, 0, 1, 0).map(drop)), libc::ENOENT);
        assert_eq!(errno(fs.readlink(context(), inode)), libc::ENOENT);
        assert_eq!(errno(read(&fs, inode, 1, 0)), libc::ENOENT);
        fs.forget(context(), inode, u64::MAX);
    }
    let long = CString::new(vec![b'n'; 70_000]).unwrap();
    for name in [c"", c".", c"..", c"a/x", &long] {
        assert_eq!(fs.lookup(context(), lookup(&fs, "lib").inode, name).unwrap().inode, 0);
    }
    assert_eq!(errno(fs.lookup(context(), lookup(&fs, "bin/cc").inode, c"a").map(drop)), libc::ENOTDIR);
}

#[tokio::test]
async fn the_guest_opens_without_asking_and_finds_no_extended_attributes() {
    let fs = some_fs().await;
    let cc = lookup(&fs, "bin/cc").inode;
    let flags = |flags: i32| flags.cast_unsigned();
    assert_eq!(errno(fs.open(context(), cc, false, flags(libc::O_RDONLY | libc::O_NOFOLLOW))), libc::ENOSYS);
    assert_eq!(errno(fs.opendir(context(), ROOT, 0)), libc::ENOSYS);
    assert_eq!(errno(fs.getxattr(context(), cc, c"user.a", 0).map(drop)), libc::ENOSYS);
    assert!(matches!(fs.listxattr(context(), cc, 0), Ok(ListxattrReply::Count(0))));
    assert!(matches!(fs.listxattr(context(), cc, 9), Ok(ListxattrReply::Names(names)) if names.is_empty()));
    let wanted = fs.init(FsOptions::all()).unwrap();
    assert!(
        wanted.contains(FsOptions::ZERO_MESSAGE_OPEN | FsOptions::ZERO_MESSAGE_OPENDIR | FsOptions::DO_READDIRPLUS)
    );
    assert!(!wanted.intersects(FsOptions::WRITEBACK_CACHE | FsOptions::POSIX_LOCKS | FsOptions::FLOCK_LOCKS));
}

#[tokio::test]
async fn every_change_is_refused_as_on_a_read_only_file_system() {
    let fs = some_fs().await;
    let cc = lookup(&fs, "bin/cc").inode;
    let none = Extensions::default;
    let set = SetattrValid::MODE;
    let name: &CStr = c"new";
    let answers = [
        errno(fs.open(context(), cc, false, libc::O_WRONLY.cast_unsigned())),
        errno(fs.open(context(), cc, false, libc::O_RDWR.cast_unsigned())),
        errno(fs.open(context(), cc, false, libc::O_TRUNC.cast_unsigned())),
        errno(fs.create(context(), ROOT, name, 0o644, false, 0, 0, none()).map(drop)),
        errno(fs.mknod(context(), ROOT, name, 0o644, 0, 0, none()).map(drop)),
        errno(fs.mkdir(context(), ROOT, name, 0o755, 0, none()).map(drop)),
        errno(fs.symlink(context(), c"target", ROOT, name, none()).map(drop)),
        errno(fs.link(context(), cc, ROOT, name).map(drop)),
        errno(fs.unlink(context(), ROOT, c"to")),
        errno(fs.rmdir(context(), ROOT, c"empty")),
        errno(fs.rename(context(), ROOT, c"to", ROOT, name, 0)),
        errno(fs.setattr(context(), cc, SetattrIn::default(), None, set)),
        errno(fs.write(context(), cc, 0, Nothing, 1, 0, None, false, false, 0)),
        errno(fs.fallocate(context(), cc, 0, 0, 0, 1)),
        errno(fs.copyfilerange(context(), cc, 0, 0, cc, 0, 0, 1, 0)),
        errno(fs.setxattr(context(), cc, c"user.a", b"v", 0, SetxattrFlags::empty())),
        errno(fs.removexattr(context(), cc, c"user.a")),
        errno(fs.access(context(), cc, libc::W_OK.cast_unsigned())),
        errno(fs.tmpfile().map(drop)),
    ];
    assert_eq!(answers, [libc::EROFS; 19]);
}

#[tokio::test]
async fn more_files_than_may_be_open_can_be_read_in_any_order() {
    let store = Store::memory();
    let count = MAX_OPEN + MAX_OPEN / 2;
    let mut files = Vec::new();
    for index in 0..count {
        files.push((format!("{index:04}"), file(&store, index.to_string().as_bytes()).await));
    }
    let entries: Vec<(&str, Node)> = files.iter().map(|(name, node)| (name.as_str(), node.clone())).collect();
    let (host, _) = serve(&store, &entries).await;
    let fs = InputsFs::new(host);
    for index in (0..count).chain((0..count).rev()).chain((0..count).map(|index| index * 89 % count)) {
        let inode = lookup(&fs, &format!("{index:04}")).inode;
        assert_eq!(read(&fs, inode, 10, 0).unwrap(), index.to_string().as_bytes());
        assert!(fs.open_blobs() <= MAX_OPEN);
    }
}

#[tokio::test]
async fn a_host_process_that_has_gone_is_an_input_output_error() {
    let store = Store::memory();
    let lib = directory(&store, &[("x", file(&store, b"x").await)]).await;
    let (host, server) = serve(&store, &[("f", file(&store, b"f").await), ("lib", lib)]).await;
    let fs = InputsFs::new(host.clone());
    let inode = lookup(&fs, "f").inode;
    // Asking for what isn't there makes the server close the connection.
    host.directory(&cofferdam_castore::B3Digest::of(b"foreign")).unwrap_err();
    let mut server = server;
    server.ended().await.unwrap_err();
    assert_eq!(errno(read(&fs, inode, 1, 0)), libc::EIO);
    assert_eq!(errno(fs.lookup(context(), lookup(&fs, "lib").inode, c"x").map(drop)), libc::EIO);
}
