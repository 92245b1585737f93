use std::io::Read;

use super::{MAGIC, padding};
use crate::{
    Directory, Node, PathComponent, Store, SymlinkTarget,
    archive::{ArchiveError, Ingest, Limits, MAX_DEPTH},
};

/// Longest keyword of the format, in bytes.
const MAX_WORD_BYTES: u64 = 16;

/// Imports a NAR, durably. It must be canonical, to the last byte.
///
/// Blocks: call it from a thread that may.
///
/// # Errors
///
/// Names the path where the archive is wrong or the store failed. Nothing becomes visible in the store.
pub fn import(store: &Store, archive: impl Read, limits: Limits) -> Result<Node, ArchiveError> {
    let mut reader = Reader { input: archive, path: Vec::new(), ingest: Ingest::new(store, limits) };
    let (root, directories) = reader.archive()?;
    if reader.input.read(&mut [0]).map_err(|error| ArchiveError::read(&[], error))? != 0 {
        return Err(ArchiveError::malformed(&[], "goes on after its end"));
    }
    reader.ingest.finish(root, directories)
}

/// As [`import`], and leaves what follows the archive.
///
/// # Errors
///
/// As for [`import`].
pub fn import_next(store: &Store, input: impl Read, limits: Limits) -> Result<Node, ArchiveError> {
    let mut reader = Reader { input, path: Vec::new(), ingest: Ingest::new(store, limits) };
    let (root, directories) = reader.archive()?;
    reader.ingest.finish(root, directories)
}

struct Reader<R> {
    input: R,
    /// The path of the current entry from the root, with slashes.
    path: Vec<u8>,
    ingest: Ingest,
}

/// A directory whose entries are being read.
struct Open {
    directory: Directory,
    /// The name of the last entry.
    last: Option<PathComponent>,
    path_bytes: usize,
}

impl<R: Read> Reader<R> {
    /// Reads an archive to its end. Returns its root and all directories, leaves first.
    fn archive(&mut self) -> Result<(Node, Vec<Directory>), ArchiveError> {
        let mut begin = [0; 24];
        self.read(&mut begin)?;
        if begin != [&MAGIC.len().to_le_bytes(), MAGIC, &[0; 3]].concat()[..] {
            return Err(self.refused("is not a NAR, which begins with \"nix-archive-1\""));
        }
        let mut whole = Vec::new();
        let mut open: Vec<Open> = Vec::new();
        let mut begun = self.node()?;
        let root = loop {
            match begun {
                None if open.len() > MAX_DEPTH => {
                    return Err(self.refused(format!("directories are nested deeper than {MAX_DEPTH}")));
                }
                None => open.push(Open { directory: Directory::new(), last: None, path_bytes: self.path.len() }),
                Some(node) => {
                    let Some(Open { directory, last: Some(name), path_bytes }) = open.last_mut() else { break node };
                    self.expect(b")")?;
                    let added = directory.add(name.clone(), node);
                    added.map_err(|error| self.refused(error.to_string()))?;
                    self.path.truncate(*path_bytes);
                }
            }
            let Some(innermost) = open.last_mut() else { unreachable!("a node without a parent ends the loop") };
            begun = if self.next_entry(innermost)? {
                self.node()?
            } else {
                let directory = std::mem::take(&mut innermost.directory);
                open.pop();
                let node = directory.to_node();
                whole.push(directory);
                Some(node)
            };
        };
        Ok((root, whole))
    }

    /// Reads the next entry up to its node. `false` at the end of the directory.
    fn next_entry(&mut self, directory: &mut Open) -> Result<bool, ArchiveError> {
        match &*self.word()? {
            b")" => return Ok(false),
            b"entry" => {}
            other => return Err(self.unexpected("\"entry\" or \")\"", other)),
        }
        self.expect(b"(")?;
        self.expect(b"name")?;
        let name = self.string(PathComponent::MAX_BYTES as u64)?;
        let name = PathComponent::try_from(name).map_err(|error| self.refused(error.to_string()))?;
        if let Some(last) = directory.last.take().filter(|last| *last >= name) {
            return Err(
                self.refused(format!("the entry \"{name}\" comes after \"{last}\"; entries are sorted by name"))
            );
        }
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(name.as_bytes());
        directory.last = Some(name);
        self.expect(b"node")?;
        Ok(true)
    }

    /// Reads a file or symbolic link. `None` when a directory begins.
    fn node(&mut self) -> Result<Option<Node>, ArchiveError> {
        self.ingest.entry(&self.path)?;
        self.expect(b"(")?;
        self.expect(b"type")?;
        let node = match &*self.word()? {
            b"directory" => return Ok(None),
            b"symlink" => {
                self.expect(b"target")?;
                let target = self.string(SymlinkTarget::MAX_BYTES as u64)?;
                let target = SymlinkTarget::try_from(target).map_err(|error| self.refused(error.to_string()))?;
                Node::Symlink { target }
            }
            b"regular" => self.file()?,
            other => return Err(self.unexpected("\"regular\", \"symlink\" or \"directory\"", other)),
        };
        self.expect(b")")?;
        Ok(Some(node))
    }

    fn file(&mut self) -> Result<Node, ArchiveError> {
        let mut word = self.word()?;
        let executable = *word == *b"executable";
        if executable {
            self.expect(b"")?;
            word = self.word()?;
        }
        if *word != *b"contents" {
            return Err(self.unexpected("\"contents\"", &word));
        }
        let size = self.length()?;
        let Self { input, path, ingest } = self;
        let node = ingest.file(path, input, size, executable)?;
        self.end_string(size)?;
        Ok(node)
    }

    fn expect(&mut self, expected: &[u8]) -> Result<(), ArchiveError> {
        let word = self.word()?;
        if word == expected {
            return Ok(());
        }
        Err(self.unexpected(&format!("\"{}\"", expected.escape_ascii()), &word))
    }

    fn word(&mut self) -> Result<Vec<u8>, ArchiveError> {
        self.string(MAX_WORD_BYTES)
    }

    fn string(&mut self, max: u64) -> Result<Vec<u8>, ArchiveError> {
        let length = self.length()?;
        if length > max {
            return Err(self.refused(format!("here is a string of {length} bytes, where at most {max} may be")));
        }
        let mut string = vec![0; usize::try_from(length).unwrap_or(0)];
        self.read(&mut string)?;
        self.end_string(length)?;
        Ok(string)
    }

    fn length(&mut self) -> Result<u64, ArchiveError> {
        let mut length = [0; 8];
        self.read(&mut length)?;
        Ok(u64::from_le_bytes(length))
    }

    fn end_string(&mut self, length: u64) -> Result<(), ArchiveError> {
        let mut zeros = [0; 8];
        let zeros = &mut zeros[..padding(length)];
        self.read(zeros)?;
        if zeros.iter().any(|&zero| zero != 0) {
            return Err(self.refused("a string is padded with other bytes than zeros"));
        }
        Ok(())
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<(), ArchiveError> {
        self.input.read_exact(bytes).map_err(|error| ArchiveError::read(&self.path, error))
    }

    fn unexpected(&self, expected: &str, found: &[u8]) -> ArchiveError {
        self.refused(format!("here is \"{}\" where {expected} must be", found.escape_ascii()))
    }

    fn refused(&self, rule: impl Into<String>) -> ArchiveError {
        ArchiveError::malformed(&self.path, rule)
    }
}
