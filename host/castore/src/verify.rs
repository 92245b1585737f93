//! Verifies stores: that each blob and each directory has its digest, and that nothing is missing.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use nix::fcntl::FlockArg;
use parking_lot::Mutex;

use crate::{
    B3Digest, Directory, LocalBlobService, LocalStore, Node, Store,
    archive::emit,
    blobservice::{digest_of, lock, mark_damaged},
    export::ExportError,
};

/// A fault of a store.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// A blob's contents have another digest than its name.
    #[error("the blob {digest} in {} has the digest {actual}", path.display())]
    Blob {
        /// The digest in its name.
        digest: B3Digest,
        /// The digest of its contents.
        actual: B3Digest,
        /// Its file.
        path: PathBuf,
    },
    /// A blob's file can't be read.
    #[error("{} can't be read: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file that is not a blob.
    #[error("{} is not where a blob would be", .0.display())]
    Stray(PathBuf),
    /// A directory has another digest than its key, or is not valid.
    #[error("the directory {digest}: {reason}")]
    Directory {
        /// The digest in its key.
        digest: B3Digest,
        /// What is wrong.
        reason: String,
    },
    /// A directory refers to something that is missing.
    #[error("the {what} {digest} is missing, to which the directory {parent} refers")]
    Missing {
        /// "blob" or "directory".
        what: &'static str,
        /// The missing digest.
        digest: B3Digest,
        /// A directory that refers to it.
        parent: B3Digest,
    },
    /// A directory records a wrong size for a blob or a directory.
    #[error("the {what} {digest} has size {actual}, but the directory {parent} says {claimed}")]
    Size {
        /// "blob" or "directory".
        what: &'static str,
        /// The digest of the blob or directory.
        digest: B3Digest,
        /// The actual size.
        actual: u64,
        /// The recorded size.
        claimed: u64,
        /// A directory that records it.
        parent: B3Digest,
    },
}

impl Fault {
    /// An identifier for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Blob { .. } => "damaged_blob",
            Self::Unreadable { .. } => "unreadable_blob",
            Self::Stray(_) => "stray_file",
            Self::Directory { .. } => "damaged_directory",
            Self::Missing { .. } => "missing",
            Self::Size { .. } => "wrong_size",
        }
    }
}

/// The result of a verification.
#[derive(Debug, Default)]
pub struct Verified {
    /// Blobs that were read.
    pub blobs: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Directories that were read.
    pub directories: u64,
    /// The faults that were found.
    pub faults: Vec<Fault>,
}

/// Verifies a local store. Collections wait for it. Damaged blobs are marked, so that the next writer of the right contents
/// replaces their files.
///
/// Blocks: call it from a thread that may.
///
/// # Errors
///
/// The store as a whole can't be read.
pub fn verify(store: &LocalStore) -> io::Result<Verified> {
    // Fails in a read-only store, where nothing is collected either.
    let _no_collection = store.roots_dir().and_then(|dir| lock(&dir, FlockArg::LockShared)).ok();
    let mut verified = Verified::default();
    let references = directories(store, &mut verified)?;
    blobs(store, &references, &mut verified)?;
    Ok(verified)
}

/// A size that some directory records for a digest.
struct Claim {
    size: u64,
    parent: B3Digest,
}

