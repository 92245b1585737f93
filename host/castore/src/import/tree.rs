//! The directories of an import, as far as they are known.

use std::path::{Path, PathBuf};

use super::files::as_path;
use crate::{Directory, DirectoryError, Node, PathComponent};

/// A directory of the tree; 0 is the root.
pub(super) type Index = usize;

/// Becomes whole from the leaves to the root.
#[derive(Debug, Default)]
pub(super) struct Tree {
    open: Vec<Open>,
    whole: Vec<Directory>,
}

#[derive(Debug)]
struct Open {
    /// `None` for the root.
    place: Option<(Index, PathComponent)>,
    directory: Directory,
    /// Its own listing, batches of its files and subdirectories that are still to come.
    awaited: usize,
}

impl Tree {
    /// A tree of which only the root is known, which awaits its listing.
    pub(super) fn new() -> Self {
        Self { open: vec![Open { place: None, directory: Directory::new(), awaited: 1 }], whole: Vec::new() }
    }

    /// Adds a directory that awaits its listing; its parent awaits it from now on.
    pub(super) fn open(&mut self, parent: Index, name: PathComponent) -> Index {
        self.open[parent].awaited += 1;
        self.open.push(Open { place: Some((parent, name)), directory: Directory::new(), awaited: 1 });
        self.open.len() - 1
    }

    /// Makes a directory await so many more batches of files.
    pub(super) fn await_batches(&mut self, index: Index, batches: usize) {
        self.open[index].awaited += batches;
    }

    /// Adds what a listing or a batch has given, and so ends waiting for it. `true` when the root is whole.
    pub(super) fn settle(
        &mut self,
        mut index: Index,
        nodes: impl IntoIterator<Item = (PathComponent, Node)>,
    ) -> Result<bool, DirectoryError> {
        for (name, node) in nodes {
            self.open[index].directory.add(name, node)?;
        }
        loop {
            let open = &mut self.open[index];
            open.awaited -= 1;
            if open.awaited > 0 {
                return Ok(false);
            }
            let directory = std::mem::take(&mut open.directory);
            let node = directory.to_node();
            self.whole.push(directory);
            let Some((parent, name)) = open.place.clone() else { return Ok(true) };
            self.open[parent].directory.add(name, node)?;
            index = parent;
        }
    }

    /// Where a directory is, below the root's own path.
    pub(super) fn path(&self, root: &Path, mut index: Index) -> PathBuf {
        let mut names = Vec::new();
        while let Some((parent, name)) = &self.open[index].place {
            names.push(as_path(name.as_bytes()));
            index = *parent;
        }
        std::iter::once(root).chain(names.into_iter().rev()).collect()
    }

    /// All directories, leaves first.
    pub(super) fn into_whole(self) -> Vec<Directory> {
        self.whole
    }
}
