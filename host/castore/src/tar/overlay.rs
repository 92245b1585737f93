//! The tree of a root: layers over each other, each with the rules of the OCI image specification.
//!
//! Every leaf and directory knows the layer that it comes from, since whiteouts only remove what lower layers have. Symbolic
//! links in the way to an entry are followed, but never out of the root, as in a root that layers are unpacked into.

use std::{collections::BTreeMap, mem};

use super::tree::parts;
use crate::{
    Node, PathComponent, SymlinkTarget,
    archive::{ArchiveError, Ingest, MAX_DEPTH},
};

/// Limit on the symbolic links followed on the way to one entry, the same as Linux's.
const MAX_SYMLINKS: usize = 40;

/// The index of a directory; 0 is the root. Parents come before their children.
type Index = usize;

/// The number of a layer, the lowest first.
type Layer = u32;

pub(super) struct Overlay {
    directories: Vec<Directory>,
    layer: Layer,
}

struct Directory {
    children: BTreeMap<PathComponent, Child>,
    /// How many directories it is below the root.
    depth: usize,
    /// The latest layer that has an entry for it.
    layer: Layer,
    /// The latest layer that nothing lower is left under.
    cleared: Layer,
}

enum Child {
    Directory(Index),
    /// A file or symbolic link; `None` stands for one without a node, which may be the target of a hard link.
    Leaf(Option<Node>, Layer),
}

/// One step on the way to an entry.
enum Step {
    Up,
    Into(PathComponent),
}

impl Overlay {
    /// An empty root, over which the first layer lies.
    pub(super) fn new() -> Self {
        Self { directories: vec![Directory::new(0, 1)], layer: 1 }
    }

    /// Begins the next layer.
    pub(super) fn next_layer(&mut self) {
        self.layer += 1;
    }

    /// Adds a directory, which replaces anything but a directory.
    pub(super) fn directory(&mut self, path: &[u8], ingest: &mut Ingest) -> Result<(), ArchiveError> {
        let mut components = parts(path)?;
        let Some(name) = components.pop() else {
            self.directories[0].layer = self.layer;
            return Ok(());
        };
        let above = self.enter(path, components, ingest)?;
        match self.directories[above].children.get(&name) {
            Some(&Child::Directory(at)) => self.directories[at].layer = self.layer,
            _ => drop(self.add_directory(path, above, name)?),
        }
        Ok(())
    }

    /// Adds a file or symbolic link, or one without a node. It replaces anything, with what is below it.
    pub(super) fn leaf(&mut self, path: &[u8], node: Option<Node>, ingest: &mut Ingest) -> Result<(), ArchiveError> {
        let mut components = parts(path)?;
        let Some(name) = components.pop() else {
            return Err(ArchiveError::malformed(path, "the root is not a directory"));
        };
        let above = self.enter(path, components, ingest)?;
        let leaf = Child::Leaf(node, self.layer);
        self.directories[above].children.insert(name, leaf);
        Ok(())
    }

    /// The leaf at `target`, for a hard link at `path`.
    pub(super) fn linked(&self, path: &[u8], target: &[u8]) -> Result<Option<Node>, ArchiveError> {
        let mut components = parts(target).map_err(|_| {
            let target = target.escape_ascii();
            ArchiveError::malformed(path, format!("is a hard link to \"{target}\", which leads out of the root"))
        })?;
        let name = components.pop();
        let above = self.find(path, components)?;
        match name.zip(above).and_then(|(name, above)| self.directories[above].children.get(&name)) {
            Some(Child::Leaf(node, _)) => Ok(node.clone()),
            _ => {
                let target = target.escape_ascii();
                let rule = format!("is a hard link to \"{target}\", but no file before it has that path");
                Err(ArchiveError::malformed(path, rule))
            }
        }
    }

    /// Removes what lower layers have at `name`, in the directory that `path` is in.
    pub(super) fn hide(&mut self, path: &[u8], name: &PathComponent) -> Result<(), ArchiveError> {
        let Some(above) = self.parent(path)? else { return Ok(()) };
        let layer = self.layer;
        let goes = match self.directories[above].children.get(name) {
            None => false,
            Some(Child::Leaf(_, of)) => *of < layer,
            Some(&Child::Directory(below)) => {
                self.clear(below);
                self.directories[below].is_nothing(layer)
            }
        };
        if goes {
            self.directories[above].children.remove(name);
        }
        Ok(())
    }

    /// Removes all that lower layers have in the directory that `path` is in.
    pub(super) fn make_opaque(&mut self, path: &[u8]) -> Result<(), ArchiveError> {
        if let Some(directory) = self.parent(path)? {
            self.clear(directory);
        }
        Ok(())
    }

    /// All directories, leaves first.
    pub(super) fn into_directories(mut self) -> Result<Vec<crate::Directory>, ArchiveError> {
        let mut is_used = vec![false; self.directories.len()];
        is_used[0] = true;
        for index in 0..is_used.len() {
            if !is_used[index] {
                self.directories[index].children.clear();
            }
            for child in self.directories[index].children.values() {
                if let Child::Directory(below) = child {
                    is_used[*below] = true;
                }
            }
        }
        let mut nodes: Vec<Option<Node>> = vec![None; is_used.len()];
        let mut whole = Vec::new();
        for (index, from) in self.directories.into_iter().enumerate().rev().filter(|(index, _)| is_used[*index]) {
            let mut directory = crate::Directory::new();
            for (name, child) in from.children {
                let node = match child {
                    Child::Leaf(node, _) => node,
                    Child::Directory(below) => nodes[below].take(),
                };
                let Some(node) = node else { continue };
                directory.add(name, node).map_err(|error| ArchiveError::malformed(&[], error.to_string()))?;
            }
            nodes[index] = Some(directory.to_node());
            whole.push(directory);
        }
        Ok(whole)
    }

