//! Sends the outputs, or the files that a failed build left behind.
//!
//! Each is a depth-first walk that follows no symlinks. It keeps in memory only the names in the open directories.

use std::{
    collections::BTreeMap,
    ffi::{CStr, CString, OsStr},
    fs::{self, File},
    io::{Read as _, Write},
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

use cofferdam_protocol::{
    FromGuest, MAX_DETAIL_BYTES, Specification, UnsupportedKind,
    frame::{FrameError, FrameWriter, MAX_DATA_BYTES},
    tree::{Event, Limits, MAX_DEPTH, MAX_METADATA_BYTES},
};
use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat, openat2, readlinkat},
    sys::stat::{FileStat, Mode, SFlag, fstatat},
};

use crate::layout::{ROOT, SKELETON};

/// Limit on the memory for names in the open directories.
const MAX_NAMES_BYTES: usize = MAX_METADATA_BYTES as usize + 1_000_000 * NAME_OVERHEAD_BYTES;

/// Memory for a name beside its bytes: its entry in a list, which grows by doubling, and the allocator's overhead.
const NAME_OVERHEAD_BYTES: usize = 64;

/// Why a walk ended early.
#[derive(Debug)]
enum Stop {
    Host(FrameError),
    Missing,
    Unsupported(UnsupportedKind),
    /// The entry exceeds the limits on kept files.
    OverLimit,
}

impl From<FrameError> for Stop {
    fn from(error: FrameError) -> Self {
        Self::Host(error)
    }
}

impl From<Errno> for Stop {
    fn from(errno: Errno) -> Self {
        Self::Unsupported(UnsupportedKind::Unreadable(errno as i32))
    }
}

/// Sends every output in order, then `Finished`. Stops at the first output that can't be stored.
pub(crate) fn send<W: Write>(host: &mut FrameWriter<W>, specification: &Specification) -> Result<(), FrameError> {
    match open(ROOT, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()) {
        Ok(root) => send_from(root.as_fd(), host, &specification.outputs, &specification.working_dir),
        Err(errno) => {
            let kind = UnsupportedKind::Unreadable(errno as i32);
            host.write(&FromGuest::Unsupported { path: b"", kind })
        }
    }
}

fn send_from<W: Write>(
    root: BorrowedFd<'_>,
    host: &mut FrameWriter<W>,
    outputs: &[String],
    working_dir: &str,
) -> Result<(), FrameError> {
    let mut buffer = vec![0; MAX_DATA_BYTES];
    for output in outputs {
        let mut walk = Walk { host, buffer: &mut buffer, path: Vec::new(), names_bytes: 0, kept: None };
        match walk.output(root, output) {
            Ok(()) => {}
            Err(Stop::Host(error)) => return Err(error),
            Err(Stop::Missing | Stop::OverLimit) => {
                let below = Path::new(working_dir).join(output);
                let below_working_dir = openat2(root, &below, in_root(OFlag::O_NOFOLLOW)).is_ok();
                host.write(&FromGuest::Missing { below_working_dir })?;
            }
            Err(Stop::Unsupported(kind)) => {
                let mut path = walk.path;
                path.truncate(MAX_DETAIL_BYTES);
                return host.write(&FromGuest::Unsupported { path: &path, kind });
            }
        }
    }
    host.write(&FromGuest::Finished)
}

/// Sends everything that the build wrote as one tree, then `Kept`. `writable` has the writable mount points, relative to
/// the build's root, and the upper layer of each.
pub(crate) fn send_kept<W: Write>(
    host: &mut FrameWriter<W>,
    writable: &BTreeMap<PathBuf, PathBuf>,
    limits: Limits,
) -> Result<(), FrameError> {
    // A tree of empty directories; the walk replaces those at mount points by the upper layers.
    let skeleton = Path::new(SKELETON).join("kept");
    let made = writable.keys().try_for_each(|at| fs::create_dir_all(skeleton.join(at)));
    let skipped = match made.and_then(|()| File::open(&skeleton)) {
        Ok(root) => send_kept_from(root.as_fd(), host, writable, limits)?,
        Err(_) => 0,
    };
    host.write(&FromGuest::Kept { skipped })
}

