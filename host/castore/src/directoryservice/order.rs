use std::{
    collections::{HashMap, HashSet},
    io,
};

use crate::{B3Digest, Directory};

/// Holds a sequence of directories to the order that a putter wants: leaves first, the root last.
#[derive(Debug, Default)]
pub(super) struct LeavesFirst {
    sizes: HashMap<B3Digest, u64>,
    /// Those that no later directory has referred to yet.
    parentless: HashSet<B3Digest>,
    last: Option<B3Digest>,
    closed: bool,
}

impl LeavesFirst {
    /// Admits the next directory, whose digest is given; `false` when it was admitted before.
    pub(super) fn admit(&mut self, digest: B3Digest, directory: &Directory) -> io::Result<bool> {
        if self.closed {
            return Err(refused("the tree has been closed: start another putter".to_owned()));
        }
        for (child, size) in directory.children() {
            match self.sizes.get(&child) {
                Some(put) if *put == size => {}
                Some(put) => {
                    return Err(refused(format!(
                        "the directory {digest} says that its child {child} has size {size}, but it has size {put}"
                    )));
                }
                None => {
                    return Err(refused(format!(
                        "the directory {digest} came before its child {child}: put leaves first"
                    )));
                }
            }
        }
        for (child, _) in directory.children() {
            self.parentless.remove(&child);
        }
        self.last = Some(digest);
        let new = self.sizes.insert(digest, directory.size()).is_none();
        if new {
            self.parentless.insert(digest);
        }
        Ok(new)
    }

    /// Ends the sequence and returns its root.
    pub(super) fn close(&mut self) -> io::Result<B3Digest> {
        if self.closed {
            return Err(refused("the tree has been closed before".to_owned()));
        }
        let root = self.last.ok_or_else(|| refused("a tree has at least one directory, its root".to_owned()))?;
        match self.parentless.iter().find(|digest| **digest != root) {
            Some(stray) => {
                Err(refused(format!("the directory {stray} is not below the root {root}: put the root last")))
            }
            None if !self.parentless.contains(&root) => {
                Err(refused(format!("the last directory {root} is below another one: put the root last")))
            }
            None => {
                self.closed = true;
                Ok(root)
            }
        }
    }
}

fn refused(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}
