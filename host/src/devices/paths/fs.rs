//! The FUSE file system: answers from the host's file system, beneath the shown paths; knows no change.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_bytes::ByteBuf;
use virtiofsd::filesystem::{Context, Entry, FileSystem, FsOptions, OpenOptions, ZeroCopyWriter};
use virtiofsd::fuse::{Attr, ROOT_ID};
use virtiofsd::read_dir::ReadDir;

use super::wire::{self, Answer, Attributes, Request, Want};

/// How long the guest may believe what it was told: what the host has there can change.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Most names that a guest can have looked up and not forgotten.
const MAX_INODES: usize = 1 << 20;

/// Most bytes of a directory that are read at once.
const MAX_LISTING_BYTES: usize = 64 * 1024;

/// The visible permissions: without write bits, setuid and setgid.
const SHOWN_MODE: u32 = libc::S_IFMT | 0o555;

/// The shown paths. The root has no listing; it holds them by their numbers, from 0 on.
pub(in crate::devices) struct PathsFs {
    /// The connection to the [opener](super::opener): one question, one answer.
    opener: Mutex<OwnedFd>,
    inodes: Mutex<Inodes>,
    open: Mutex<Open>,
}

/// Where an inode is: in which of the roots, and the path from there, which is empty for itself.
type Place = Arc<(u32, Vec<u8>)>;

#[derive(Default)]
struct Inodes {
    places: HashMap<u64, (Place, u64)>,
    numbers: HashMap<Place, u64>,
    latest: u64,
}

/// Open files and directories by their handles.
#[derive(Default)]
struct Open {
    files: HashMap<u64, Arc<File>>,
    latest: u64,
}

impl PathsFs {
    pub(in crate::devices) fn new(opener: OwnedFd) -> Self {
        let inodes = Mutex::new(Inodes { latest: ROOT_ID, ..Inodes::default() });
        Self { opener: Mutex::new(opener), inodes, open: Mutex::default() }
    }

    fn place(&self, inode: u64) -> io::Result<Place> {
        self.inodes.lock().places.get(&inode).map(|(place, _)| place.clone()).ok_or_else(|| errno(libc::ESTALE))
    }

    /// Asks the opener. Waits until there are paths to show.
    fn ask(&self, place: &Place, want: Want) -> io::Result<(Answer, Option<OwnedFd>)> {
        let (root, path) = &**place;
        wire::ask(&*self.opener.lock(), &Request { root: *root, path: ByteBuf::from(path.as_slice()), want })
    }

    fn look(&self, place: &Place) -> io::Result<Attributes> {
        match self.ask(place, Want::Attributes)? {
            (Answer::Attributes(attributes), _) => Ok(attributes),
            _ => Err(errno(libc::EIO)),
        }
    }

    /// Opens a file or a directory to read it.
    fn open_to_read(&self, inode: u64, want: Want) -> io::Result<(Option<u64>, OpenOptions)> {
        let (Answer::Opened, Some(file)) = self.ask(&self.place(inode)?, want)? else {
            return Err(errno(libc::EIO));
        };
        let mut open = self.open.lock();
        open.latest += 1;
        let handle = open.latest;
        open.files.insert(handle, Arc::new(file.into()));
        Ok((Some(handle), OpenOptions::empty()))
    }

    fn opened(&self, handle: u64) -> io::Result<Arc<File>> {
        self.open.lock().files.get(&handle).cloned().ok_or_else(|| errno(libc::EBADF))
    }

    fn close(&self, handle: u64) {
        self.open.lock().files.remove(&handle);
    }

    /// The place of a name in a directory.
    fn child(&self, parent: u64, name: &CStr) -> io::Result<Place> {
        let name = name.to_bytes();
        if parent == ROOT_ID {
            let number = str::from_utf8(name).ok().and_then(|name| name.parse().ok());
            return number.map(|number| Arc::new((number, Vec::new()))).ok_or_else(|| errno(libc::ENOENT));
        }
        // No guest's kernel asks for these.
        if matches!(name, b"" | b"." | b"..") || name.contains(&b'/') {
            return Err(errno(libc::EINVAL));
        }
        let parent = self.place(parent)?;
        let (root, path) = &*parent;
        Ok(Arc::new((*root, if path.is_empty() { name.to_vec() } else { [path.as_slice(), name].join(&b'/') })))
    }
}

