//! The FUSE file system: answers from [`Layout`] and [`Blobs`], refuses every change.

use std::ffi::CStr;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use cofferdam_castore::Node;
use cofferdam_protocol::{BUILD_GID, BUILD_UID};
use virtiofsd::filesystem::{
    Context, DirEntry, DirectoryIterator, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply,
    OpenOptions, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};

use super::blobs::Blobs;
use super::layout::{Appearance, Dir, Inode, Layout};
use super::resolve::TIME;
use super::wire::Host;

/// How long the guest may believe what it was told: a century, which no jiffies overflow.
const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

const BLOCK_BYTES: u32 = 4096;

/// The unit of `st_blocks`, which doesn't depend on the file system.
const STAT_BLOCK_BYTES: u64 = 512;

/// How many of the files after one that is read are opened along with it.
const READ_AHEAD_FILES: usize = 31;

/// One build's inputs.
#[derive(Debug)]
pub(in crate::devices) struct InputsFs {
    layout: Layout,
    blobs: Blobs,
}

impl InputsFs {
    pub(in crate::devices) fn new(host: Arc<Host>) -> Self {
        Self { layout: Layout::new(Arc::clone(&host)), blobs: Blobs::new(host) }
    }

    fn attributes(&self, inode: &Inode) -> io::Result<Attr> {
        Ok(attributes(inode, self.layout.last_inode()?, self.layout.appearance()?))
    }

    #[cfg(test)]
    pub(super) fn open_blobs(&self) -> usize {
        self.blobs.count()
    }
}

/// The build's overlay over what is writable copies files with their owner and mode.
fn attributes(inode: &Inode, inodes: u64, appearance: &Appearance) -> Attr {
    let is_writable = appearance.is_writable(inode.number);
    let write = if is_writable { 0o200 } else { 0 };
    let (kind_and_mode, size) = match inode.entry().map(|entry| &entry.node) {
        None => (libc::S_IFDIR | 0o555, inodes - 1),
        Some(Node::Directory { size, .. }) => (libc::S_IFDIR | 0o555 | write, *size),
        Some(Node::File { size, executable: true, .. }) => (libc::S_IFREG | 0o555 | write, *size),
        Some(Node::File { size, executable: false, .. }) => (libc::S_IFREG | 0o444 | write, *size),
        Some(Node::Symlink { target }) => (libc::S_IFLNK | 0o777, target.as_bytes().len() as u64),
    };
    let time = if is_writable { TIME } else { appearance.time };
    let (uid, gid) = if is_writable { (BUILD_UID, BUILD_GID) } else { (0, 0) };
    let is_file = kind_and_mode & libc::S_IFMT == libc::S_IFREG;
    Attr {
        ino: inode.number,
        size,
        blocks: if is_file { size.div_ceil(STAT_BLOCK_BYTES) } else { 0 },
        atime: time,
        mtime: time,
        ctime: time,
        mode: kind_and_mode,
        uid: uid.into(),
        gid: gid.into(),
        // For a directory too: it says that subdirectories aren't counted.
        nlink: 1,
        blksize: BLOCK_BYTES,
        ..Attr::default()
    }
}

fn errno<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}

/// The answer to every request to change something.
fn read_only<T>() -> io::Result<T> {
    errno(libc::EROFS)
}

/// A directory's entries from some point on, `.` and `..` first.
pub(in crate::devices) struct Entries {
    dir: Arc<Dir>,
    inode: Inode,
    next: usize,
}

impl DirectoryIterator for Entries {
    fn next(&mut self) -> Option<DirEntry<'_>> {
        let index = self.next;
        let (ino, type_, name) = match index {
            0 => (self.inode.number, libc::DT_DIR, c"."),
            1 => (self.inode.parent, libc::DT_DIR, c".."),
            _ => {
                let entry = self.dir.entries().get(index - 2)?;
                let type_ = match entry.node {
                    Node::Directory { .. } => libc::DT_DIR,
                    Node::File { .. } => libc::DT_REG,
                    Node::Symlink { .. } => libc::DT_LNK,
                };
                (entry.inode(self.inode.number), type_, entry.name.as_c_str())
            }
        };
        self.next += 1;
        Some(DirEntry { ino, offset: self.next as u64, type_: type_.into(), name })
    }
}

