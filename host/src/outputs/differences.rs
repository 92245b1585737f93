//! How two trees in the store differ.

use std::{collections::BTreeSet, io};

use cofferdam_castore::{B3Digest, Directory, Node, Store, blobservice::BlobReader};
use serde::{Deserialize, Serialize};
use similar::TextDiff;
use tokio::io::AsyncReadExt as _;

/// Most differences that are described. The others are counted.
const MAX_DESCRIBED: usize = 100;

/// Most differences with the lines that changed.
const MAX_WITH_LINES: usize = 10;

/// Largest file, in bytes and in lines, whose changed lines are shown: to find them takes their product.
const MAX_TEXT_BYTES: u64 = 64 * 1024;
const MAX_TEXT_LINES: usize = 2_000;

/// Most changed lines of one file that are shown, and most characters of one line.
const MAX_LINES: usize = 20;
const MAX_LINE_CHARS: usize = 160;

/// Most characters of a path, and of a symlink's target.
const MAX_PATH_CHARS: usize = 200;

const READ_BYTES: usize = 64 * 1024;

/// How two trees, or several pairs of them, differ.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Differences {
    /// The first ones, at most [`MAX_DESCRIBED`].
    pub described: Vec<Difference>,
    /// How many more there are.
    pub more: u64,
    with_lines: usize,
}

/// One path that differs. Names, targets and lines come from guests; control characters are escaped.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Difference {
    /// The path, with that of its output.
    pub path: String,
    /// How it differs.
    pub what: String,
    /// The lines that changed, each with `-` or `+` before it; empty unless it is a short text in both trees.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lines: Vec<String>,
}

impl Differences {
    /// How many there are.
    pub(crate) fn count(&self) -> u64 {
        self.described.len() as u64 + self.more
    }

    /// Adds the differences between two nodes at `path`, and below it.
    ///
    /// # Errors
    ///
    /// The store fails, or lacks a part of the trees.
    pub(crate) async fn add(&mut self, store: &Store, path: &str, earlier: &Node, later: &Node) -> io::Result<()> {
        let mut waiting = vec![(path.to_owned(), earlier.clone(), later.clone())];
        while let Some((path, earlier, later)) = waiting.pop() {
            if earlier == later {
                continue;
            }
            if let (Node::Directory { digest: earlier, .. }, Node::Directory { digest: later, .. }) = (&earlier, &later)
            {
                let (earlier, later) = (directory(store, earlier).await?, directory(store, later).await?);
                let names: BTreeSet<_> =
                    earlier.nodes().chain(later.nodes()).map(|(name, _)| name.as_bytes()).collect();
                for name in names.into_iter().rev() {
                    let path = format!("{path}/{}", name.escape_ascii());
                    match (earlier.get(name), later.get(name)) {
                        (Some(earlier), Some(later)) => waiting.push((path, earlier.clone(), later.clone())),
                        (Some(_), None) => self.push(&path, "it was there before".to_owned(), Vec::new()),
                        (None, _) => self.push(&path, "it was not there before".to_owned(), Vec::new()),
                    }
                }
                continue;
            }
            // Those that are only counted need not be read.
            let (what, lines) = match self.described.len() < MAX_DESCRIBED {
                true => self.describe(store, &earlier, &later).await?,
                false => Default::default(),
            };
            self.push(&path, what, lines);
        }
        Ok(())
    }

    fn push(&mut self, path: &str, what: String, lines: Vec<String>) {
        if self.described.len() == MAX_DESCRIBED {
            self.more += 1;
            return;
        }
        self.with_lines += usize::from(!lines.is_empty());
        self.described.push(Difference { path: cut(path, MAX_PATH_CHARS), what, lines });
    }