impl Inodes {
    /// The number of a place, which the guest now knows once more.
    fn number(&mut self, place: Place) -> io::Result<u64> {
        if let Some(number) = self.numbers.get(&place).copied() {
            if let Some((_, lookups)) = self.places.get_mut(&number) {
                *lookups += 1;
            }
            return Ok(number);
        }
        if self.places.len() >= MAX_INODES {
            return Err(errno(libc::ENFILE));
        }
        self.latest += 1;
        self.numbers.insert(place.clone(), self.latest);
        self.places.insert(self.latest, (place, 1));
        Ok(self.latest)
    }

    fn forget(&mut self, number: u64, times: u64) {
        let Some((place, lookups)) = self.places.get_mut(&number) else { return };
        *lookups = lookups.saturating_sub(times);
        if *lookups == 0 {
            self.numbers.remove(place);
            self.places.remove(&number);
        }
    }
}

fn attr(inode: u64, found: &Attributes) -> Attr {
    Attr {
        ino: inode,
        size: found.size,
        blocks: found.blocks,
        mtime: found.modified,
        atime: found.modified,
        ctime: found.modified,
        mode: found.mode & SHOWN_MODE,
        nlink: 1,
        blksize: found.block_size,
        // Owner and group are 0.
        ..Attr::default()
    }
}

impl FileSystem for PathsFs {
    type Inode = u64;
    type Handle = u64;
    type DirIter = ReadDir<Vec<u8>>;

    fn init(&self, _capable: FsOptions) -> io::Result<FsOptions> {
        Ok(FsOptions::PARALLEL_DIROPS | FsOptions::ASYNC_READ | FsOptions::MAX_PAGES)
    }

    fn lookup(&self, _: Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let place = self.child(parent, name)?;
        let found = self.look(&place)?;
        let inode = self.inodes.lock().number(place)?;
        let attr = attr(inode, &found);
        Ok(Entry { inode, generation: 0, attr, attr_timeout: TIMEOUT, entry_timeout: TIMEOUT })
    }

    fn forget(&self, _: Context, inode: u64, times: u64) {
        self.inodes.lock().forget(inode, times);
    }

    fn getattr(&self, _: Context, inode: u64, _: Option<u64>) -> io::Result<(Attr, Duration)> {
        if inode == ROOT_ID {
            let attr = Attr { ino: ROOT_ID, mode: libc::S_IFDIR | 0o111, nlink: 1, ..Attr::default() };
            return Ok((attr, TIMEOUT));
        }
        let found = self.look(&self.place(inode)?)?;
        Ok((attr(inode, &found), TIMEOUT))
    }

    fn readlink(&self, _: Context, inode: u64) -> io::Result<Vec<u8>> {
        match self.ask(&self.place(inode)?, Want::Target)? {
            (Answer::Target(target), _) => Ok(target.into_vec()),
            _ => Err(errno(libc::EIO)),
        }
    }

    fn open(&self, _: Context, inode: u64, _: bool, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        let flags = flags.cast_signed();
        if flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0 {
            return Err(errno(libc::EROFS));
        }
        self.open_to_read(inode, Want::File)
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        _: Context,
        _: u64,
        handle: u64,
        mut w: W,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        // Farther on, no file has bytes, and the crate panics.
        if i64::try_from(offset).is_err() {
            return Err(errno(libc::EINVAL));
        }
        w.read_from_file_at(&*self.opened(handle)?, size as usize, offset, None)
    }

    fn release(&self, _: Context, _: u64, _: u32, handle: u64, _: bool, _: bool, _: Option<u64>) -> io::Result<()> {
        self.close(handle);
        Ok(())
    }

    fn opendir(&self, _: Context, inode: u64, _: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        if inode == ROOT_ID {
            return Err(errno(libc::EACCES));
        }
        self.open_to_read(inode, Want::Directory)
    }

    fn readdir(&self, _: Context, _: u64, handle: u64, size: u32, offset: u64) -> io::Result<ReadDir<Vec<u8>>> {
        let directory = self.opened(handle)?;
        ReadDir::new(&*directory, offset, vec![0; (size as usize).min(MAX_LISTING_BYTES)])
    }

    fn releasedir(&self, _: Context, _: u64, _: u32, handle: u64) -> io::Result<()> {
        self.close(handle);
        Ok(())
    }
}

fn errno(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}
