//! The file system as a guest's kernel asks it, and as a hostile one does.

use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::thread;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, readlinkat};
use nix::sys::socket::{MsgFlags, send};
use nix::sys::stat::fstatat;
use seccompiler::apply_filter;
use serde_bytes::ByteBuf;
use tempfile::TempDir;
use virtiofsd::filesystem::{Context, DirectoryIterator as _, Entry, FileSystem as _, ZeroCopyWriter};
use virtiofsd::oslib::ReadvFlags;

use super::Shown;
use super::fs::PathsFs;
use super::opener::{self, OpenerError};
use super::serve::LISTING;
use super::testing::{pair, paths_fs};
use super::wire::{self, Answer, NoRequest, Request, Want};
use crate::devices::syscalls::filter;

const ROOT: u64 = 1;

struct Buffer(Vec<u8>);

impl ZeroCopyWriter for &mut Buffer {
    fn read_from_file_at(&mut self, f: &File, count: usize, off: u64, _: Option<ReadvFlags>) -> io::Result<usize> {
        let mut bytes = vec![0; count];
        let length = f.read_at(&mut bytes, off)?;
        self.0.extend_from_slice(&bytes[..length]);
        Ok(length)
    }
}

fn context() -> Context {
    Context { uid: 1000.into(), gid: 100.into(), pid: 1 }
}

fn lookup(fs: &PathsFs, path: &str) -> io::Result<Entry> {
    let mut at = ROOT;
    let mut entry = Err(io::ErrorKind::InvalidInput.into());
    for name in path.split('/') {
        let found = fs.lookup(context(), at, &CString::new(name).unwrap())?;
        at = found.inode;
        entry = Ok(found);
    }
    entry
}

fn read(fs: &PathsFs, path: &str) -> io::Result<String> {
    let inode = lookup(fs, path)?.inode;
    let (handle, _) = fs.open(context(), inode, false, 0)?;
    let mut buffer = Buffer(Vec::new());
    fs.read(context(), inode, handle.unwrap(), &mut buffer, 1 << 20, 0, None, 0)?;
    fs.release(context(), inode, 0, handle.unwrap(), false, false, None)?;
    Ok(String::from_utf8(buffer.0).unwrap())
}

fn list(fs: &PathsFs, path: &str) -> io::Result<Vec<String>> {
    let inode = lookup(fs, path)?.inode;
    let handle = fs.opendir(context(), inode, 0)?.0.unwrap();
    let (mut names, mut offset) = (Vec::new(), 0);
    loop {
        let mut entries = fs.readdir(context(), inode, handle, 256, offset)?;
        let before = names.len();
        while let Some(entry) = entries.next() {
            offset = entry.offset;
            names.push(entry.name.to_str().unwrap().to_owned());
        }
        if names.len() == before {
            break;
        }
    }
    fs.releasedir(context(), inode, 0, handle)?;
    names.retain(|name| name != "." && name != "..");
    names.sort();
    Ok(names)
}

fn errno<T>(result: io::Result<T>) -> i32 {
    result.err().unwrap().raw_os_error().unwrap()
}

/// `shown` with files of all kinds, and `secret` beside it.
fn some_fs() -> (TempDir, PathsFs) {
    let dir = TempDir::new().unwrap();
    let at = |path: &str| dir.path().join(path);
    fs::create_dir_all(at("shown/sub/deep")).unwrap();
    fs::create_dir(at("shown/closed")).unwrap();
    fs::write(at("shown/sub/file"), "in a directory").unwrap();
    fs::write(at("shown/private"), "for its owner").unwrap();
    fs::write(at("shown/closed/file"), "in a closed directory").unwrap();
    fs::write(at("single"), "a file alone").unwrap();
    fs::write(at("secret"), "secret").unwrap();
    fs::set_permissions(at("shown/private"), Permissions::from_mode(0o640)).unwrap();
    fs::set_permissions(at("shown/closed"), Permissions::from_mode(0o750)).unwrap();
    symlink("sub", at("shown/to-sub")).unwrap();
    symlink("../secret", at("shown/out")).unwrap();
    symlink(at("secret"), at("shown/absolute")).unwrap();
    nix::unistd::mkfifo(&at("shown/pipe"), nix::sys::stat::Mode::from_bits_truncate(0o666)).unwrap();
    let open = |path: &str| Shown::open(&at(path)).unwrap().file;
    let fs = paths_fs(vec![open("shown"), open("single")]);
    (dir, fs)
}