impl FileSystem for InputsFs {
    type Inode = u64;
    type Handle = u64;
    type DirIter = Entries;

    /// Always uses READDIRPLUS, instead of leaving that to the guest's heuristic. To list a directory of 3,000 files and
    /// open them takes 148 requests this way, and 3,029 otherwise. A mere listing takes 148 instead of 52.
    fn init(&self, _capable: FsOptions) -> io::Result<FsOptions> {
        Ok(FsOptions::ZERO_MESSAGE_OPEN
            | FsOptions::ZERO_MESSAGE_OPENDIR
            | FsOptions::DO_READDIRPLUS
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::CACHE_SYMLINKS
            | FsOptions::ASYNC_READ
            | FsOptions::MAX_PAGES)
    }

    fn lookup(&self, _: Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let found = self.layout.lookup(parent, name.to_bytes())?;
        // Number 0 lets the guest remember that there is no such name, too.
        let inode = found.as_ref().map_or(0, |inode| inode.number);
        let attr = match found {
            Some(inode) => self.attributes(&inode)?,
            None => Attr::default(),
        };
        Ok(Entry { inode, generation: 0, attr, attr_timeout: FOR_EVER, entry_timeout: FOR_EVER })
    }

    fn getattr(&self, _: Context, inode: u64, _: Option<u64>) -> io::Result<(Attr, Duration)> {
        Ok((self.attributes(&self.layout.inode(inode)?)?, FOR_EVER))
    }

    fn readlink(&self, _: Context, inode: u64) -> io::Result<Vec<u8>> {
        match self.layout.inode(inode)?.entry().map(|entry| &entry.node) {
            Some(Node::Symlink { target }) => Ok(target.as_bytes().to_vec()),
            _ => errno(libc::EINVAL),
        }
    }

    /// `ENOSYS` is the answer that makes the guest open and release files, this one and all others, without asking.
    fn open(&self, _: Context, _: u64, _: bool, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        let flags = flags.cast_signed();
        if flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0 {
            return read_only();
        }
        errno(libc::ENOSYS)
    }

    fn opendir(&self, _: Context, _: u64, _: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        errno(libc::ENOSYS)
    }

    fn readdir(&self, _: Context, inode: u64, _: u64, _: u32, offset: u64) -> io::Result<Entries> {
        let inode = self.layout.inode(inode)?;
        let dir = self.layout.dir(&inode)?;
        let next = usize::try_from(offset).or_else(|_| errno(libc::EINVAL))?;
        Ok(Entries { dir, inode, next })
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        _: Context,
        inode: u64,
        _: u64,
        mut w: W,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        let inode = self.layout.inode(inode)?;
        let (digest, file_size) = match inode.entry().map(|entry| &entry.node) {
            Some(Node::File { digest, size, .. }) => (*digest, *size),
            Some(Node::Symlink { .. }) => return errno(libc::EINVAL),
            Some(Node::Directory { .. }) | None => return errno(libc::EISDIR),
        };
        // Not the blob's end but the node's: the guest has been told that size.
        let count = u64::from(size).min(file_size.saturating_sub(offset)) as usize;
        if count == 0 {
            return Ok(0);
        }
        let next = inode.next_siblings().iter().take(READ_AHEAD_FILES).filter_map(|entry| match entry.node {
            Node::File { digest, size, .. } if size > 0 => Some(digest),
            _ => None,
        });
        let file = self.blobs.get(digest, next)?;
        w.read_from_file_at(&file, count, offset, None)
    }

