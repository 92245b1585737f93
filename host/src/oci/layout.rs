//! OCI layouts and Docker's archives: files by path, in a directory or in a tar archive.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, Read, Seek as _, SeekFrom},
    os::{
        fd::AsFd as _,
        unix::fs::{FileExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use cofferdam_castore::{
    archive::{ArchiveError, decompress},
    tar::{Member, members},
};
use nix::libc::O_NONBLOCK;

use super::{Descriptor, OciError, Source, manifest::read_document};

/// Limit on the entries of an archive that has an image: its layers' files are not among them.
const MAX_MEMBERS: u64 = 65_536;

/// Limit on the links that lead to one file.
const MAX_LINKS: usize = 8;

/// Length of a tar archive's first header, at least.
const HEADER_BYTES: u64 = 512;

/// The files of a layout or archive.
pub(crate) enum Files {
    Directory(PathBuf),
    Archive { file: File, members: BTreeMap<Vec<u8>, Member> },
}

impl Files {
    /// Opens a directory or an archive. One that is compressed, or comes from a pipe, is first copied to a temporary file
    /// of at most `limit` bytes.
    ///
    /// # Errors
    ///
    /// It can't be read, or is neither.
    pub(crate) fn open(path: &Path, limit: u64) -> Result<Self, OciError> {
        let failed = |source| OciError::Read { at: format!("{path:?}"), source };
        if path != Path::new("-") && path.is_dir() {
            return Ok(Self::Directory(path.to_owned()));
        }
        let file = match path.to_str() {
            Some("-") => File::from(io::stdin().as_fd().try_clone_to_owned().map_err(failed)?),
            _ => File::open(path).map_err(failed)?,
        };
        let at = |error| OciError::malformed(format!("{path:?}"), format!("is no image: {}", chain(&error)));
        let file = if is_plain(&file) { file } else { copied(&file, limit, path)? };
        let members = members(&file, MAX_MEMBERS).map_err(at)?;
        Ok(Self::Archive { file, members })
    }

    /// The file at a path, if it is there.
    pub(super) fn get(&self, path: &str) -> Result<Option<Box<dyn Read + '_>>, OciError> {
        match self {
            Self::Directory(dir) => {
                let failed = |source| OciError::Read { at: format!("{path:?}"), source };
                // A fifo must not keep it waiting.
                let file = match OpenOptions::new().read(true).custom_flags(O_NONBLOCK).open(dir.join(path)) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                    file => file.map_err(failed)?,
                };
                let metadata = file.metadata().map_err(failed)?;
                if !metadata.is_file() {
                    return Err(OciError::malformed(format!("{path:?}"), "must be a regular file"));
                }
                Ok(Some(Box::new(file)))
            }
            Self::Archive { file, members } => {
                let Some((offset, size)) = follow(members, path) else { return Ok(None) };
                Ok(Some(Box::new(Part { file, at: offset, left: size })))
            }
        }
    }

    /// The whole document at a path, if it is there.
    pub(super) fn document(&self, path: &str) -> Result<Option<Vec<u8>>, OciError> {
        self.get(path)?.map(|reader| read_document(&format!("{path:?}"), reader)).transpose()
    }
}

impl Source for Files {
    fn open(&self, descriptor: &Descriptor) -> Result<Box<dyn Read + '_>, OciError> {
        let path = format!("blobs/sha256/{}", descriptor.digest.hex());
        match self.get(&path)? {
            Some(reader) => Ok(reader),
            None => Err(OciError::malformed(format!("the blob {}", descriptor.digest), "is missing from the layout")),
        }
    }
}

/// An error and its causes on one line.
pub(super) fn chain(error: &ArchiveError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Whether the file begins with a header of tar, and can be read anywhere.
fn is_plain(mut file: &File) -> bool {
    let mut header = [0; HEADER_BYTES as usize];
    file.seek(SeekFrom::Start(0)).is_ok() && file.read_exact_at(&mut header, 0).is_ok() && header[257..262] == *b"ustar"
}

fn copied(file: &File, limit: u64, path: &Path) -> Result<File, OciError> {
    let failed = |source| OciError::Read { at: format!("{path:?}"), source };
    let mut copy = tempfile::tempfile().map_err(failed)?;
    let plain = decompress(file).map_err(|error| OciError::malformed(format!("{path:?}"), chain(&error)))?;
    if io::copy(&mut plain.take(limit.saturating_add(1)), &mut copy).map_err(failed)? > limit {
        return Err(OciError::malformed(format!("{path:?}"), format!("must not have more than {limit} bytes")));
    }
    Ok(copy)
}

/// Where the contents of a path are, through links.
fn follow(members: &BTreeMap<Vec<u8>, Member>, path: &str) -> Option<(u64, u64)> {
    let mut path = path.as_bytes().to_owned();
    for _ in 0..=MAX_LINKS {
        match members.get(&path)? {
            Member::File { offset, size } => return Some((*offset, *size)),
            Member::Link { target, is_symbolic } => {
                let mut parts: Vec<&[u8]> = Vec::new();
                if *is_symbolic {
                    parts.extend(path.split(|&byte| byte == b'/'));
                    parts.pop();
                }
                for part in target.split(|&byte| byte == b'/') {
                    match part {
                        b"" | b"." => {}
                        b".." => drop(parts.pop()),
                        name => parts.push(name),
                    }
                }
                path = parts.join(&b'/');
            }
        }
    }
    None
}

/// A part of a file.
struct Part<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Part<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = self.file.read_at(&mut buffer[..most], self.at)?;
        self.at += read as u64;
        self.left -= read as u64;
        Ok(read)
    }
}
