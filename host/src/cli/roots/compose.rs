//! From a root and inputs to the inputs of a request, whose `inputs_dir` is the build's root.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
};

use cofferdam_castore::{Directory, Node, PathComponent, Store};

use super::accounts;
use crate::cli::{CliError, node_text};

/// Directories whose contents the guest's kernel provides.
const OF_THE_KERNEL: [&str; 3] = ["dev", "proc", "sys"];

/// Limit on the symbolic links followed in one path, the same as Linux's.
const MAX_SYMLINKS: usize = 40;

/// A build's root in the making.
pub(in crate::cli) struct Composed<'a> {
    store: &'a Store,
    entries: BTreeMap<PathComponent, Node>,
}

impl<'a> Composed<'a> {
    /// A root without anything.
    pub(in crate::cli) fn empty(store: &'a Store) -> Self {
        Self { store, entries: BTreeMap::new() }
    }

    /// The entries of `root`, with the build's user in its `/etc`.
    ///
    /// # Errors
    ///
    /// It is not a directory.
    pub(in crate::cli) async fn of(store: &'a Store, root: &Node) -> Result<Self, CliError> {
        Ok(Self { store, entries: complete(store, root).await? })
    }

    /// Adds inputs in the directory `at`.
    ///
    /// # Errors
    ///
    /// The root has one of the inputs' paths itself.
    pub(in crate::cli) async fn with_inputs(
        self,
        at: &str,
        inputs: BTreeMap<PathComponent, Node>,
    ) -> Result<Self, CliError> {
        if inputs.is_empty() {
            return Ok(self);
        }
        Ok(Self { entries: graft(self.store, self.entries, path(at)?, inputs, false).await?, ..self })
    }

    /// Puts a node at a path, instead of what is there.
    ///
    /// # Errors
    ///
    /// The path leads through something that is no directory, or is the root itself.
    pub(in crate::cli) async fn with_source(self, at: &str, node: Node) -> Result<Self, CliError> {
        let mut path = path(at)?;
        let Some(name) = path.pop_back() else {
            return Err(CliError::wrong("a source tree can't be the build's root")
                .try_this("--workdir with the directory where it is to be"));
        };
        Ok(Self { entries: graft(self.store, self.entries, path, [(name, node)].into(), true).await?, ..self })
    }

    /// The root's entries.
    pub(in crate::cli) fn entries(self) -> BTreeMap<PathComponent, Node> {
        self.entries
    }
}

fn path(text: &str) -> Result<VecDeque<PathComponent>, CliError> {
    text.split('/').filter(|part| !part.is_empty()).map(name).collect()
}

async fn complete(store: &Store, root: &Node) -> Result<BTreeMap<PathComponent, Node>, CliError> {
    let mut entries = entries(store, root).await?;
    for name in OF_THE_KERNEL {
        entries.remove(name.as_bytes());
    }
    if let Some(etc @ Node::Directory { .. }) = entries.get(b"etc".as_slice()) {
        let etc = accounts::complete(store, self::entries(store, etc).await?).await.map_err(failed)?;
        entries.insert(name("etc")?, put(store, etc).await?);
    }
    Ok(entries)
}

/// Adds inputs at a path, perhaps instead of what is there.
async fn graft(
    store: &Store,
    mut entries: BTreeMap<PathComponent, Node>,
    mut path: VecDeque<PathComponent>,
    inputs: BTreeMap<PathComponent, Node>,
    may_replace: bool,
) -> Result<BTreeMap<PathComponent, Node>, CliError> {
    let Some(name) = path.pop_front() else {
        for (name, node) in inputs {
            if entries.insert(name.clone(), node).is_some() && !may_replace {
                let message = format!("the root has {:?} itself, in the directory of the inputs", name.to_string());
                return Err(CliError::wrong(message)
                    .try_this("another name for the input, or --inputs-dir with another directory"));
            }
        }
        return Ok(entries);
    };
    let below = match entries.get(&name) {
        None => BTreeMap::new(),
        Some(node @ Node::Directory { .. }) => self::entries(store, node).await?,
        Some(_) => {
            let message = format!("{:?} of the root is no directory, so inputs can't be in it", name.to_string());
            return Err(CliError::wrong(message).try_this("--inputs-dir with another directory"));
        }
    };
    let below = Box::pin(graft(store, below, path, inputs, may_replace)).await?;
    entries.insert(name, put(store, below).await?);
    Ok(entries)
}

/// Whether the root has something at a path, through its symbolic links.
pub(in crate::cli) async fn has(store: &Store, root: &Node, path: &str) -> io::Result<bool> {
    let steps = |path: &[u8]| path.split(|&byte| byte == b'/').map(<[u8]>::to_owned).collect::<Vec<_>>();
    let mut way = vec![root.clone()];
    let mut rest: VecDeque<Vec<u8>> = steps(path.as_bytes()).into();
    let mut followed = 0;
    while let Some(step) = rest.pop_front() {
        match &*step {
            b"" | b"." => continue,
            b".." => {
                way.truncate(way.len().saturating_sub(1).max(1));
                continue;
            }
            _ => {}
        }
        let Some(Node::Directory { digest, .. }) = way.last() else { return Ok(false) };
        let Some(directory) = store.directories.get(digest).await? else { return Ok(false) };
        match directory.get(&step) {
            None => return Ok(false),
            Some(Node::Symlink { target }) => {
                followed += 1;
                if followed > MAX_SYMLINKS {
                    return Ok(false);
                }
                if target.as_bytes().starts_with(b"/") {
                    way.truncate(1);
                }
                for step in steps(target.as_bytes()).into_iter().rev() {
                    rest.push_front(step);
                }
            }
            Some(node) => way.push(node.clone()),
        }
    }
    Ok(true)
}

async fn entries(store: &Store, node: &Node) -> Result<BTreeMap<PathComponent, Node>, CliError> {
    let Node::Directory { digest, .. } = node else {
        let message = format!("a root must be a directory, and {} is not one", node_text::format(node));
        return Err(
            CliError::wrong(message).try_this("--root tar:FILE, docker-archive:FILE or oci:PATH, if it is an archive")
        );
    };
    match store.directories.get(digest).await.map_err(failed)? {
        Some(directory) => Ok(directory.nodes().map(|(name, node)| (name.clone(), node.clone())).collect()),
        None => Err(CliError::wrong(format!("the store doesn't have {}", node_text::format(node)))
            .try_this("import it again, or name the store that has it")),
    }
}

async fn put(store: &Store, entries: BTreeMap<PathComponent, Node>) -> Result<Node, CliError> {
    let directory = Directory::try_from_iter(entries);
    let directory = directory.map_err(|error| CliError::wrong_because("the root can't be completed", error))?;
    let node = directory.to_node();
    store.directories.put(directory).await.map_err(failed)?;
    Ok(node)
}

fn name(text: &str) -> Result<PathComponent, CliError> {
    PathComponent::try_from(text).map_err(|error| CliError::wrong_because("this path can't be in a root", error))
}

fn failed(error: io::Error) -> CliError {
    CliError::failed("the root can't be prepared in the store", error)
}
