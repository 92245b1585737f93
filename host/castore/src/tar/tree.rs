//! Collects the entries of an archive, which come in any order, into directories.

use std::collections::{BTreeMap, btree_map::Entry};

use super::read::{Entries, unsupported};
use crate::{
    Directory, Node, PathComponent,
    archive::{ArchiveError, Ingest, MAX_DEPTH},
};

/// The index of a directory in the tree; 0 is the root. Parents come before their children.
type Index = usize;

pub(super) struct Tree {
    directories: Vec<BTreeMap<PathComponent, Child>>,
}

enum Child {
    Directory(Index),
    Leaf(Node),
}

impl Tree {
    pub(super) fn new() -> Self {
        Self { directories: vec![BTreeMap::new()] }
    }

    /// Adds a file or symbolic link at `path`. Replaces an earlier one.
    fn leaf(&mut self, path: &[u8], node: Node, ingest: &mut Ingest) -> Result<(), ArchiveError> {
        let components = components(path)?;
        let Some((name, above)) = components.split_last() else {
            return Err(ArchiveError::malformed(path, "the root of the archive is not a directory"));
        };
        let directory = self.enter(path, above, ingest)?;
        match self.directories[directory].entry(name.clone()) {
            Entry::Vacant(free) => {
                ingest.entry(path)?;
                free.insert(Child::Leaf(node));
            }
            Entry::Occupied(mut taken) => match taken.get_mut() {
                Child::Leaf(old) => *old = node,
                Child::Directory(_) => {
                    return Err(ArchiveError::malformed(path, "would replace a directory of the archive"));
                }
            },
        }
        Ok(())
    }

    /// The file or symbolic link at `target`, for a hard link at `path`.
    fn linked(&self, path: &[u8], target: &[u8]) -> Result<Node, ArchiveError> {
        let shown = target.escape_ascii();
        let missing = || {
            ArchiveError::malformed(path, format!("is a hard link to \"{shown}\", but no file before it has that path"))
        };
        let components = components(target)?;
        let (name, above) = components.split_last().ok_or_else(missing)?;
        let mut directory = 0;
        for name in above {
            match self.directories[directory].get(name) {
                Some(Child::Directory(below)) => directory = *below,
                _ => return Err(missing()),
            }
        }
        match self.directories[directory].get(name) {
            Some(Child::Leaf(node)) => Ok(node.clone()),
            _ => Err(missing()),
        }
    }

    /// All directories, leaves first.
    pub(super) fn into_directories(self) -> Result<Vec<Directory>, ArchiveError> {
        let mut nodes: Vec<Option<Node>> = vec![None; self.directories.len()];
        let mut whole = Vec::with_capacity(self.directories.len());
        for (index, children) in self.directories.into_iter().enumerate().rev() {
            let mut directory = Directory::new();
            for (name, child) in children {
                let node = match child {
                    Child::Leaf(node) => node,
                    Child::Directory(below) => match nodes[below].take() {
                        Some(node) => node,
                        None => unreachable!("parents come before their children"),
                    },
                };
                directory.add(name, node).map_err(|error| ArchiveError::malformed(&[], error.to_string()))?;
            }
            nodes[index] = Some(directory.to_node());
            whole.push(directory);
        }
        Ok(whole)
    }

    fn enter(&mut self, path: &[u8], components: &[PathComponent], ingest: &mut Ingest) -> Result<Index, ArchiveError> {
        if components.len() > MAX_DEPTH {
            return Err(ArchiveError::malformed(path, format!("directories are nested deeper than {MAX_DEPTH}")));
        }
        let mut directory = 0;
        for name in components {
            let next = self.directories.len();
            directory = match self.directories[directory].entry(name.clone()) {
                Entry::Vacant(free) => {
                    ingest.entry(path)?;
                    free.insert(Child::Directory(next));
                    self.directories.push(BTreeMap::new());
                    next
                }
                Entry::Occupied(taken) => match taken.get() {
                    Child::Directory(below) => *below,
                    Child::Leaf(_) => {
                        let rule = format!(
                            "\"{name}\" in its path is a file or symbolic link of the archive, not a directory"
                        );
                        return Err(ArchiveError::malformed(path, rule));
                    }
                },
            };
        }
        Ok(directory)
    }
}

impl Entries for Tree {
    fn directory(&mut self, path: &[u8], ingest: &mut Ingest) -> Result<(), ArchiveError> {
        self.enter(path, &components(path)?, ingest).map(drop)
    }

    fn file(&mut self, path: &[u8], node: Node, _mode: u32, ingest: &mut Ingest) -> Result<(), ArchiveError> {
        self.leaf(path, node, ingest)
    }

    fn symlink(&mut self, path: &[u8], node: Node, ingest: &mut Ingest) -> Result<(), ArchiveError> {
        self.leaf(path, node, ingest)
    }

    fn hard_link(&mut self, path: &[u8], target: &[u8], ingest: &mut Ingest) -> Result<(), ArchiveError> {
        let node = self.linked(path, target)?;
        self.leaf(path, node, ingest)
    }

    fn special(&mut self, path: &[u8], kind: &str, _ingest: &mut Ingest) -> Result<(), ArchiveError> {
        Err(unsupported(path, kind))
    }
}

/// The components of a path in an archive. The root has none.
fn components(path: &[u8]) -> Result<Vec<PathComponent>, ArchiveError> {
    if path.starts_with(b"/") {
        let rule = "its path is absolute: make the archive with relative paths, as in `tar -C DIR -c .`";
        return Err(ArchiveError::malformed(path, rule));
    }
    parts(path)
}

/// The components of a path, whether it begins with a slash or not.
pub(super) fn parts(path: &[u8]) -> Result<Vec<PathComponent>, ArchiveError> {
    path.split(|&byte| byte == b'/')
        .filter(|part| !matches!(*part, b"" | b"."))
        .map(|part| PathComponent::try_from(part).map_err(|error| ArchiveError::malformed(path, error.to_string())))
        .collect()
}
