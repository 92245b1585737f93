//! Store paths of Nix that were imported before, so that they aren't hashed for each build.
//!
//! A file in the state directory with a line for each path, the latest last: key, tab, node. Nix never changes a store path while it
//! is valid. The key also has the inode of the path and the time of its last change, so a path that was deleted and built again is
//! imported again.
//!
//! Whoever can write this file chooses what builds see. It is used only if it belongs to this user and nobody else can write it,
//! which also holds for the store beside it.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, BufWriter, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use cofferdam_castore::{B3Digest, Node};
use nix::{libc, unistd::geteuid};

use crate::cli::{
    CliError, ClientArgs,
    node_text::{self, Reference},
    state_dir,
};

const FILE: &str = "imported-store-paths";

/// Most lines. The oldest goes first.
const MAX_LINES: usize = 100_000;

/// Most bytes that are read of the file.
const MAX_BYTES: u64 = 64 * 1024 * 1024;

/// What was imported into one store.
pub(super) struct KnownPaths {
    file: PathBuf,
    /// Tells the store from others.
    store: String,
    known: HashMap<String, Node>,
    added: Vec<(String, Node)>,
    has_found: bool,
}

impl KnownPaths {
    pub(super) fn open(client: &ClientArgs) -> Result<Self, CliError> {
        let (blobs, directories) = client.store_addrs().resolve()?;
        Ok(Self::at(state_dir()?.join(FILE), format!("{blobs}\n{directories}\n")))
    }

    fn at(file: PathBuf, store: String) -> Self {
        let text = read(&file).unwrap_or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(?file, %error, "it isn't known what was imported before");
            }
            String::new()
        });
        let entry = |line: &str| {
            let (key, node) = line.split_once('\t')?;
            let Ok(Reference::Node(node)) = node.parse() else { return None };
            Some((key.to_owned(), node))
        };
        let known = text.lines().filter_map(entry).collect();
        Self { file, store, known, added: Vec::new(), has_found: false }
    }

    /// What a path is known by, as long as it is the same.
    pub(super) fn key(&self, path: &Path) -> Result<String, CliError> {
        let read = fs::symlink_metadata(path);
        let found = read.map_err(|error| CliError::at_path(format!("can't read the input {path:?}"), error))?;
        let (seconds, nanos) = (found.ctime(), found.ctime_nsec());
        let identity = format!("{}\n{}\n{seconds}.{nanos}\n{}", found.dev(), found.ino(), path.display());
        Ok(B3Digest::of(format!("{}{identity}", self.store).as_bytes()).to_string())
    }

    /// The node of an earlier import, which the store may have collected meanwhile.
    pub(super) fn find(&mut self, key: &str) -> Option<Node> {
        let node = self.known.get(key).cloned();
        self.has_found |= node.is_some();
        node
    }

    /// Whether anything was found.
    pub(super) fn has_found(&self) -> bool {
        self.has_found
    }

    /// Finds nothing from now on.
    pub(super) fn forget(&mut self) {
        self.known.clear();
        self.has_found = false;
    }

    pub(super) fn add(&mut self, key: String, node: Node) {
        self.added.push((key, node));
    }

    /// Writes down what was added. If that fails, or another process does so at the same time, it is imported again.
    pub(super) fn save(&mut self) {
        let added = std::mem::take(&mut self.added);
        if added.is_empty() {
            return;
        }
        if let Err(error) = self.write(&added) {
            tracing::warn!(file = ?self.file, %error, "imports can't be remembered");
        }
        self.known.extend(added);
    }

    fn write(&self, added: &[(String, Node)]) -> io::Result<()> {
        let text = read(&self.file).unwrap_or_default();
        let added = added.iter().map(|(key, node)| format!("{key}\t{}", node_text::format(node)));
        let lines: Vec<_> = text.lines().map(ToOwned::to_owned).chain(added).collect();
        let dir = self.file.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(dir)?;
        let new = tempfile::Builder::new().prefix(".imported-").tempfile_in(dir)?;
        let mut writer = BufWriter::new(&new);
        for line in &lines[lines.len().saturating_sub(MAX_LINES)..] {
            writeln!(writer, "{line}")?;
        }
        writer.flush()?;
        drop(writer);
        new.persist(&self.file)?;
        Ok(())
    }
}

fn read(file: &Path) -> io::Result<String> {
    let opened = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC).open(file)?;
    let metadata = opened.metadata()?;
    if metadata.uid() != geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
        return Err(io::Error::other("it must belong to this user, and only this user may write it"));
    }
    let mut text = String::new();
    opened.take(MAX_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn link() -> Node {
        Node::Symlink { target: "t".try_into().unwrap() }
    }

    #[test]
    fn a_path_is_known_until_it_is_made_again_and_to_its_store_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("path");
        fs::write(&path, "contents").unwrap();
        let at = |store: &str| KnownPaths::at(dir.path().join("state/file"), store.to_owned());
        let mut known = at("a");
        let key = known.key(&path).unwrap();
        assert!(known.find(&key).is_none() && !known.has_found());
        known.add(key.clone(), link());
        known.save();

        let mut known = at("a");
        assert_eq!(known.find(&known.key(&path).unwrap()), Some(link()));
        assert!(known.has_found());
        known.forget();
        assert!(known.find(&key).is_none() && !known.has_found());
        let mut other = at("b");
        assert_eq!(other.find(&other.key(&path).unwrap()), None);

        fs::rename(&path, dir.path().join("old")).unwrap();
        fs::write(&path, "contents").unwrap();
        let mut known = at("a");
        assert_eq!(known.find(&known.key(&path).unwrap()), None, "it was made again");
        assert!(known.key(&dir.path().join("nowhere")).is_err());
    }

    #[test]
    fn a_file_that_others_can_write_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        let mut known = KnownPaths::at(file.clone(), String::new());
        known.add("key".to_owned(), link());
        known.save();
        let find = |file: &Path| KnownPaths::at(file.to_owned(), String::new()).find("key");
        assert_eq!(find(&file), Some(link()));
        let another = dir.path().join("link");
        std::os::unix::fs::symlink(&file, &another).unwrap();
        assert_eq!(find(&another), None);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o620)).unwrap();
        assert_eq!(find(&file), None);
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        let mut known = KnownPaths::at(file.clone(), String::new());
        for number in 0..=MAX_LINES {
            known.add(number.to_string(), link());
        }
        known.save();
        let mut known = KnownPaths::at(file, String::new());
        assert_eq!(known.find("0"), None);
        assert_eq!(known.find("1"), Some(link()));
    }
}