    async fn describe(&self, store: &Store, earlier: &Node, later: &Node) -> io::Result<(String, Vec<String>)> {
        Ok(match (earlier, later) {
            (Node::Symlink { target: earlier }, Node::Symlink { target: later }) => {
                let [earlier, later] =
                    [earlier, later].map(|target| cut(&target.as_bytes().escape_ascii().to_string(), MAX_PATH_CHARS));
                (format!("it pointed to {earlier} and points to {later}"), Vec::new())
            }
            (
                Node::File { digest: earlier, size: before, executable: was_executable },
                Node::File { digest: later, size: after, executable },
            ) => {
                let mut what = Vec::new();
                if was_executable != executable {
                    what.push(if *executable { "it is executable now" } else { "it was executable" }.to_owned());
                }
                if before != after {
                    what.push(format!("it had {before} bytes and has {after}"));
                }
                let mut lines = Vec::new();
                if earlier != later {
                    let at = first_difference(open(store, earlier).await?, open(store, later).await?).await?;
                    what.push(format!("byte {at} is the first that differs"));
                    if self.with_lines < MAX_WITH_LINES && *before.max(after) <= MAX_TEXT_BYTES {
                        let [earlier, later] = [read(store, earlier).await?, read(store, later).await?];
                        lines = changed_lines(&earlier, &later);
                    }
                }
                (what.join("; "), lines)
            }
            _ => (format!("it was {} and is {}", kind(earlier), kind(later)), Vec::new()),
        })
    }
}

fn kind(node: &Node) -> &'static str {
    match node {
        Node::Directory { .. } => "a directory",
        Node::File { .. } => "a file",
        Node::Symlink { .. } => "a symlink",
    }
}

async fn directory(store: &Store, digest: &B3Digest) -> io::Result<Directory> {
    let found = store.directories.get(digest).await?;
    // A store has the empty directory without storing it.
    found.or_else(|| (*digest == B3Digest::EMPTY).then(Directory::new)).ok_or_else(|| missing(digest))
}

async fn open(store: &Store, digest: &B3Digest) -> io::Result<Box<dyn BlobReader>> {
    store.blobs.open_read(digest).await?.ok_or_else(|| missing(digest))
}

fn missing(digest: &B3Digest) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("the store lacks {digest}"))
}

/// All of a blob of at most [`MAX_TEXT_BYTES`].
async fn read(store: &Store, digest: &B3Digest) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(store, digest).await?.take(MAX_TEXT_BYTES).read_to_end(&mut bytes).await?;
    Ok(bytes)
}

/// The offset of the first byte that differs, which is the end of the shorter one if that is how the other begins.
async fn first_difference(mut earlier: Box<dyn BlobReader>, mut later: Box<dyn BlobReader>) -> io::Result<u64> {
    let (mut at, mut buffers) = (0, [vec![0; READ_BYTES], vec![0; READ_BYTES]]);
    loop {
        let [one, other] = &mut buffers;
        let (one, other) = (fill(&mut earlier, one).await?, fill(&mut later, other).await?);
        let same = one.iter().zip(other).take_while(|(one, other)| one == other).count();
        at += same as u64;
        if same < READ_BYTES {
            return Ok(at);
        }
    }
}

/// Fills the buffer as far as the blob goes.
async fn fill<'a>(reader: &mut Box<dyn BlobReader>, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]).await? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(&buffer[..filled])
}

/// The lines that differ between two short texts. None if either is no text or too long.
fn changed_lines(earlier: &[u8], later: &[u8]) -> Vec<String> {
    let (Some(earlier), Some(later)) = (text(earlier), text(later)) else { return Vec::new() };
    let diff = TextDiff::from_lines(earlier, later);
    let changed = diff.iter_all_changes().filter(|change| change.tag() != similar::ChangeTag::Equal);
    let mut lines: Vec<_> = changed
        .take(MAX_LINES + 1)
        .map(|change| {
            let line = change.value().trim_end_matches('\n').escape_debug().to_string();
            format!("{}{}", change.tag(), cut(&line, MAX_LINE_CHARS))
        })
        .collect();
    if lines.len() > MAX_LINES {
        lines.truncate(MAX_LINES);
        lines.push("…".to_owned());
    }
    lines
}

fn text(bytes: &[u8]) -> Option<&str> {
    let text = str::from_utf8(bytes).ok()?;
    (!text.contains('\0') && text.lines().nth(MAX_TEXT_LINES).is_none()).then_some(text)
}