#[test]
fn existing_files_are_shown_read_only() {
    let (_dir, fs) = some_fs();
    assert_eq!(read(&fs, "0/sub/file").unwrap(), "in a directory");
    assert_eq!(read(&fs, "1").unwrap(), "a file alone");
    assert_eq!(list(&fs, "0/sub").unwrap(), ["deep", "file"]);
    assert_eq!(list(&fs, "0").unwrap().len(), 7);
    let file = lookup(&fs, "0/sub/file").unwrap();
    assert_eq!((file.attr.mode, file.attr.size), (libc::S_IFREG | 0o444, 14));
    assert_eq!(fs.getattr(context(), file.inode, None).unwrap().0.ino, file.inode);
    let inode = lookup(&fs, "0/out").unwrap().inode;
    assert_eq!(fs.readlink(context(), inode).unwrap(), b"../secret");
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_TRUNC] {
        assert_eq!(errno(fs.open(context(), file.inode, false, flags.cast_unsigned())), libc::EROFS);
    }
    for number in ["2", "x", "", "-1", "18446744073709551616"] {
        assert_eq!(errno(lookup(&fs, number)), libc::ENOENT, "{number}");
    }
    assert_eq!(errno(lookup(&fs, "0/none")), libc::ENOENT);
    assert_eq!(errno(lookup(&fs, "1/below-a-file")), libc::ENOTDIR);
    assert_eq!(errno(fs.opendir(context(), ROOT, 0)), libc::EACCES);
}

#[test]
fn what_not_everybody_may_read_is_not_shown() {
    let (_dir, fs) = some_fs();
    assert_eq!(errno(read(&fs, "0/private")), libc::EACCES);
    assert_eq!(errno(lookup(&fs, "0/closed/file")), libc::EACCES);
    assert_eq!(errno(list(&fs, "0/closed")), libc::EACCES);
    assert_eq!(errno(lookup(&fs, "0/pipe")), libc::EACCES);
}

#[test]
fn a_hostile_kernel_gets_nowhere_else() {
    let (dir, fs) = some_fs();
    let shown = lookup(&fs, "0").unwrap().inode;
    let sub = lookup(&fs, "0/sub").unwrap().inode;
    let secret = dir.path().join("secret");
    let names = ["..", ".", "", "../secret", "sub/../../secret", "sub/file", "/", secret.to_str().unwrap()];
    for name in names.map(|name| CString::new(name).unwrap()) {
        for parent in [shown, sub] {
            assert_eq!(errno(fs.lookup(context(), parent, &name)), libc::EINVAL, "{name:?}");
        }
    }
    // Symlinks are the guest's to follow.
    for name in ["0/out", "0/absolute"] {
        let link = lookup(&fs, name).unwrap();
        assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
        assert!(fs.open(context(), link.inode, false, 0).is_err());
    }
    let link = lookup(&fs, "0/to-sub").unwrap().inode;
    assert_eq!(errno(fs.lookup(context(), link, c"file")), libc::ELOOP);
    // Numbers that it was never told.
    for inode in [0, 99, u64::MAX] {
        assert_eq!(errno(fs.getattr(context(), inode, None)), libc::ESTALE);
        assert_eq!(errno(fs.lookup(context(), inode, c"x")), libc::ESTALE);
        assert_eq!(errno(fs.read(context(), shown, inode, &mut Buffer(Vec::new()), 1, 0, None, 0)), libc::EBADF);
    }
}

