//! What was imported before: the nodes of images and archives, by what identifies them.
//!
//! A file in the state directory with a line for each import, the latest last: key, tab, node. Whoever loses the race to write
//! it imports again, which changes nothing.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
};

use cofferdam_castore::{B3Digest, Node, Store};
use futures::executor::block_on;

use crate::cli::{
    CliError, ClientArgs,
    node_text::{self, Reference},
    state_dir,
};

const FILE: &str = "imported";

/// Most lines. The oldest goes first.
const MAX_LINES: usize = 1000;

/// Most bytes that are read of the file.
const MAX_BYTES: u64 = 1024 * 1024;

/// Changes whenever the same image would become another node.
const RULES: &str = "1";

/// The imports into one store.
pub(super) struct Memo {
    file: PathBuf,
    /// Tells the store from others.
    store: String,
}

impl Memo {
    pub(super) fn new(client: &ClientArgs) -> Result<Self, CliError> {
        let (blobs, directories) = client.store_addrs().resolve()?;
        Ok(Self { file: state_dir()?.join(FILE), store: format!("{RULES}\n{blobs}\n{directories}\n") })
    }

    /// The node of an earlier import, if the store still has it. A store has everything below a directory that it has. From now
    /// on it keeps this for as long as if it had just been imported, unless it takes whole trees only, as a daemon does.
    pub(super) fn find(&self, store: &Store, key: &str) -> Option<Node> {
        let key = self.digest(key);
        let text = read(&self.file).ok()?;
        let node = text.lines().rev().find_map(|line| line.strip_prefix(&key)?.strip_prefix('\t'))?;
        let Ok(Reference::Node(node @ Node::Directory { digest, .. })) = node.parse() else { return None };
        let directory = block_on(store.directories.get(&digest)).ok()??;
        if let Err(error) = block_on(store.directories.put(directory)) {
            tracing::debug!(%error, "an earlier import isn't renewed");
        }
        Some(node)
    }

    /// Remembers an import. If that fails, it is done again the next time.
    pub(super) fn remember(&self, key: &str, node: &Node) {
        if let Err(error) = self.write(&format!("{}\t{}", self.digest(key), node_text::format(node))) {
            tracing::warn!(file = ?self.file, %error, "an import can't be remembered");
        }
    }

    fn write(&self, line: &str) -> io::Result<()> {
        let text = read(&self.file).unwrap_or_default();
        let mut lines: Vec<_> = text.lines().collect();
        lines.push(line);
        let dir = self.file.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(dir)?;
        let mut new = tempfile::Builder::new().prefix(".imported-").tempfile_in(dir)?;
        for line in &lines[lines.len().saturating_sub(MAX_LINES)..] {
            writeln!(new, "{line}")?;
        }
        new.persist(&self.file)?;
        Ok(())
    }

    fn digest(&self, key: &str) -> String {
        B3Digest::of(format!("{}{key}", self.store).as_bytes()).to_string()
    }
}

fn read(file: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(file)?.take(MAX_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use cofferdam_castore::Directory;

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn an_import_into_a_store_of_whole_trees_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::from_addrs("memory://", &format!("objectstore+file://{}", dir.path().display())).unwrap();
        let link = Node::Symlink { target: "t".try_into().unwrap() };
        let below = Directory::try_from_iter([("l".try_into().unwrap(), link)]).unwrap();
        let root = Directory::try_from_iter([("below".try_into().unwrap(), below.to_node())]).unwrap();
        let mut putter = store.directories.put_multiple_start();
        for directory in [below, root.clone()] {
            putter.put(directory).await.unwrap();
        }
        putter.close().await.unwrap();
        assert!(store.directories.put(root.clone()).await.is_err(), "it takes a part of a tree");
        let memo = Memo { file: dir.path().join("imported"), store: String::new() };
        memo.remember("key", &root.to_node());
        assert_eq!(memo.find(&store, "key"), Some(root.to_node()));
    }

    #[test]
    fn only_what_the_store_has_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let memo = |store: &str| Memo { file: dir.path().join("state/imported"), store: store.to_owned() };
        let store = Store::memory();
        let link = Node::Symlink { target: "t".try_into().unwrap() };
        let directory = Directory::try_from_iter([("l".try_into().unwrap(), link)]).unwrap();
        let node = directory.to_node();
        assert_eq!(memo("a").find(&store, "key"), None);
        memo("a").remember("key", &node);
        assert_eq!(memo("a").find(&store, "key"), None, "the store doesn't have it");
        block_on(store.directories.put(directory)).unwrap();
        assert_eq!(memo("a").find(&store, "key"), Some(node.clone()));
        assert_eq!(memo("a").find(&store, "other"), None);
        assert_eq!(memo("b").find(&store, "key"), None, "it is another store");
        for number in 0..MAX_LINES {
            memo("a").remember(&number.to_string(), &node);
        }
        assert_eq!(memo("a").find(&store, "key"), None, "the oldest is forgotten");
        assert_eq!(memo("a").find(&store, "0"), Some(node));
        assert_eq!(read(&memo("a").file).unwrap().lines().count(), MAX_LINES);
    }
}