/// Verifies all directories. Returns the sizes that they record for blobs.
fn directories(store: &LocalStore, verified: &mut Verified) -> io::Result<HashMap<B3Digest, Claim>> {
    let (mut children, mut blobs, mut sizes) = (HashMap::new(), HashMap::new(), HashMap::new());
    let mut last = None;
    loop {
        let stored = store.directories().stored_after(last.as_ref())?;
        let Some((digest, _)) = stored.last() else { break };
        last = Some(*digest);
        for (digest, encoded) in stored {
            verified.directories += 1;
            let actual = B3Digest::of(&encoded);
            let directory = match Directory::decode(&encoded) {
                _ if actual != digest => Err(format!("its bytes have the digest {actual}")),
                decoded => decoded.map_err(|error| error.to_string()),
            };
            match directory {
                Err(reason) => verified.faults.push(Fault::Directory { digest, reason }),
                Ok(directory) => {
                    sizes.insert(digest, directory.sizes());
                    for (_, node) in directory.nodes() {
                        let claim = |size: &u64| Claim { size: *size, parent: digest };
                        match node {
                            Node::Directory { digest, size } => drop(children.insert(*digest, claim(size))),
                            Node::File { digest, size, .. } => drop(blobs.insert(*digest, claim(size))),
                            Node::Symlink { .. } => {}
                        }
                    }
                }
            }
        }
    }
    for (digest, claim) in children {
        verified.faults.extend(check(
            "directory",
            digest,
            &claim,
            sizes.get(&digest).map(|sizes| sizes.expect(claim.size)),
        ));
    }
    Ok(blobs)
}

fn check(what: &'static str, digest: B3Digest, claim: &Claim, actual: Option<u64>) -> Option<Fault> {
    let parent = claim.parent;
    match actual {
        None => Some(Fault::Missing { what, digest, parent }),
        Some(actual) if actual != claim.size => Some(Fault::Size { what, digest, actual, claimed: claim.size, parent }),
        Some(_) => None,
    }
}

/// Verifies all blobs, on several threads, and that none is missing.
fn blobs(store: &LocalStore, references: &HashMap<B3Digest, Claim>, verified: &mut Verified) -> io::Result<()> {
    let fan_outs = LocalBlobService::fan_outs(store.dir())?;
    let next = AtomicUsize::new(0);
    let done = Mutex::new((verified, HashSet::from([B3Digest::EMPTY]), Ok(())));
    let work = || {
        while let Some(fan_out) = fan_outs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let (mut part, mut found) = (Verified::default(), Vec::new());
            let outcome = verify_fan_out(fan_out, references, &mut part, &mut found);
            let (verified, all, failed) = &mut *done.lock();
            verified.blobs += part.blobs;
            verified.bytes += part.bytes;
            verified.faults.extend(part.faults);
            all.extend(found);
            if outcome.is_err() {
                *failed = outcome;
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..thread::available_parallelism().map_or(1, usize::from) {
            // If no thread can be started, this one does all the work.
            let _ = thread::Builder::new().name("verify".to_owned()).spawn_scoped(scope, work);
        }
        work();
    });
    let (verified, found, outcome) = done.into_inner();
    for (digest, claim) in references.iter().filter(|(digest, _)| !found.contains(digest)) {
        verified.faults.extend(check("blob", *digest, claim, None));
    }
    outcome
}

fn verify_fan_out(
    fan_out: &Path,
    references: &HashMap<B3Digest, Claim>,
    verified: &mut Verified,
    found: &mut Vec<B3Digest>,
) -> io::Result<()> {
    if !fan_out.is_dir() {
        verified.faults.push(Fault::Stray(fan_out.to_owned()));
        return Ok(());
    }
    for entry in fs::read_dir(fan_out)? {
        let path = entry?.path();
        let Some(digest) = digest_of(&path) else {
            verified.faults.push(Fault::Stray(path));
            continue;
        };
        found.push(digest);
        let mut hasher = blake3::Hasher::new();
        match File::open(&path).and_then(|file| hasher.update_reader(&file).map(|_| file)) {
            Err(source) => verified.faults.push(Fault::Unreadable { path, source }),
            Ok(file) => {
                verified.blobs += 1;
                verified.bytes += hasher.count();
                let (size, actual) = (hasher.count(), B3Digest::from(hasher.finalize()));
                if actual != digest {
                    // Fails in a store of another user. The fault is reported all the same.
                    let _ = mark_damaged(&file);
                    verified.faults.push(Fault::Blob { digest, actual, path });
                } else if let Some(claim) = references.get(&digest) {
                    verified.faults.extend(check("blob", digest, claim, Some(size)));
                }
            }
        }
    }
    Ok(())
}

