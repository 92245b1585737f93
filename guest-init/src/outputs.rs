//! Sends the outputs: each a depth-first walk that follows no symlink, its memory bounded by the names in the
//! directories that are open.

use std::{
    ffi::{CStr, CString, OsStr},
    fs::File,
    io::{Read as _, Write},
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use cofferdam_protocol::{
    FromGuest, MAX_DETAIL_BYTES, UnsupportedKind,
    frame::{FrameError, FrameWriter, MAX_DATA_BYTES},
    tree::{Event, MAX_DEPTH, MAX_METADATA_BYTES},
};
use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat, openat2, readlinkat},
    sys::stat::{FileStat, Mode, SFlag, fstatat},
};

use crate::ROOT;

/// Most memory for the names in the directories that are open at one time.
const MAX_HELD_BYTES: usize = MAX_METADATA_BYTES as usize + 1_000_000 * NAME_OVERHEAD_BYTES;

/// What a name costs beside its bytes: its place in a list, which grows by doubling, and its allocation's own.
const NAME_OVERHEAD_BYTES: usize = 64;

/// Why a walk ended early.
#[derive(Debug)]
enum Stop {
    Host(FrameError),
    Missing,
    Unsupported(UnsupportedKind),
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

/// Sends every output in order, then `Finished`; ends with the first that can't be stored.
pub(crate) fn send<W: Write>(host: &mut FrameWriter<W>, outputs: &[String]) -> Result<(), FrameError> {
    match open(ROOT, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()) {
        Ok(root) => send_from(root.as_fd(), host, outputs),
        Err(errno) => {
            let kind = UnsupportedKind::Unreadable(errno as i32);
            host.write(&FromGuest::Unsupported { path: b"", kind })
        }
    }
}

fn send_from<W: Write>(root: BorrowedFd<'_>, host: &mut FrameWriter<W>, outputs: &[String]) -> Result<(), FrameError> {
    let mut buffer = vec![0; MAX_DATA_BYTES];
    for output in outputs {
        let mut walk = Walk { host, buffer: &mut buffer, path: Vec::new(), held: 0 };
        match walk.output(root, output) {
            Ok(()) => {}
            Err(Stop::Host(error)) => return Err(error),
            Err(Stop::Missing) => host.write(&FromGuest::Missing)?,
            Err(Stop::Unsupported(kind)) => {
                let mut path = walk.path;
                path.truncate(MAX_DETAIL_BYTES);
                return host.write(&FromGuest::Unsupported { path: &path, kind });
            }
        }
    }
    host.write(&FromGuest::Finished)
}

/// One tree on its way.
struct Walk<'a, W> {
    host: &'a mut FrameWriter<W>,
    buffer: &'a mut [u8],
    /// Where the walk is, relative to the output.
    path: Vec<u8>,
    /// Memory for the names that are still to be sent.
    held: usize,
}

/// A directory whose entries are being sent.
struct Open {
    directory: OwnedFd,
    /// What is still to be sent, in descending order.
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
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let parent = openat2(root, parent, how).map_err(missing)?;
        let name = CString::new(name.as_bytes()).map_err(|_| Stop::Missing)?;
        let status = fstatat(&parent, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW).map_err(missing)?;
        let mut open: Vec<_> = self.entry(parent.as_fd(), &name, b"", &status, 0)?.into_iter().collect();
        loop {
            let depth = open.len();
            let Some(top) = open.last_mut() else { return Ok(()) };
            self.path.truncate(top.path_length);
            let Some(name) = top.names.pop() else {
                open.pop();
                self.send(Event::End)?;
                continue;
            };
            self.held -= cost(&name);
            if !self.path.is_empty() {
                self.path.push(b'/');
            }
            self.path.extend_from_slice(name.to_bytes());
            let status = fstatat(&top.directory, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW)?;
            let below = self.entry(top.directory.as_fd(), &name, name.to_bytes(), &status, depth)?;
            open.extend(below);
        }
    }

    /// Sends an entry; a directory only begins.
    fn entry(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &CStr,
        sent_name: &[u8],
        status: &FileStat,
        depth: usize,
    ) -> Result<Option<Open>, Stop> {
        let kind = match SFlag::from_bits_truncate(status.st_mode & SFlag::S_IFMT.bits()) {
            SFlag::S_IFREG => {
                let executable = status.st_mode & Mode::S_IXUSR.bits() != 0;
                return self.file(parent, name, sent_name, executable).map(|()| None);
            }
            SFlag::S_IFLNK => {
                let target = readlinkat(parent, name)?;
                self.send(Event::Symlink { name: sent_name, target: target.as_bytes() })?;
                return Ok(None);
            }
            SFlag::S_IFDIR if depth < MAX_DEPTH => return self.directory(parent, name, sent_name).map(Some),
            SFlag::S_IFDIR => UnsupportedKind::TooDeep,
            SFlag::S_IFIFO => UnsupportedKind::Fifo,
            SFlag::S_IFSOCK => UnsupportedKind::Socket,
            SFlag::S_IFBLK => UnsupportedKind::BlockDevice,
            _ => UnsupportedKind::CharacterDevice,
        };
        Err(Stop::Unsupported(kind))
    }

    fn file(&mut self, parent: BorrowedFd<'_>, name: &CStr, sent_name: &[u8], executable: bool) -> Result<(), Stop> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let mut file = File::from(openat(parent, name, flags, Mode::empty())?);
        self.send(Event::File { name: sent_name, executable })?;
        loop {
            match file.read(self.buffer) {
                Ok(0) => return self.send(Event::End),
                Ok(length) => self.host.write(&FromGuest::Tree(Event::Data(&self.buffer[..length])))?,
                Err(error) => return Err(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)).into()),
            }
        }
    }

    fn directory(&mut self, parent: BorrowedFd<'_>, name: &CStr, sent_name: &[u8]) -> Result<Open, Stop> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let directory = openat(parent, name, flags, Mode::empty())?;
        // Its buffer is large, so it lives no longer than the listing.
        let mut entries = Dir::openat(&directory, ".", flags, Mode::empty())?;
        let mut names = Vec::new();
        for entry in entries.iter() {
            let entry = entry?;
            let name = entry.file_name();
            if [c".", c".."].contains(&name) {
                continue;
            }
            self.held += cost(name);
            if self.held > MAX_HELD_BYTES {
                return Err(Stop::Unsupported(UnsupportedKind::TooManyNames));
            }
            names.push(name.to_owned());
        }
        names.sort_unstable_by(|a, b| b.cmp(a));
        self.send(Event::Directory { name: sent_name })?;
        Ok(Open { directory, names, path_length: self.path.len() })
    }

    fn send(&mut self, event: Event<'_>) -> Result<(), Stop> {
        Ok(self.host.write(&FromGuest::Tree(event))?)
    }
}

fn cost(name: &CStr) -> usize {
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
