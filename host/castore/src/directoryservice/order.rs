use std::{
    collections::{HashMap, HashSet},
    io,
};

use crate::{B3Digest, Directory, DirectorySizes};

/// Checks that directories come in the order of a [`DirectoryPutter`](super::DirectoryPutter): leaves first, the root
/// last.
#[derive(Debug, Default)]
pub(crate) struct LeavesFirst {
    sizes: HashMap<B3Digest, DirectorySizes>,
    /// Directories that no later one has referred to yet.
    parentless: HashSet<B3Digest>,
    last: Option<B3Digest>,
    closed: bool,
}

impl LeavesFirst {
    /// Whether no directory has come yet.
    pub(crate) const fn is_empty(&self) -> bool {
        self.last.is_none()
    }

    /// Takes the next directory. `false` when it is a repetition.
    pub(crate) fn admit(&mut self, digest: B3Digest, directory: &Directory) -> io::Result<bool> {
        if self.closed {
            return Err(refused("the tree is closed: start another putter".to_owned()));
        }
        for (child, size) in directory.children() {
            match self.sizes.get(&child).map(|sizes| sizes.expect(size)) {
                Some(put) if put == size => {}
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
        let new = self.sizes.insert(digest, directory.sizes()).is_none();
        if new {
            self.parentless.insert(digest);
        }
        Ok(new)
    }

    /// Ends the sequence and returns its root.
    pub(crate) fn close(&mut self) -> io::Result<B3Digest> {
        if self.closed {
            return Err(refused("the tree is closed already".to_owned()));
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

/// Largest tree, in bytes of encoded directories, that is exchanged with other programs.
pub(crate) const MAX_TREE_BYTES: usize = 256 * 1024 * 1024;

/// Refuses a tree with too many directories or bytes.
pub(crate) fn check_tree_size(directories: usize, bytes: usize) -> io::Result<()> {
    let most = RootFirst::MAX_DIRECTORIES;
    if directories <= most && bytes <= MAX_TREE_BYTES {
        return Ok(());
    }
    let message =
        format!("a tree has at most {most} directories and {MAX_TREE_BYTES} bytes in them, but this one has more");
    Err(io::Error::new(io::ErrorKind::FileTooLarge, message))
}

/// Checks that directories come in the order in which a tree is sent: the root first, and each other one after a directory
/// that refers to it. Also checks the recorded sizes.
#[derive(Debug)]
pub(crate) struct RootFirst {
    root: B3Digest,
    /// Directories that may come, with their recorded sizes.
    expected: HashMap<B3Digest, u64>,
    came: HashSet<B3Digest>,
}

impl RootFirst {
    /// The maximum number of directories in one tree.
    pub(crate) const MAX_DIRECTORIES: usize = 1024 * 1024;

    pub(crate) fn new(root: B3Digest) -> Self {
        Self { root, expected: HashMap::new(), came: HashSet::new() }
    }

    /// Whether no directory has come yet.
    pub(crate) fn is_empty(&self) -> bool {
        self.came.is_empty()
    }

    /// Whether the directory with this digest is new.
    ///
    /// # Errors
    ///
    /// `InvalidData` when no earlier one refers to it.
    pub(crate) fn expects(&self, digest: &B3Digest) -> io::Result<bool> {
        if !self.expected.contains_key(digest) && (*digest != self.root || !self.came.is_empty()) {
            let message = format!("the directory {digest} came, but none before it refers to it");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok(!self.came.contains(digest))
    }

    /// Takes the next directory, which must be new.
    pub(crate) fn admit(&mut self, digest: &B3Digest, directory: &Directory) -> io::Result<()> {
        let wrong = |message| Err(io::Error::new(io::ErrorKind::InvalidData, message));
        let size = *self.expected.entry(*digest).or_insert(directory.size());
        self.came.insert(*digest);
        let actual = directory.sizes().expect(size);
        if size != actual {
            return wrong(format!("the directory {digest} should have size {size}, but it has size {actual}"));
        }
        for (child, size) in directory.children() {
            let recorded = *self.expected.entry(child).or_insert(size);
            if recorded != size {
                return wrong(format!("the directory {child} is said to have size {recorded}, and also size {size}"));
            }
        }
        if self.expected.len() > Self::MAX_DIRECTORIES {
            return wrong(format!("there are more than {} directories, which is the limit", Self::MAX_DIRECTORIES));
        }
        Ok(())
    }

    /// Ends the sequence.
    ///
    /// # Errors
    ///
    /// `NotFound` when a directory is missing.
    pub(crate) fn close(&self) -> io::Result<()> {
        match self.expected.keys().find(|digest| !self.came.contains(*digest)) {
            None => Ok(()),
            Some(missing) => {
                let message = format!("the directory {missing}, which is below {}, did not come", self.root);
                Err(io::Error::new(io::ErrorKind::NotFound, message))
            }
        }
    }
}

fn refused(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_has_at_most_so_many_directories_and_bytes() {
        let most = RootFirst::MAX_DIRECTORIES;
        check_tree_size(most, MAX_TREE_BYTES).unwrap();
        for (directories, bytes) in [(most + 1, 0), (0, MAX_TREE_BYTES + 1)] {
            let error = check_tree_size(directories, bytes).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        }
    }
}