#[test]
fn what_the_host_puts_in_a_places_stead_leads_nowhere_else() {
    let (dir, fs) = some_fs();
    let (sub, file) = (lookup(&fs, "0/sub").unwrap().inode, lookup(&fs, "0/sub/file").unwrap().inode);
    fs::create_dir(dir.path().join("elsewhere")).unwrap();
    fs::write(dir.path().join("elsewhere/file"), "secret").unwrap();
    fs::rename(dir.path().join("shown/sub"), dir.path().join("shown/was-sub")).unwrap();
    symlink("../elsewhere", dir.path().join("shown/sub")).unwrap();
    assert_eq!(errno(fs.open(context(), file, false, 0)), libc::ELOOP);
    assert_eq!(errno(fs.lookup(context(), sub, c"file")), libc::ELOOP);
    assert_eq!(errno(fs.opendir(context(), sub, 0)), libc::ENOTDIR);
}

#[test]
fn mounts_below_are_not_shown() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    let (dir, fs) = some_fs();
    let deep = dir.path().join("shown/sub/deep");
    mount(Some("other"), &deep, Some("tmpfs"), MsFlags::empty(), Some("size=64k")).expect("this needs root");
    let found = lookup(&fs, "0/sub/deep").map(|_| ());
    umount2(&deep, MntFlags::MNT_DETACH).unwrap();
    assert_eq!(errno(found), libc::EXDEV);
    lookup(&fs, "0/sub/deep").unwrap();
}

#[test]
fn no_offset_is_too_far() {
    let (_dir, fs) = some_fs();
    let inode = lookup(&fs, "0/sub/file").unwrap().inode;
    let handle = fs.open(context(), inode, false, 0).unwrap().0.unwrap();
    let read = |offset| fs.read(context(), inode, handle, &mut Buffer(Vec::new()), 10, offset, None, 0);
    assert_eq!(read(1 << 40).unwrap(), 0);
    for offset in [1 << 63, u64::MAX] {
        assert_eq!(errno(read(offset)), libc::EINVAL);
    }
}

#[test]
fn forgotten_inodes_take_no_memory() {
    let (_dir, fs) = some_fs();
    for _ in 0..3 {
        let first = lookup(&fs, "1").unwrap().inode;
        assert_eq!(lookup(&fs, "1").unwrap().inode, first);
        fs.forget(context(), first, 1);
        fs.getattr(context(), first, None).unwrap();
        fs.forget(context(), first, 1);
        assert_eq!(errno(fs.getattr(context(), first, None)), libc::ESTALE);
        fs.forget(context(), first, u64::MAX);
    }
}

#[test]
fn only_files_and_directories_can_be_shown() {
    let (dir, _) = some_fs();
    for path in [Path::new("/dev/null"), &dir.path().join("shown/pipe"), Path::new("/nonexistent")] {
        assert!(Shown::open(path).is_err(), "{path:?}");
    }
    assert!(Shown::open(dir.path()).unwrap().is_directory());
    assert!(!Shown::open(&dir.path().join("single")).unwrap().is_directory());
}