    /// The directory that `path` is in, if it exists.
    fn parent(&self, path: &[u8]) -> Result<Option<Index>, ArchiveError> {
        let mut components = parts(path)?;
        components.pop();
        self.find(path, components)
    }

    /// The directory with these components, if it exists.
    fn find(&self, path: &[u8], components: Vec<PathComponent>) -> Result<Option<Index>, ArchiveError> {
        let mut walk = Walk::new(components);
        let missing = walk.advance(self, path)?;
        Ok(missing.is_none().then(|| walk.here()))
    }

    /// The directory with these components. Makes what is missing of it.
    fn enter(
        &mut self,
        path: &[u8],
        components: Vec<PathComponent>,
        ingest: &mut Ingest,
    ) -> Result<Index, ArchiveError> {
        let mut walk = Walk::new(components);
        while let Some(name) = walk.advance(self, path)? {
            ingest.entry(path)?;
            let made = self.add_directory(path, walk.here(), name)?;
            walk.way.push(made);
        }
        Ok(walk.here())
    }

    fn add_directory(&mut self, path: &[u8], above: Index, name: PathComponent) -> Result<Index, ArchiveError> {
        let depth = self.directories[above].depth + 1;
        if depth > MAX_DEPTH {
            return Err(ArchiveError::malformed(path, format!("directories are nested deeper than {MAX_DEPTH}")));
        }
        let index = self.directories.len();
        self.directories.push(Directory::new(depth, self.layer));
        self.directories[above].children.insert(name, Child::Directory(index));
        Ok(index)
    }

    /// Removes all that lower layers have below a directory. Each directory is looked at once a layer, however often it is
    /// made opaque. Nested as deep as directories are.
    fn clear(&mut self, index: Index) {
        let layer = self.layer;
        if mem::replace(&mut self.directories[index].cleared, layer) == layer {
            return;
        }
        let mut children = mem::take(&mut self.directories[index].children);
        children.retain(|_, child| match child {
            Child::Leaf(_, of) => *of == layer,
            Child::Directory(below) => {
                self.clear(*below);
                !self.directories[*below].is_nothing(layer)
            }
        });
        self.directories[index].children = children;
    }
}

impl Directory {
    fn new(depth: usize, layer: Layer) -> Self {
        Self { children: BTreeMap::new(), depth, layer, cleared: 0 }
    }

    /// Whether nothing of it remains, once it was cleared in this layer.
    fn is_nothing(&self, layer: Layer) -> bool {
        self.children.is_empty() && self.layer < layer
    }
}

/// A walk to a directory.
struct Walk {
    /// The directories from the root to here.
    way: Vec<Index>,
    /// What is left to do, the next step last.
    rest: Vec<Step>,
    followed: usize,
}

impl Walk {
    fn new(components: Vec<PathComponent>) -> Self {
        Self { way: vec![0], rest: components.into_iter().rev().map(Step::Into).collect(), followed: 0 }
    }

    fn here(&self) -> Index {
        self.way.last().copied().unwrap_or(0)
    }

    /// Walks to the end, or to the first name that is missing, which it returns.
    fn advance(&mut self, tree: &Overlay, path: &[u8]) -> Result<Option<PathComponent>, ArchiveError> {
        while let Some(step) = self.rest.pop() {
            let Step::Into(name) = step else {
                // The root's parent is the root.
                self.way.truncate(self.way.len().saturating_sub(1).max(1));
                continue;
            };
            match tree.directories[self.here()].children.get(&name) {
                None => return Ok(Some(name)),
                Some(Child::Directory(below)) => self.way.push(*below),
                Some(Child::Leaf(Some(Node::Symlink { target }), _)) => self.follow(target, path)?,
                Some(Child::Leaf(..)) => {
                    let rule = format!("\"{name}\" in its path is a file, not a directory");
                    return Err(ArchiveError::malformed(path, rule));
                }
            }
        }
        Ok(None)
    }

    fn follow(&mut self, target: &SymlinkTarget, path: &[u8]) -> Result<(), ArchiveError> {
        self.followed += 1;
        if self.followed > MAX_SYMLINKS {
            let rule = format!("more than {MAX_SYMLINKS} symbolic links are in its path");
            return Err(ArchiveError::malformed(path, rule));
        }
        let target = target.as_bytes();
        if target.starts_with(b"/") {
            self.way.truncate(1);
        }
        for part in target.split(|&byte| byte == b'/').rev() {
            self.rest.push(match part {
                b"" | b"." => continue,
                b".." => Step::Up,
                name => Step::Into(PathComponent::try_from(name).map_err(|error| {
                    ArchiveError::malformed(path, format!("follows a symbolic link that leads nowhere: {error}"))
                })?),
            });
        }
        Ok(())
    }
}