fn send_kept_from<W: Write>(
    root: BorrowedFd<'_>,
    host: &mut FrameWriter<W>,
    writable: &BTreeMap<PathBuf, PathBuf>,
    limits: Limits,
) -> Result<u64, FrameError> {
    let Limits { entries, bytes } = limits;
    let kept = Kept { writable, skipped: 0, entries, bytes, metadata_bytes: MAX_METADATA_BYTES };
    let mut buffer = vec![0; MAX_DATA_BYTES];
    let mut walk = Walk { host, buffer: &mut buffer, path: Vec::new(), names_bytes: 0, kept: Some(kept) };
    match walk.tree(root, c".") {
        Err(Stop::Host(error)) => Err(error),
        _ => Ok(walk.kept.map_or(0, |kept| kept.skipped)),
    }
}

/// A walk over kept files, which may skip entries.
struct Kept<'a> {
    /// Paths in the walk, and the directories to send instead.
    writable: &'a BTreeMap<PathBuf, PathBuf>,
    skipped: u64,
    // The remainder of each limit.
    entries: u64,
    bytes: u64,
    metadata_bytes: u64,
}

/// The walk over one tree.
struct Walk<'a, W> {
    host: &'a mut FrameWriter<W>,
    buffer: &'a mut [u8],
    /// The current path, relative to the output.
    path: Vec<u8>,
    /// Memory for the names that are still to be sent.
    names_bytes: usize,
    kept: Option<Kept<'a>>,
}

/// A directory whose entries are being sent.
struct Open {
    directory: OwnedFd,
    /// The names still to be sent, in descending order.
    names: Vec<CString>,
    path_length: usize,
}

