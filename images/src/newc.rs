//! Archives in the cpio format "newc", which the kernel unpacks as its first file system. Linux's
//! `Documentation/driver-api/early-userspace/buffer-format.rst` describes the format.
//!
//! An archive depends only on names, modes and contents. It has no times, owners or inode numbers of the machine that
//! makes it.

/// `S_IFREG`, `S_IFDIR` and `S_IFCHR` of the mode field.
const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// The name of the last entry of every archive.
const TRAILER: &str = "TRAILER!!!";

/// An unfinished archive. Directories must be added before their contents, because the kernel makes no parents.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

struct Entry<'a> {
    name: &'a str,
    mode: u32,
    links: u32,
    device: (u32, u32),
    contents: &'a [u8],
}

impl Archive {
    /// Adds an empty directory.
    pub(crate) fn directory(&mut self, name: &str, permissions: u32) {
        self.add(&Entry { name, mode: DIRECTORY | permissions, links: 2, device: (0, 0), contents: &[] });
    }

    /// Adds a regular file.
    ///
    /// # Panics
    ///
    /// `contents` has 4 GiB or more, which the format does not support.
    pub(crate) fn file(&mut self, name: &str, permissions: u32, contents: &[u8]) {
        self.add(&Entry { name, mode: REGULAR | permissions, links: 1, device: (0, 0), contents });
    }

    /// Adds a character device. This needs no privileges.
    pub(crate) fn character_device(&mut self, name: &str, permissions: u32, major: u32, minor: u32) {
        let mode = CHARACTER_DEVICE | permissions;
        self.add(&Entry { name, mode, links: 1, device: (major, minor), contents: &[] });
    }

    /// Returns the finished archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entries = 0;
        self.add(&Entry { name: TRAILER, mode: 0, links: 1, device: (0, 0), contents: &[] });
        self.bytes
    }

    fn add(&mut self, entry: &Entry<'_>) {
        let length = u32::try_from(entry.contents.len()).expect("files of an initramfs are far below 4 GiB");
        let name_length = u32::try_from(entry.name.len() + 1).expect("names are short");
        let (major, minor) = entry.device;
        let header = [
            if entry.name == TRAILER { 0 } else { self.entries + 1 }, // inode
            entry.mode,
            0, // user
            0, // group
            entry.links,
            0, // mtime
            length,
            0, // major number of the inode's device
            0, // minor number of the inode's device
            major,
            minor,
            name_length,
            0, // checksum, unused in newc
        ];
        self.entries += 1;
        self.bytes.extend_from_slice(b"070701");
        for field in header {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(entry.name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(entry.contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn sample() -> Vec<u8> {
        let mut archive = Archive::default();
        archive.directory("dev", 0o755);
        archive.character_device("dev/console", 0o600, 5, 1);
        archive.file("init", 0o755, b"five!");
        archive.finish()
    }

    #[test]
    fn the_header_has_the_documented_layout() {
        let bytes = sample();
        assert_eq!(&bytes[..6], b"070701");
        let field = |number: usize| std::str::from_utf8(&bytes[6 + 8 * number..14 + 8 * number]).unwrap();
        assert_eq!(field(0), "00000001");
        assert_eq!(field(1), "000041ed");
        assert_eq!(field(11), "00000004");
        assert_eq!(&bytes[110..114], b"dev\0");
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn another_reader_finds_every_entry() {
        let archive = sample();
        let mut rest = archive.as_slice();
        let mut found = Vec::new();
        loop {
            let mut reader = cpio::newc::Reader::new(rest).unwrap();
            let entry = reader.entry().clone();
            if entry.is_trailer() {
                break;
            }
            let mut contents = Vec::new();
            reader.read_to_end(&mut contents).unwrap();
            assert_eq!((entry.uid(), entry.gid(), entry.mtime()), (0, 0, 0));
            found.push((entry.name().to_owned(), entry.mode(), contents));
            rest = reader.finish().unwrap();
        }
        assert_eq!(
            found,
            [
                ("dev".to_owned(), 0o040_755, Vec::new()),
                ("dev/console".to_owned(), 0o020_600, Vec::new()),
                ("init".to_owned(), 0o100_755, b"five!".to_vec()),
            ]
        );
    }
}