/// Verifies a node of any store and everything below it.
///
/// # Errors
///
/// The first fault, with its path below `name`.
pub fn verify_node(store: &Store, node: &Node, name: &Path, interrupted: &dyn Fn() -> bool) -> Result<(), ExportError> {
    emit(store, node, name, interrupted, &mut |_, _| Ok(()))
}

#[cfg(test)]
mod tests {
    use futures::executor::block_on;
    use tokio::io::AsyncWriteExt as _;

    use super::*;
    use crate::{
        BlobService as _, DirectoryService as _,
        testing::{file, name, symlink},
    };

    fn store(dir: &Path) -> LocalStore {
        let store = LocalStore::open(&dir.join("blobs"), &dir.join("d.redb")).unwrap();
        for contents in [b"one".as_slice(), b"other"] {
            let mut writer = block_on(store.blobs().open_write());
            block_on(writer.write_all(contents)).unwrap();
            block_on(writer.close()).unwrap();
        }
        block_on(store.blobs().commit()).unwrap();
        let below = Directory::try_from_iter([(name("f"), file(b"one", true)), (name("e"), file(b"", true))]).unwrap();
        let root = Directory::try_from_iter([(name("d"), below.to_node()), (name("l"), symlink("t"))]).unwrap();
        for directory in [below, root] {
            block_on(store.directories().put(directory)).unwrap();
        }
        store
    }

    fn path(dir: &Path, contents: &[u8]) -> PathBuf {
        let hex = B3Digest::of(contents).to_hex();
        dir.join("blobs/b3").join(&hex[..2]).join(hex)
    }

    fn faults(store: &LocalStore) -> Vec<String> {
        let mut faults: Vec<_> = verify(store).unwrap().faults.iter().map(ToString::to_string).collect();
        faults.sort();
        faults
    }

    #[test]
    fn a_sound_store_has_no_faults() {
        let dir = tempfile::tempdir().unwrap();
        let verified = verify(&store(dir.path())).unwrap();
        assert_eq!((verified.blobs, verified.bytes, verified.directories), (2, 8, 2));
        assert!(verified.faults.is_empty(), "{:?}", verified.faults);
    }

    #[test]
    fn a_blob_that_was_found_damaged_is_repaired_by_a_put() {
        let dir = tempfile::tempdir().unwrap();
        let damaged = store(dir.path());
        let other = path(dir.path(), b"other");
        fs::remove_file(&other).unwrap();
        fs::write(&other, "oTher").unwrap();
        assert_eq!(faults(&damaged).len(), 1);
        assert!(faults(&store(dir.path())).is_empty());
        assert_eq!(fs::read(other).unwrap(), b"other");
    }

    #[test]
    fn every_kind_of_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let (one, other) = (path(dir.path(), b"one"), path(dir.path(), b"other"));
        fs::remove_file(&one).unwrap();
        fs::remove_file(&other).unwrap();
        fs::write(&other, "oTher").unwrap();
        fs::write(other.with_file_name("stray"), "").unwrap();
        let lost = Directory::try_from_iter([(name("x"), symlink("t"))]).unwrap();
        let wrong = Node::File { digest: B3Digest::EMPTY, size: 7, executable: false };
        let parent = Directory::try_from_iter([(name("lost"), lost.to_node()), (name("w"), wrong)]).unwrap();
        block_on(store.directories().put(parent)).unwrap();
        let found = faults(&store);
        for (fault, what) in found.iter().zip([
            format!("{}/stray is not where", other.parent().unwrap().display()),
            format!("the blob {} in {} has the digest", B3Digest::of(b"other"), other.display()),
            format!("the blob {} is missing, to which the directory", B3Digest::of(b"one")),
            format!("the directory {} is missing, to which", lost.digest()),
        ]) {
            assert!(found.iter().any(|fault| fault.contains(&what)), "{what}: {fault} of {found:#?}");
        }
        assert_eq!(found.len(), 4, "{found:#?}");
    }
}
