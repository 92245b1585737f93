//! A second, small implementation of castore's digests. It was written from the format's description alone, so that it
//! doesn't repeat a mistake of the program under test.

use std::{
    fmt, fs,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::Path,
};

use data_encoding::BASE64;
use serde_json::Value;

/// A node as `cofferdam` prints it: `dir:DIGEST:SIZE`, `file:DIGEST:BYTES`, with `:x` when executable, or
/// `link:TARGET`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeText(String);

impl NodeText {
    /// A file.
    pub fn file(contents: &[u8], executable: bool) -> Self {
        Self::of_file(blake3::hash(contents).as_bytes(), contents.len() as u64, executable)
    }

    /// A symlink whose target needs no escape.
    pub fn symlink(target: &str) -> Self {
        Self(format!("link:{target}"))
    }

    fn of_file(digest: &[u8], size: u64, executable: bool) -> Self {
        let executable = if executable { ":x" } else { "" };
        Self(format!("file:blake3-{}:{size}{executable}", BASE64.encode(digest)))
    }

    fn of_directory(digest: &[u8], size: u64) -> Self {
        Self(format!("dir:blake3-{}:{size}", BASE64.encode(digest)))
    }

    /// From an `Entry` in ProtoJSON.
    pub(crate) fn from_json(entry: &Value) -> Option<Self> {
        let digest = |value: &Value| BASE64.decode(value["digest"].as_str()?.as_bytes()).ok();
        // A size of 0 is left out.
        let size = |value: &Value| value["size"].as_str().map_or(Some(0), |size| size.parse().ok());
        if let Some(directory) = entry.get("directory") {
            return Some(Self::of_directory(&digest(directory)?, size(directory)?));
        }
        if let Some(file) = entry.get("file") {
            return Some(Self::of_file(&digest(file)?, size(file)?, file["executable"] == true));
        }
        let target = BASE64.decode(entry.get("symlink")?["target"].as_str()?.as_bytes()).ok()?;
        Some(Self::symlink(&String::from_utf8(target).ok()?))
    }

    /// From the program's plain output.
    pub fn printed(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// In the form of a command line.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The digest alone; symlinks have none.
    pub fn digest(&self) -> Option<&str> {
        self.0.split(':').find(|part| part.starts_with("blake3-"))
    }
}

impl fmt::Display for NodeText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The node of a path of this host.
///
/// # Panics
///
/// When it can't be read, or is neither a file nor a directory nor a symlink.
pub fn node_of(path: &Path) -> NodeText {
    match Entry::of(path) {
        Entry::Directory { digest, size } => NodeText::of_directory(&digest, size),
        Entry::File { digest, size, executable } => NodeText::of_file(&digest, size, executable),
        Entry::Symlink { target } => NodeText::symlink(&String::from_utf8_lossy(&target)),
    }
}

enum Entry {
    Directory { digest: [u8; 32], size: u64 },
    File { digest: [u8; 32], size: u64, executable: bool },
    Symlink { target: Vec<u8> },
}

impl Entry {
    fn of(path: &Path) -> Self {
        let metadata = path.symlink_metadata().expect("the path is there");
        if metadata.is_symlink() {
            let target = fs::read_link(path).expect("it is a symlink");
            return Self::Symlink { target: target.as_os_str().as_bytes().to_vec() };
        }
        if metadata.is_file() {
            let contents = fs::read(path).expect("the file can be read");
            let executable = metadata.permissions().mode() & 0o100 != 0;
            return Self::File { digest: *blake3::hash(&contents).as_bytes(), size: contents.len() as u64, executable };
        }
        let mut names: Vec<_> = fs::read_dir(path)
            .expect("it is a directory")
            .map(|entry| entry.expect("the directory can be read").file_name())
            .collect();
        names.sort_by(|a, b| a.as_bytes().cmp(b.as_bytes()));
        let (mut directories, mut files, mut symlinks) = (Vec::new(), Vec::new(), Vec::new());
        let mut size = 0;
        for name in names {
            // Like the programs of snix.
            size += 2;
            let (list, number, mut message) = match Self::of(&path.join(&name)) {
                Self::Directory { digest, size: below } => {
                    size += below;
                    (&mut directories, 1, [bytes_field(2, &digest), integer_field(3, below)].concat())
                }
                Self::File { digest, size, executable } => {
                    let rest = [bytes_field(2, &digest), integer_field(3, size), integer_field(4, executable.into())];
                    (&mut files, 2, rest.concat())
                }
                Self::Symlink { target } => (&mut symlinks, 3, bytes_field(2, &target)),
            };
            message.splice(0..0, bytes_field(1, name.as_bytes()));
            list.extend(bytes_field(number, &message));
        }
        let encoded = [directories, files, symlinks].concat();
        Self::Directory { digest: *blake3::hash(&encoded).as_bytes(), size }
    }
}

/// A field of bytes, or of a message: tag with wire type 2, length, contents.
fn bytes_field(number: u8, bytes: &[u8]) -> Vec<u8> {
    [vec![number << 3 | 2], varint(bytes.len() as u64), bytes.to_vec()].concat()
}

/// A field of an integer or a bool, left out when 0: tag with wire type 0, value.
fn integer_field(number: u8, value: u64) -> Vec<u8> {
    if value == 0 { Vec::new() } else { [vec![number << 3], varint(value)].concat() }
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value > 0x7f {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}
