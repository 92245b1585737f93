//! Leases: what running builds rely on.
//!
//! ```text
//!   DIR/leases/            locked while a lease is taken, and while all leases are read
//!   DIR/leases/PID-COUNT   locked as long as its owner lives; holds length-delimited `Entry` messages
//! ```

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use prost::Message as _;

use super::staging::lock;
use crate::{
    Node,
    proto::{Entry, EntryExt as _},
};

/// Distinguishes the leases of one process.
static COUNT: AtomicU64 = AtomicU64::new(0);

/// Protects nodes from garbage collection until it is dropped or its process ends.
#[derive(Debug, Default)]
pub struct Lease {
    files: Vec<(PathBuf, Flock<File>)>,
}

impl Lease {
    /// Takes a lease in `dir`, which is created if it is missing. A read-only store gives an empty lease, and so does a lease of
    /// nothing.
    pub(super) fn take(dir: &Path, nodes: &[Node]) -> io::Result<Self> {
        if nodes.is_empty() {
            return Ok(Self::default());
        }
        match Self::try_take(dir, nodes) {
            Err(error)
                if matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem) =>
            {
                Ok(Self::default())
            }
            taken => taken,
        }
    }

    fn try_take(dir: &Path, nodes: &[Node]) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let _taking = lock(dir, FlockArg::LockExclusive)?;
        let mut encoded = Vec::new();
        for node in nodes {
            Entry::unnamed(node.clone()).encode_length_delimited(&mut encoded).map_err(io::Error::other)?;
        }
        loop {
            let path = dir.join(format!("{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
            let file = match OpenOptions::new().write(true).create_new(true).mode(0o644).open(&path) {
                // A process had this id before, or has it in another PID namespace.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                file => file?,
            };
            let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)?;
            // A full disk leaves no half of it: dropping it removes the file.
            let mut lease = Self { files: vec![(path, file)] };
            lease.files.iter_mut().try_for_each(|(_, file)| file.write_all(&encoded))?;
            return Ok(lease);
        }
    }

    /// Both leases in one.
    pub(crate) fn and(mut self, mut other: Self) -> Self {
        self.files.append(&mut other.files);
        self
    }

    /// All nodes that are leased in `dir`. Removes the leases of dead processes.
    pub(super) fn read_all(dir: &Path) -> io::Result<Vec<Node>> {
        let mut nodes = Vec::new();
        let _reading = match lock(dir, FlockArg::LockExclusive) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(nodes),
            locked => locked?,
        };
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let file = match File::open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                file => file?,
            };
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(_dead) => remove(&path)?,
                Err((_, Errno::EWOULDBLOCK)) => {
                    let encoded = match fs::read(&path) {
                        Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                        encoded => encoded?,
                    };
                    let mut rest = &*encoded;
                    while !rest.is_empty() {
                        nodes.push(decode_node(Entry::decode_length_delimited(&mut rest), &path)?);
                    }
                }
                Err((_, errno)) => return Err(errno.into()),
            }
        }
        Ok(nodes)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        for (path, _) in &self.files {
            // A file that can't be removed is unlocked in a moment, so the next collection removes it.
            let _ = fs::remove_file(path);
        }
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// The encoding of a node in a file of the store.
pub(crate) fn encode_node(node: &Node) -> Vec<u8> {
    Entry::unnamed(node.clone()).encode_to_vec()
}

/// The node in a file of the store. Errors name `path`.
pub(crate) fn decode_node(decoded: Result<Entry, prost::DecodeError>, path: &Path) -> io::Result<Node> {
    let damaged = |error: &dyn std::error::Error| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{} does not hold a node ({error}): remove it", path.display()),
        )
    };
    decoded.map_err(|error| damaged(&error))?.try_into_unnamed().map_err(|error| damaged(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{file, symlink};

    #[test]
    fn a_lease_counts_as_long_as_it_lives() {
        let dir = tempfile::tempdir().unwrap();
        let leases = dir.path().join("leases");
        assert_eq!(Lease::read_all(&leases).unwrap(), []);
        let nodes = [file(b"x", true), symlink("t")];
        let lease = Lease::take(&leases, &nodes).unwrap();
        let other = Lease::take(&leases, &nodes[..1]).unwrap();
        // What a killed process leaves.
        fs::write(leases.join("1-0"), encode_node(&nodes[0])).unwrap();
        assert_eq!(Lease::read_all(&leases).unwrap().len(), 3);
        assert!(!leases.join("1-0").exists());
        drop(other);
        assert_eq!(Lease::read_all(&leases).unwrap(), nodes);
        drop(lease);
        assert_eq!(Lease::read_all(&leases).unwrap(), []);
        assert_eq!(fs::read_dir(&leases).unwrap().count(), 0);
        let _nothing = Lease::take(&leases, &[]).unwrap();
        assert_eq!(fs::read_dir(&leases).unwrap().count(), 0, "nothing needs no file");
    }
}
