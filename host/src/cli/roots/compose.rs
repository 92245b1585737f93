//! From a root and inputs to the inputs of a request, whose `inputs_dir` is the build's root.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
};

use cofferdam_castore::{Directory, Node, PathComponent, Store};

use super::accounts;
use crate::cli::{CliError, node_text};

/// Directories whose contents the guest's kernel provides.
const OF_THE_KERNEL: [&str; 2] = ["dev", "proc"];

/// Limit on the symbolic links followed in one path, the same as Linux's.
const MAX_SYMLINKS: usize = 40;

/// The entries of a build's root: those of `root`, with the build's user in its `/etc`, and `inputs` at the path `at`.
///
/// # Errors
///
/// The root is not a directory, or has one of the inputs' paths itself.
pub(in crate::cli) async fn compose(
    store: &Store,
    root: &Node,
    at: &str,
    inputs: BTreeMap<PathComponent, Node>,
) -> Result<BTreeMap<PathComponent, Node>, CliError> {
    let mut entries = entries(store, root).await?;
    for name in OF_THE_KERNEL {
        entries.remove(name.as_bytes());
    }
    if let Some(etc @ Node::Directory { .. }) = entries.get(b"etc".as_slice()) {
        let etc = accounts::complete(store, self::entries(store, etc).await?).await.map_err(failed)?;
        entries.insert(name("etc")?, put(store, etc).await?);
    }
    let path: VecDeque<_> = at.split('/').filter(|part| !part.is_empty()).map(name).collect::<Result<_, _>>()?;
    if !inputs.is_empty() {
        entries = graft(store, entries, path, inputs).await?;
    }
    Ok(entries)
}

/// Adds inputs at a path.
async fn graft(
    store: &Store,
    mut entries: BTreeMap<PathComponent, Node>,
    mut path: VecDeque<PathComponent>,
    inputs: BTreeMap<PathComponent, Node>,
) -> Result<BTreeMap<PathComponent, Node>, CliError> {
    let Some(name) = path.pop_front() else {
        for (name, node) in inputs {
            if entries.insert(name.clone(), node).is_some() {
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
    let below = Box::pin(graft(store, below, path, inputs)).await?;
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
        match directory.get(&*step) {
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