/// A device that has been taken over can ask its opener for anything.
#[test]
fn a_hostile_device_has_nothing_else_opened() {
    let (dir, _) = some_fs();
    let (device, theirs) = pair();
    let shown = ["shown", "single", "shown/private"].map(|path| File::open(dir.path().join(path)).unwrap());
    let opener = thread::spawn(move || opener::serve(&theirs, &shown));
    let ask = |root, path: &str, want| wire::ask(&device, &Request { root, path: ByteBuf::from(path), want });
    let secret = dir.path().join("secret");
    let paths =
        ["..", "../secret", "sub/../../secret", "/", "/etc/passwd", secret.to_str().unwrap(), "absolute/x", "out/x"];
    for path in paths {
        for want in [Want::Attributes, Want::Target, Want::File, Want::Directory] {
            assert!([libc::EXDEV, libc::ELOOP, libc::ENOENT].contains(&errno(ask(0, path, want))), "{path:?}");
            assert_eq!(errno(ask(1, path, want)), libc::ENOTDIR, "{path:?}");
            assert_eq!(errno(ask(3, path, want)), libc::ENOENT);
            assert_eq!(errno(ask(u32::MAX, path, want)), libc::ENOENT);
        }
    }
    for want in [Want::File, Want::Directory] {
        assert_eq!(errno(ask(0, "to-sub/file", want)), libc::ELOOP);
        for link in ["out", "absolute", "to-sub"] {
            assert!([libc::EISDIR, libc::ENOTDIR].contains(&errno(ask(0, link, want))), "{link}");
        }
    }
    // This process may read them all, so that nothing but the opener's own rules keeps them.
    for (path, want) in [("private", Want::File), ("closed", Want::Directory), ("closed/file", Want::File)] {
        assert!(File::open(dir.path().join("shown").join(path)).is_ok());
        assert_eq!(errno(ask(0, path, want)), libc::EACCES, "{path}");
    }
    assert_eq!(errno(ask(0, "closed/file", Want::Attributes)), libc::EACCES);
    assert_eq!(errno(ask(2, "", Want::File)), libc::EACCES);
    for want in [Want::File, Want::Directory, Want::Attributes] {
        assert!(ask(0, "pipe", want).is_err(), "{want:?}");
    }
    assert_eq!(errno(ask(0, &"x".repeat(5000), Want::Attributes)), libc::ENAMETOOLONG);
    assert_eq!(errno(ask(0, "sub/fi\0le", Want::Attributes)), libc::EINVAL);
    let opened = |(answer, file): (Answer, Option<OwnedFd>)| {
        assert_eq!(answer, Answer::Opened);
        File::from(file.unwrap())
    };
    let file = opened(ask(0, "sub/file", Want::File).unwrap());
    assert!(io::Write::write(&mut &file, b"x").is_err(), "the descriptor must be read-only");
    assert_eq!(io::read_to_string(file).unwrap(), "in a directory");
    assert_eq!(io::read_to_string(opened(ask(1, "", Want::File).unwrap())).unwrap(), "a file alone");
    send(device.as_raw_fd(), &[255; 9], MsgFlags::empty()).unwrap();
    assert!(matches!(opener.join().unwrap(), Err(OpenerError::Protocol(NoRequest { length: 9 }))));
    assert_eq!(errno(ask(0, "", Want::Attributes)), libc::EIO);
}

#[test]
fn the_longest_target_of_a_symlink_arrives() {
    let (dir, fs) = some_fs();
    let target = "x".repeat(libc::PATH_MAX as usize - 1);
    symlink(&target, dir.path().join("shown/long")).unwrap();
    let inode = lookup(&fs, "0/long").unwrap().inode;
    assert_eq!(fs.readlink(context(), inode).unwrap(), target.as_bytes());
}

/// A listed directory is on the host, beside everything else. In a thread of its own, which is all that this filter covers.
#[test]
fn a_hostile_device_finds_nothing_from_a_directory_that_it_lists() {
    let (dir, _) = some_fs();
    let shown = File::open(dir.path().join("shown")).unwrap();
    let look = move || {
        let status = fstatat(&shown, "../secret", AtFlags::empty()).map(drop);
        [status, readlinkat(&shown, "../shown/out").map(drop)]
    };
    assert_eq!(look(), [Ok(()), Ok(())]);
    thread::spawn(move || {
        apply_filter(&filter(LISTING).unwrap()).unwrap();
        assert_eq!(look(), [Err(Errno::EPERM), Err(Errno::EPERM)]);
    })
    .join()
    .unwrap();
}

/// In a thread of its own, since what it gives up is the thread's.
#[test]
fn a_hostile_device_reads_only_the_shown_paths() {
    let (dir, _) = some_fs();
    let shown = File::open(dir.path().join("shown")).unwrap();
    std::thread::spawn(move || {
        crate::machine::jail::confine_to_reading(&[shown]).unwrap();
        assert!(fs::read(dir.path().join("shown/sub/file")).is_ok());
        assert!(fs::read_dir(dir.path().join("shown")).is_ok());
        assert!(File::options().write(true).open(dir.path().join("shown/sub/file")).is_err());
        assert!(fs::write(dir.path().join("shown/new"), "").is_err());
        assert!(fs::remove_file(dir.path().join("shown/sub/file")).is_err());
        assert!(fs::read(dir.path().join("secret")).is_err());
        assert!(fs::read(dir.path().join("shown/out")).is_err());
        assert!(fs::read("/etc/passwd").is_err() && fs::read_dir("/").is_err());
        std::mem::forget(dir);
    })
    .join()
    .unwrap();
}
