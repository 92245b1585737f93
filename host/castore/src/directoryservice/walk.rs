use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
};

use futures::stream::{self, BoxStream, StreamExt as _};

use super::DirectoryService;
use crate::{B3Digest, Directory};

/// Directories that are requested at a time.
const BATCH: usize = 256;

/// Walks breadth first from the root. `get` is asked for up to [`BATCH`] directories at a time, and returns at least the
/// first of them, in order.
pub(super) fn breadth_first<'a, F>(
    root: &B3Digest,
    get: impl Fn(Vec<B3Digest>) -> F + Send + 'a,
) -> BoxStream<'a, io::Result<Directory>>
where
    F: Future<Output = io::Result<Vec<Option<Directory>>>> + Send + 'a,
{
    let walk = Walk { seen: HashSet::from([*root]), waiting: VecDeque::from([*root]), ready: VecDeque::new(), get };
    let root = *root;
    stream::unfold(Some(walk), move |walk| async move {
        let mut walk = walk?;
        match walk.next(&root).await {
            Ok(Some(directory)) => Some((Ok(directory), Some(walk))),
            Ok(None) => None,
            Err(error) => Some((Err(error), None)),
        }
    })
    .boxed()
}

/// Puts a tree, leaves first. `directories` contains all of it.
pub(crate) async fn put_tree(
    to: &dyn DirectoryService,
    root: &B3Digest,
    directories: &HashMap<B3Digest, Directory>,
) -> io::Result<()> {
    let mut putter = to.put_multiple_start();
    let mut seen = HashSet::new();
    // Each with whether everything below it has been put.
    let mut waiting = vec![(*root, false)];
    while let Some((digest, is_next)) = waiting.pop() {
        let Some(directory) = directories.get(&digest) else { continue };
        if is_next {
            putter.put(directory.clone()).await?;
        } else if seen.insert(digest) {
            waiting.push((digest, true));
            waiting.extend(directory.children().map(|(child, _)| (child, false)));
        }
    }
    putter.close().await.map(drop)
}

struct Walk<G> {
    seen: HashSet<B3Digest>,
    waiting: VecDeque<B3Digest>,
    ready: VecDeque<Directory>,
    get: G,
}

impl<G: Fn(Vec<B3Digest>) -> F, F: Future<Output = io::Result<Vec<Option<Directory>>>>> Walk<G> {
    async fn next(&mut self, root: &B3Digest) -> io::Result<Option<Directory>> {
        if self.ready.is_empty() {
            let batch: Vec<_> = self.waiting.iter().take(BATCH).copied().collect();
            if batch.is_empty() {
                return Ok(None);
            }
            let found = (self.get)(batch).await?;
            for (digest, found) in self.waiting.drain(..found.len()).zip(found) {
                match found {
                    Some(directory) => self.ready.push_back(directory),
                    None if digest == *root => return Ok(None),
                    None => {
                        let message = format!("the directory {digest}, which is below {root}, is not in the store");
                        return Err(io::Error::new(io::ErrorKind::NotFound, message));
                    }
                }
            }
        }
        let Some(directory) = self.ready.pop_front() else { return Ok(None) };
        for (child, _) in directory.children() {
            if self.seen.insert(child) {
                self.waiting.push_back(child);
            }
        }
        Ok(Some(directory))
    }
}
