//! The directories of an import while it runs.

use std::path::{Path, PathBuf};

use super::files::as_path;
use crate::{Directory, DirectoryError, Node, PathComponent};

/// The index of a directory in the tree; 0 is the root.
pub(super) type Index = usize;

/// Directories become complete from the leaves to the root.
#[derive(Debug, Default)]
pub(super) struct Tree {
    open: Vec<Open>,
    complete: Vec<Directory>,
}

#[derive(Debug)]
struct Open {
    /// `None` for the root.
    place: Option<(Index, PathComponent)>,
    directory: Directory,
    /// How many of its own listing, batches of files and subdirectories are missing.
    missing: usize,
}

impl Tree {
    /// A tree with a root whose listing is missing.
    pub(super) fn new() -> Self {
        Self { open: vec![Open { place: None, directory: Directory::new(), missing: 1 }], complete: Vec::new() }
    }

    /// Adds a directory whose listing is missing. Its parent waits for it.
    pub(super) fn open(&mut self, parent: Index, name: PathComponent) -> Index {
        self.open[parent].missing += 1;
        self.open.push(Open { place: Some((parent, name)), directory: Directory::new(), missing: 1 });
        self.open.len() - 1
    }

    /// Adds to the number of missing batches of a directory.
    pub(super) fn add_missing_batches(&mut self, index: Index, batches: usize) {
        self.open[index].missing += batches;
    }

    /// Adds the nodes of a listing or batch, which is no longer missing. `true` when the root is complete.
    pub(super) fn add_nodes(
        &mut self,
        mut index: Index,
        nodes: impl IntoIterator<Item = (PathComponent, Node)>,
    ) -> Result<bool, DirectoryError> {
        for (name, node) in nodes {
            self.open[index].directory.add(name, node)?;
        }
        loop {
            let open = &mut self.open[index];
            open.missing -= 1;
            if open.missing > 0 {
                return Ok(false);
            }
            let directory = std::mem::take(&mut open.directory);
            let node = directory.to_node();
            self.complete.push(directory);
            let Some((parent, name)) = open.place.clone() else { return Ok(true) };
            self.open[parent].directory.add(name, node)?;
            index = parent;
        }
    }

    /// The path of a directory; `root` is the path of the root.
    pub(super) fn path(&self, root: &Path, mut index: Index) -> PathBuf {
        let mut names = Vec::new();
        while let Some((parent, name)) = &self.open[index].place {
            names.push(as_path(name.as_bytes()));
            index = *parent;
        }
        std::iter::once(root).chain(names.into_iter().rev()).collect()
    }

    /// All directories, leaves first.
    pub(super) fn into_complete(self) -> Vec<Directory> {
        self.complete
    }
}