fn cut(text: &str, chars: usize) -> String {
    match text.char_indices().nth(chars) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, path::Path};

    use cofferdam_castore::import::import_path;

    use super::*;

    /// The differences between two trees, which these functions make in an empty directory each.
    async fn differences(earlier: impl Fn(&Path), later: impl Fn(&Path)) -> Differences {
        let store = Store::memory();
        let [earlier, later] = [&earlier as &dyn Fn(&Path), &later].map(|make| {
            let dir = tempfile::tempdir().unwrap();
            make(dir.path());
            import_path(&store, dir.path()).unwrap()
        });
        let mut differences = Differences::default();
        differences.add(&store, "out", &earlier, &later).await.unwrap();
        differences
    }

    fn told(differences: &Differences) -> Vec<(&str, &str, Vec<&str>)> {
        let described = differences.described.iter();
        described.map(|one| (&*one.path, &*one.what, one.lines.iter().map(String::as_str).collect())).collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn each_path_that_differs_is_told_with_how_it_does() {
        let earlier = |dir: &Path| {
            fs::create_dir_all(dir.join("same/deeper")).unwrap();
            fs::write(dir.join("same/deeper/file"), "x").unwrap();
            fs::create_dir(dir.join("a")).unwrap();
            fs::write(dir.join("a/text"), "one\ntwo\nthree\n").unwrap();
            fs::write(dir.join("a/binary"), b"\0\x01\x02").unwrap();
            fs::write(dir.join("gone"), "").unwrap();
            fs::write(dir.join("kind"), "").unwrap();
            symlink("x", dir.join("link")).unwrap();
        };
        let later = |dir: &Path| {
            earlier(dir);
            fs::write(dir.join("a/text"), "one\n2\x1b[31m\nthree\n").unwrap();
            fs::write(dir.join("a/binary"), b"\0\x01\x03\x04").unwrap();
            fs::remove_file(dir.join("gone")).unwrap();
            fs::write(dir.join("new"), "").unwrap();
            fs::remove_file(dir.join("kind")).unwrap();
            fs::create_dir(dir.join("kind")).unwrap();
            fs::remove_file(dir.join("link")).unwrap();
            symlink("y", dir.join("link")).unwrap();
        };
        let found = differences(earlier, later).await;
        let mut found = told(&found);
        found.sort_unstable();
        let text = "it had 14 bytes and has 17; byte 4 is the first that differs";
        let expected: [(&str, &str, Vec<&str>); 6] = [
            ("out/a/binary", "it had 3 bytes and has 4; byte 2 is the first that differs", vec![]),
            ("out/a/text", text, vec!["-two", "+2\\u{1b}[31m"]),
            ("out/gone", "it was there before", vec![]),
            ("out/kind", "it was a file and is a directory", vec![]),
            ("out/link", "it pointed to x and points to y", vec![]),
            ("out/new", "it was not there before", vec![]),
        ];
        assert_eq!(found, expected);
        assert_eq!(differences(earlier, earlier).await, Differences::default());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_flood_of_differences_is_counted_and_not_told() {
        let many = |prefix: &'static str, contents: &'static str| {
            move |dir: &Path| {
                for at in 0..MAX_DESCRIBED + 20 {
                    fs::write(dir.join(format!("{prefix}{at:03}{}", "n".repeat(200))), contents.repeat(at)).unwrap();
                }
            }
        };
        let found = differences(many("a", "x\n"), many("a", "y\n")).await;
        assert_eq!((found.described.len(), found.count()), (MAX_DESCRIBED, (MAX_DESCRIBED + 19) as u64));
        let with_lines: Vec<_> = found.described.iter().map(|one| one.lines.len()).filter(|&lines| lines > 0).collect();
        assert_eq!(with_lines.len(), MAX_WITH_LINES);
        assert!(with_lines.iter().all(|&lines| lines <= MAX_LINES + 1), "{with_lines:?}");
        assert!(found.described.iter().all(|one| one.path.chars().count() <= MAX_PATH_CHARS + 1));
        let found = differences(many("a", "x"), many("b", "x")).await;
        assert_eq!(found.count(), 2 * (MAX_DESCRIBED + 20) as u64);
    }
}
