//! Checks all that the device will rely on, and finds places.

use std::collections::HashMap;

use cofferdam_castore::{B3Digest, Directory, Node, PathComponent};
use tokio::task::consume_budget;

use super::closure::{Known, is_endless};
use super::{MAX_DEPTH, Place, ResolveError};

/// Visits every directory once. Directories are decoded only to name a place.
pub(super) struct Walk<'a> {
    directories: &'a HashMap<B3Digest, Known>,
    /// From the root to the directory being visited.
    open: Vec<Open<'a>>,
    /// Directories in the longest path below each directory that has been visited.
    heights: HashMap<B3Digest, usize>,
}

struct Open<'a> {
    /// `None` for the root.
    digest: Option<B3Digest>,
    directory: &'a Known,
    /// How many of its children have been visited. The last one may be open.
    visited: usize,
    height: usize,
}

impl<'a> Open<'a> {
    fn new(digest: Option<B3Digest>, directory: &'a Known) -> Self {
        Self { digest, directory, visited: 0, height: 0 }
    }

    /// The position and the name of one of its entries.
    fn find(&self, is_wanted: impl FnMut(&Node) -> bool) -> Option<(usize, PathComponent)> {
        // It has been decoded before.
        let directory = Directory::decode(&self.directory.encoded).ok()?;
        let mut is_wanted = is_wanted;
        let mut entries = directory.nodes().enumerate();
        entries.find(|(_, (_, node))| is_wanted(node)).map(|(index, (name, _))| (index, name.clone()))
    }

    /// The position and the name of the child that was visited last.
    fn last_child(&self) -> Option<(usize, PathComponent)> {
        let mut children = 0;
        self.find(|node| {
            children += usize::from(matches!(node, Node::Directory { .. }));
            children == self.visited && children > 0
        })
    }
}

impl<'a> Walk<'a> {
    pub(super) fn new(root: &'a Known, directories: &'a HashMap<B3Digest, Known>) -> Self {
        Self { directories, open: vec![Open::new(None, root)], heights: HashMap::new() }
    }

    /// Visits everything.
    pub(super) async fn check(mut self) -> Result<(), ResolveError> {
        self.visit(|_| None).await.map(drop)
    }

    /// The place of a file with these contents.
    pub(super) async fn find_blob(mut self, wanted: &B3Digest) -> Result<Place, ResolveError> {
        let found = self.visit(|walk| walk.file(|node| matches!(node, Node::File { digest, .. } if digest == wanted)));
        Ok(found.await?.unwrap_or(Place { input: 0, path: String::new() }))
    }

    /// Visits each directory, until `look` finds a place in one.
    async fn visit(&mut self, look: impl Fn(&Self) -> Option<Place>) -> Result<Option<Place>, ResolveError> {
        if let Some(found) = self.arrive(&look)? {
            return Ok(Some(found));
        }
        while let Some(open) = self.open.last_mut() {
            consume_budget().await;
            let Some(&(digest, size)) = open.directory.children.get(open.visited) else {
                self.close();
                continue;
            };
            open.visited += 1;
            if self.enter(digest, size)?
                && let Some(found) = self.arrive(&look)?
            {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// The directory opened last is seen for the first time.
    fn arrive(&self, look: impl Fn(&Self) -> Option<Place>) -> Result<Option<Place>, ResolveError> {
        if self.open.last().is_some_and(|open| open.directory.has_endless_file) {
            let place = self.file(is_endless).unwrap_or_else(|| self.place());
            let limit = i64::MAX.unsigned_abs();
            return Err(ResolveError::Limit { place, what: "bytes in a file", limit });
        }
        Ok(look(self))
    }

    /// Whether the directory has been opened: it is new, and its children are to be visited.
    fn enter(&mut self, digest: B3Digest, claimed: u64) -> Result<bool, ResolveError> {
        let Some(directory) = self.directories.get(&digest) else {
            return Err(ResolveError::Missing { place: self.place(), kind: "directory", digest });
        };
        let actual = directory.sizes.expect(claimed);
        if actual != claimed {
            return Err(ResolveError::Size { place: self.place(), digest, actual, claimed });
        }
        let visited = self.heights.get(&digest).copied();
        // The root is open too, and isn't counted.
        if self.open.len() + visited.unwrap_or(0) > MAX_DEPTH {
            let limit = MAX_DEPTH as u64;
            return Err(ResolveError::Limit { place: self.place(), what: "nested directories", limit });
        }
        match visited {
            Some(height) => self.raise(height + 1),
            None => self.open.push(Open::new(Some(digest), directory)),
        }
        Ok(visited.is_none())
    }

    fn close(&mut self) {
        if let Some(Open { digest: Some(digest), height, .. }) = self.open.pop() {
            self.heights.insert(digest, height);
            self.raise(height + 1);
        }
    }

    fn raise(&mut self, height: usize) {
        if let Some(open) = self.open.last_mut() {
            open.height = open.height.max(height);
        }
    }

    /// The place of a file in the directory that was opened last.
    fn file(&self, is_wanted: impl Fn(&Node) -> bool) -> Option<Place> {
        let (last, above) = self.open.split_last()?;
        let found = last.find(is_wanted)?;
        Some(joined(above.iter().filter_map(Open::last_child).chain([found])))
    }

    /// Where the directory is that was visited last.
    fn place(&self) -> Place {
        joined(self.open.iter().filter_map(Open::last_child))
    }
}

/// The place with these positions and names, from the root on.
fn joined(mut names: impl Iterator<Item = (usize, PathComponent)>) -> Place {
    let Some((input, name)) = names.next() else { return Place { input: 0, path: String::new() } };
    let path = names.fold(name.to_string(), |path, (_, name)| format!("{path}/{name}"));
    Place { input, path }
}