    fn statfs(&self, _: Context, _: u64) -> io::Result<libc::statvfs64> {
        // SAFETY: statvfs64 is made of integers only, for which zero is a value.
        let mut st: libc::statvfs64 = unsafe { std::mem::zeroed() };
        st.f_bsize = BLOCK_BYTES.into();
        st.f_frsize = BLOCK_BYTES.into();
        st.f_files = self.layout.last_inode()?;
        st.f_namemax = 255;
        Ok(st)
    }

    /// The guest checks permissions itself, by mode; after `ENOSYS` it doesn't ask again.
    fn access(&self, _: Context, _: u64, mask: u32) -> io::Result<()> {
        if mask.cast_signed() & libc::W_OK != 0 { read_only() } else { errno(libc::ENOSYS) }
    }

    fn getxattr(&self, _: Context, _: u64, _: &CStr, _: u32) -> io::Result<GetxattrReply> {
        errno(libc::ENOSYS)
    }

    /// After `ENOSYS` the guest would say that extended attributes aren't supported, and `tar --xattrs` warn of each file.
    fn listxattr(&self, _: Context, _: u64, size: u32) -> io::Result<ListxattrReply> {
        Ok(if size == 0 { ListxattrReply::Count(0) } else { ListxattrReply::Names(Vec::new()) })
    }

    // forget, flush, release, fsync, lseek, locks and the like keep the trait's answer, which is ENOSYS or nothing:
    // there is no state behind an inode or a handle.

    fn setattr(
        &self,
        _: Context,
        _: u64,
        _: SetattrIn,
        _: Option<u64>,
        _: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        read_only()
    }

    fn symlink(&self, _: Context, _: &CStr, _: u64, _: &CStr, _: Extensions) -> io::Result<Entry> {
        read_only()
    }

    fn mknod(&self, _: Context, _: u64, _: &CStr, _: u32, _: u32, _: u32, _: Extensions) -> io::Result<Entry> {
        read_only()
    }

    fn mkdir(&self, _: Context, _: u64, _: &CStr, _: u32, _: u32, _: Extensions) -> io::Result<Entry> {
        read_only()
    }

    fn unlink(&self, _: Context, _: u64, _: &CStr) -> io::Result<()> {
        read_only()
    }

    fn rmdir(&self, _: Context, _: u64, _: &CStr) -> io::Result<()> {
        read_only()
    }

    fn rename(&self, _: Context, _: u64, _: &CStr, _: u64, _: &CStr, _: u32) -> io::Result<()> {
        read_only()
    }

    fn link(&self, _: Context, _: u64, _: u64, _: &CStr) -> io::Result<Entry> {
        read_only()
    }

    fn create(
        &self,
        _: Context,
        _: u64,
        _: &CStr,
        _: u32,
        _: bool,
        _: u32,
        _: u32,
        _: Extensions,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions)> {
        read_only()
    }

    fn write<R: ZeroCopyReader>(
        &self,
        _: Context,
        _: u64,
        _: u64,
        _: R,
        _: u32,
        _: u64,
        _: Option<u64>,
        _: bool,
        _: bool,
        _: u32,
    ) -> io::Result<usize> {
        read_only()
    }

    fn fallocate(&self, _: Context, _: u64, _: u64, _: u32, _: u64, _: u64) -> io::Result<()> {
        read_only()
    }

    fn setxattr(&self, _: Context, _: u64, _: &CStr, _: &[u8], _: u32, _: SetxattrFlags) -> io::Result<()> {
        read_only()
    }

    fn removexattr(&self, _: Context, _: u64, _: &CStr) -> io::Result<()> {
        read_only()
    }

    fn copyfilerange(
        &self,
        _: Context,
        _: u64,
        _: u64,
        _: u64,
        _: u64,
        _: u64,
        _: u64,
        _: u64,
        _: u64,
    ) -> io::Result<usize> {
        read_only()
    }

    fn tmpfile(&self) -> io::Result<(Entry, Option<u64>, OpenOptions)> {
        read_only()
    }
}