impl<W: Write> Walk<'_, W> {
    fn output(&mut self, root: BorrowedFd<'_>, output: &str) -> Result<(), Stop> {
        let path = Path::new(output);
        let name = path.file_name().unwrap_or(OsStr::new("."));
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let how = in_root(OFlag::O_DIRECTORY);
        let parent = openat2(root, parent, how).map_err(missing)?;
        let name = CString::new(name.as_bytes()).map_err(|_| Stop::Missing)?;
        self.tree(parent.as_fd(), &name)
    }

    fn tree(&mut self, parent: BorrowedFd<'_>, name: &CStr) -> Result<(), Stop> {
        let status = fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(missing)?;
        let mut open: Vec<_> = self.entry(parent, name, b"", &status, 0)?.into_iter().collect();
        loop {
            let depth = open.len();
            let Some(top) = open.last_mut() else { return Ok(()) };
            self.path.truncate(top.path_length);
            let Some(name) = top.names.pop() else {
                open.pop();
                self.send(Event::End)?;
                continue;
            };
            self.names_bytes -= memory_of(&name);
            if !self.path.is_empty() {
                self.path.push(b'/');
            }
            self.path.extend_from_slice(name.to_bytes());
            let status = fstatat(&top.directory, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW).map_err(Stop::from);
            let below = status.and_then(|s| self.entry(top.directory.as_fd(), &name, name.to_bytes(), &s, depth));
            match (below, &mut self.kept) {
                (Err(Stop::Unsupported(_) | Stop::OverLimit), Some(kept)) => kept.skipped += 1,
                (below, _) => open.extend(below?),
            }
        }
    }

    /// Sends one entry. Of a directory, it sends the beginning, and returns it open.
    fn entry(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &CStr,
        sent_name: &[u8],
        status: &FileStat,
        depth: usize,
    ) -> Result<Option<Open>, Stop> {
        let kind = match SFlag::from_bits_truncate(status.st_mode & SFlag::S_IFMT.bits()) {
            SFlag::S_IFREG => return self.file(parent, name, sent_name, status).map(|()| None),
            SFlag::S_IFLNK => {
                let target = readlinkat(parent, name)?;
                self.count_kept(sent_name.len() + target.len(), 0)?;
                self.send(Event::Symlink { name: sent_name, target: target.as_bytes() })?;
                return Ok(None);
            }
            SFlag::S_IFDIR if depth < MAX_DEPTH => return self.directory(parent, name, sent_name).map(Some),
            SFlag::S_IFDIR => UnsupportedKind::TooDeep,
            // A whiteout: overlayfs's mark of a removed file.
            SFlag::S_IFCHR if self.kept.is_some() && status.st_rdev == 0 => return Ok(None),
            SFlag::S_IFIFO => UnsupportedKind::Fifo,
            SFlag::S_IFSOCK => UnsupportedKind::Socket,
            SFlag::S_IFBLK => UnsupportedKind::BlockDevice,
            _ => UnsupportedKind::CharacterDevice,
        };
        Err(Stop::Unsupported(kind))
    }

    fn file(&mut self, parent: BorrowedFd<'_>, name: &CStr, sent_name: &[u8], status: &FileStat) -> Result<(), Stop> {
        let executable = status.st_mode & Mode::S_IXUSR.bits() != 0;
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let mut file = File::from(openat(parent, name, flags, Mode::empty())?);
        self.count_kept(sent_name.len(), status.st_size.cast_unsigned())?;
        self.send(Event::File { name: sent_name, executable })?;
        loop {
            match (file.read(self.buffer), &mut self.kept) {
                (Ok(0), _) => return self.send(Event::End),
                (Ok(length), _) => self.host.write(&FromGuest::Tree(Event::Data(&self.buffer[..length])))?,
                (Err(_), Some(kept)) => {
                    // The beginning of the file is kept.
                    kept.skipped += 1;
                    return self.send(Event::End);
                }
                (Err(error), None) => return Err(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)).into()),
            }
        }
    }

    fn directory(&mut self, parent: BorrowedFd<'_>, name: &CStr, sent_name: &[u8]) -> Result<Open, Stop> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let instead = self.kept.as_ref().and_then(|kept| kept.writable.get(Path::new(OsStr::from_bytes(&self.path))));
        let directory = match instead {
            Some(path) => open(path, flags, Mode::empty()),
            None => openat(parent, name, flags, Mode::empty()),
        }?;
        // Only open while the directory is listed, because of its large buffer.
        let mut entries = Dir::openat(&directory, ".", flags, Mode::empty())?;
        let mut names = Vec::new();
        let mut names_bytes = self.names_bytes;
        for entry in entries.iter() {
            let entry = entry?;
            let name = entry.file_name();
            if [c".", c".."].contains(&name) {
                continue;
            }
            names_bytes += memory_of(name);
            if names_bytes > MAX_NAMES_BYTES {
                return Err(Stop::Unsupported(UnsupportedKind::TooManyNames));
            }
            names.push(name.to_owned());
        }
        names.sort_unstable_by(|a, b| b.cmp(a));
        self.count_kept(sent_name.len(), 0)?;
        self.names_bytes = names_bytes;
        self.send(Event::Directory { name: sent_name })?;
        Ok(Open { directory, names, path_length: self.path.len() })
    }

    /// Counts an entry against the limits on kept files. The host enforces the limits on outputs.
    fn count_kept(&mut self, metadata_bytes: usize, bytes: u64) -> Result<(), Stop> {
        let Some(kept) = &mut self.kept else { return Ok(()) };
        let left = |limit: u64, used: u64| limit.checked_sub(used).ok_or(Stop::OverLimit);
        let (entries, bytes) = (left(kept.entries, 1)?, left(kept.bytes, bytes)?);
        kept.metadata_bytes = left(kept.metadata_bytes, metadata_bytes as u64)?;
        (kept.entries, kept.bytes) = (entries, bytes);
        Ok(())
    }

    fn send(&mut self, event: Event<'_>) -> Result<(), Stop> {
        Ok(self.host.write(&FromGuest::Tree(event))?)
    }
}

/// Looks at a path, whose symlinks don't lead out of the root.
fn in_root(flag: OFlag) -> OpenHow {
    OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC | flag)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS)
}

fn memory_of(name: &CStr) -> usize {
    name.count_bytes() + NAME_OVERHEAD_BYTES
}

fn missing(errno: Errno) -> Stop {
    match errno {
        Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP => Stop::Missing,
        errno => errno.into(),
    }
}

#[cfg(test)]
mod tests;
