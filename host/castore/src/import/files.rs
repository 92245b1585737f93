//! Reads single files and symbolic links.

use std::{
    fs::File,
    io::{self, Read as _},
    os::{
        fd::AsFd,
        unix::{
            ffi::{OsStrExt as _, OsStringExt as _},
            fs::FileExt as _,
        },
    },
    path::Path,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, openat, readlinkat},
    sys::stat::{FileStat, Mode, fstat},
};
use tokio::io::AsyncWriteExt as _;

use super::{ImportError, Kind, Observe, block_on, read_error};
use crate::{B3Digest, Node, Store, SymlinkTarget};

/// Bytes that each thread reads at a time.
const BUFFER_BYTES: usize = 512 * 1024;

/// Files from this size on get a second reader.
const LARGE_BYTES: u64 = 64 * 1024 * 1024;

/// Most bytes of a file that says it has none.
const MAX_MADE_UP_BYTES: u64 = 64 * 1024 * 1024;

/// Digest and size of contents in the store.
type Stored = (B3Digest, u64);

const OWNER_MAY_EXECUTE: u32 = 0o100;

/// Reads the symbolic link `name` in `dir`. Errors name `path`.
pub(super) fn read_symlink(dir: impl AsFd, name: &Path, path: &Path) -> Result<Node, ImportError> {
    let target = readlinkat(dir, name).map_err(|errno| read_error(path, "read the symbolic link", errno))?;
    let target = SymlinkTarget::try_from(target.into_vec())
        .map_err(|source| ImportError::Target { path: path.to_owned(), source })?;
    Ok(Node::Symlink { target })
}

/// Imports files one after the other, with one buffer.
pub(super) struct Importer<'a> {
    store: &'a Store,
    observe: Option<&'a Observe<'a>>,
    buffer: Vec<u8>,
}

impl<'a> Importer<'a> {
    pub(super) fn new(store: &'a Store, observe: Option<&'a Observe<'a>>) -> Self {
        Self { store, observe, buffer: vec![0; BUFFER_BYTES] }
    }

    fn tell(&self, files: u64, bytes: u64) {
        if let Some(observe) = self.observe {
            observe(files, bytes);
        }
    }

    /// Imports the regular file `name` in `dir`, and returns its mode, too. Errors name `path`.
    pub(super) fn import(&mut self, dir: impl AsFd, name: &Path, path: &Path) -> Result<(Node, u32), ImportError> {
        // Non-blocking, because a fifo may have taken the file's place.
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let file: File = match openat(dir, name, flags, Mode::empty()) {
            Ok(file) => file.into(),
            // A symbolic link has taken its place.
            Err(Errno::ELOOP) => return Err(ImportError::Changed(path.to_owned())),
            Err(errno) => return Err(read_error(path, "open the file", errno)),
        };
        let before = look_at(&file, path)?;
        if Kind::of(&before) != Kind::File {
            return Err(ImportError::Changed(path.to_owned()));
        }
        let (digest, size) = self.store_contents(&file, &before, path)?;
        self.tell(1, 0);
        Ok((Node::File { digest, size, executable: before.st_mode & OWNER_MAY_EXECUTE != 0 }, before.st_mode))
    }

    fn store_contents(&mut self, file: &File, before: &FileStat, path: &Path) -> Result<(B3Digest, u64), ImportError> {
        let expected = u64::try_from(before.st_size).unwrap_or(0);
        let stored = if expected < LARGE_BYTES {
            self.copy(file, expected, path, || None)?
        } else {
            self.find_or_copy(file, expected, path)?
        };
        // A file that has grown has another size, so there is no need to read on to its end.
        let after = look_at(file, path)?;
        match stored {
            Some(stored) if version(before) == version(&after) => Ok(stored),
            _ => Err(ImportError::Changed(path.to_owned())),
        }
    }

    /// Copies a large file, and hashes it in parallel, which is faster. The copy ends early if the store has the file already.
    fn find_or_copy(&mut self, file: &File, expected: u64, path: &Path) -> Result<Option<Stored>, ImportError> {
        let (known, copied) = (OnceLock::new(), AtomicBool::new(false));
        let store = self.store;
        thread::scope(|scope| {
            scope.spawn(|| {
                // A failure here shows in the copy, too.
                if let Ok(Some(digest)) = hash(file, expected, &copied)
                    && let Ok(true) = block_on(store.blobs.has_whole(&digest, expected))
                {
                    let _ = known.set(digest);
                }
            });
            let stored = self.copy(file, expected, path, || known.get().copied());
            copied.store(true, Ordering::Relaxed);
            stored
        })
    }

    /// Stores `expected` bytes, unless `known` returns their digest meanwhile. `None` if there are more.
    ///
    /// The kernel makes up the contents of some files as they are read, in `/proc` and `/sys` for example, and says that they
    /// have 0 or 4096 bytes. They have what can be read.
    fn copy(
        &mut self,
        mut file: &File,
        expected: u64,
        path: &Path,
        known: impl Fn() -> Option<B3Digest>,
    ) -> Result<Option<Stored>, ImportError> {
        let store_error = |source| ImportError::Store { path: path.to_owned(), source };
        let mut writer = block_on(self.store.blobs.open_write());
        let most = if expected == 0 { MAX_MADE_UP_BYTES } else { expected };
        let mut size = 0;
        while size < most {
            if let Some(digest) = known() {
                return Ok(Some((digest, expected)));
            }
            let read = match file.read(&mut self.buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(read_error(path, "read the file", error)),
            };
            size += read as u64;
            block_on(writer.write_all(&self.buffer[..read])).map_err(store_error)?;
            self.tell(0, read as u64);
        }
        if expected == 0 && size >= most {
            let source = io::Error::other(format!("it says that it is empty, and has {most} bytes or more"));
            return Err(ImportError::Read { path: path.to_owned(), action: "read the whole file", source });
        }
        if size > most {
            return Ok(None);
        }
        block_on(writer.close()).map(|digest| Some((digest, size))).map_err(store_error)
    }
}

/// The digest of the first `expected` bytes. `None` if there are fewer, or once `cancelled` is set.
fn hash(file: &File, expected: u64, cancelled: &AtomicBool) -> io::Result<Option<B3Digest>> {
    let (mut hasher, mut buffer) = (blake3::Hasher::new(), vec![0; BUFFER_BYTES]);
    while hasher.count() < expected {
        let left = usize::try_from(expected - hasher.count()).unwrap_or(usize::MAX).min(BUFFER_BYTES);
        match file.read_at(&mut buffer[..left], hasher.count()) {
            Ok(0) => return Ok(None),
            Ok(read) => drop(hasher.update(&buffer[..read])),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if cancelled.load(Ordering::Relaxed) {
            return Ok(None);
        }
    }
    Ok(Some(hasher.finalize().into()))
}

fn look_at(file: &File, path: &Path) -> Result<FileStat, ImportError> {
    fstat(file).map_err(|errno| read_error(path, "look at the file", errno))
}

/// Differs after a write to the file.
fn version(stat: &FileStat) -> (i64, i64, i64) {
    (stat.st_size, stat.st_mtime, stat.st_mtime_nsec)
}

/// A name as a relative path.
pub(super) fn as_path(name: &[u8]) -> &Path {
    Path::new(std::ffi::OsStr::from_bytes(name))
}
