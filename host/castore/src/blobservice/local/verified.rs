//! Checks the files of blobs against their digests, and marks damaged files.

use std::{collections::HashMap, fs::File, io, os::unix::fs::FileExt as _, path::PathBuf};

use nix::{
    libc::S_ISVTX,
    sys::stat::{FileStat, Mode, fchmod, fstat},
};
use parking_lot::Mutex;

use super::layout::blob_path;
use crate::B3Digest;

/// Most files that are remembered as checked.
const MAX_FILES: usize = 256 * 1024;

/// Bytes that are read at a time.
const READ_BYTES: usize = 256 * 1024;

/// The fix for a damaged file that is marked.
const IMPORT: &str = "import or build the contents again, which replaces this file";

/// The fix for a damaged file that this process may not mark.
const REMOVE_AND_IMPORT: &str = "remove this file, and import or build the contents again";

/// Changes when a file is replaced, written to or marked as damaged. `ctime` is left out: it changes with each name that the
/// file gets or loses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Version {
    dev: u64,
    ino: u64,
    mode: u32,
    size: i64,
    modified: (i64, i64),
}

impl From<FileStat> for Version {
    fn from(stat: FileStat) -> Self {
        let modified = (stat.st_mtime, stat.st_mtime_nsec);
        Self { dev: stat.st_dev, ino: stat.st_ino, mode: stat.st_mode, size: stat.st_size, modified }
    }
}

impl Version {
    pub(super) fn of(file: &File) -> io::Result<Self> {
        Ok(fstat(file)?.into())
    }

    pub(super) fn bytes(&self) -> u64 {
        u64::try_from(self.size).unwrap_or(0)
    }

    /// Whether the file has been [marked](mark_damaged) as damaged.
    pub(super) fn is_damaged(&self) -> bool {
        self.mode & S_ISVTX != 0
    }
}

/// Marks the file of a blob as damaged, so that the next writer of the right contents replaces it. The mark is the sticky
/// bit, which Linux ignores for files; it costs nothing to look up, since a lookup calls `stat` anyway.
///
/// # Errors
///
/// The file belongs to another user, or the file system is read-only or keeps no such bit.
pub(crate) fn mark_damaged(file: &File) -> io::Result<()> {
    let mode = fstat(file)?.st_mode | S_ISVTX;
    fchmod(file, Mode::from_bits_truncate(mode))?;
    if Version::of(file)?.is_damaged() { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
}

/// The files that this process has checked, so that each file is hashed once however often it is opened.
#[derive(Debug)]
pub(super) struct Verified {
    /// `DIR/b3`, for errors.
    dir: PathBuf,
    files: Mutex<HashMap<B3Digest, Version>>,
}

impl Verified {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir, files: Mutex::default() }
    }

    pub(super) fn knows(&self, digest: &B3Digest, version: &Version) -> bool {
        self.files.lock().get(digest) == Some(version)
    }

    /// Hashes the whole file unless it has been checked already.
    ///
    /// # Errors
    ///
    /// `InvalidData` when it has another digest. The file is then marked as damaged.
    pub(super) fn check_file(&self, digest: &B3Digest, file: &File) -> io::Result<()> {
        self.check_version(digest, file, Version::of(file)?)
    }

    /// The same for a file that has just been found in this version.
    ///
    /// # Errors
    ///
    /// As for [`check_file`](Self::check_file).
    pub(super) fn check_version(&self, digest: &B3Digest, file: &File, version: Version) -> io::Result<()> {
        if self.knows(digest, &version) {
            return Ok(());
        }
        let mut hasher = blake3::Hasher::new();
        let mut buffer =
            vec![0; usize::try_from(version.bytes()).map_or(READ_BYTES, |bytes| bytes.clamp(1, READ_BYTES))];
        loop {
            match file.read_at(&mut buffer, hasher.count()) {
                Ok(0) => break,
                Ok(read) => {
                    hasher.update(&buffer[..read]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.check(digest, file, version, hasher.finalize().into())
    }

    /// Remembers this version of a file if `actual`, its digest, is the right one.
    ///
    /// # Errors
    ///
    /// `InvalidData` when it is not. The file is then marked as damaged.
    pub(super) fn check(&self, digest: &B3Digest, file: &File, version: Version, actual: B3Digest) -> io::Result<()> {
        if actual != *digest {
            return Err(self.damaged(digest, &format!("the digest {actual}"), mark_damaged(file).is_ok()));
        }
        self.add(*digest, version);
        Ok(())
    }

    /// The error for a blob whose file has something wrong, and may be marked as damaged.
    pub(super) fn damaged(&self, digest: &B3Digest, wrong: &str, marked: bool) -> io::Error {
        let path = self.dir.join(blob_path(digest));
        let fix = if marked { IMPORT } else { REMOVE_AND_IMPORT };
        let message = format!("{} has {wrong}: the store is damaged: {fix}", path.display());
        io::Error::new(io::ErrorKind::InvalidData, message)
    }

    /// Remembers a file as checked.
    pub(super) fn add(&self, digest: B3Digest, version: Version) {
        let mut files = self.files.lock();
        if files.len() >= MAX_FILES {
            files.clear();
        }
        files.insert(digest, version);
    }

    /// Runs `touch`, which changes the times of a file and nothing else. A file that was remembered still is afterwards.
    /// `look` returns its version.
    pub(super) fn touch<T>(
        &self,
        digest: &B3Digest,
        look: impl Fn() -> io::Result<Version>,
        touch: impl FnOnce() -> T,
    ) -> T {
        let known = self.files.lock().get(digest).copied();
        let known = known.is_some_and(|known| look().is_ok_and(|version| version == known));
        let touched = touch();
        if known && let Ok(version) = look() {
            self.files.lock().insert(*digest, version);
        }
        touched
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, FileTimes, Permissions},
        os::unix::fs::PermissionsExt as _,
        path::Path,
        time::{Duration, SystemTime},
    };

    use futures::executor::block_on;
    use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::{
        BlobService, LocalBlobService, Node, Store,
        copy::{Copied, CopyObserver, copy},
        export::export,
        grpc::{GrpcBlobService, Package, testing::serve_on_socket},
        nar,
        testing::{file, splitmix},
    };

    struct Place {
        _dir: tempfile::TempDir,
        path: PathBuf,
        service: LocalBlobService,
        node: Node,
        digest: B3Digest,
    }

    impl Place {
        /// A store of one blob, which this process has written.
        fn new(contents: &[u8]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let service = LocalBlobService::open(dir.path()).unwrap();
            let mut writer = block_on(service.open_write());
            block_on(writer.write_all(contents)).unwrap();
            let digest = block_on(writer.close()).unwrap();
            block_on(service.commit()).unwrap();
            let path = dir.path().join("b3").join(blob_path(&digest));
            Self { service, node: file(contents, false), digest, path, _dir: dir }
        }

        /// The same store, as another process opens it.
        fn another(&self) -> LocalBlobService {
            LocalBlobService::open(self._dir.path()).unwrap()
        }

        /// Flips a bit of one byte in place.
        fn flip(&self, at: usize) {
            let mut contents = fs::read(&self.path).unwrap();
            contents[at] ^= 1;
            fs::set_permissions(&self.path, Permissions::from_mode(0o644)).unwrap();
            let modified = || fs::metadata(&self.path).unwrap().modified().unwrap();
            let before = modified();
            // The file system's clock may be coarse.
            while modified() == before {
                fs::write(&self.path, &contents).unwrap();
            }
            fs::set_permissions(&self.path, Permissions::from_mode(0o444)).unwrap();
        }

        fn knows(&self) -> bool {
            let version = Version::of(&File::open(&self.path).unwrap()).unwrap();
            self.service.blobs().verified.knows(&self.digest, &version)
        }
    }

    fn read(service: &dyn BlobService, digest: &B3Digest) -> (Vec<u8>, io::Result<()>) {
        let mut reader = block_on(service.open_read(digest)).unwrap().unwrap();
        let mut contents = Vec::new();
        let ended = block_on(reader.read_to_end(&mut contents)).map(drop);
        (contents, ended)
    }

    struct Unwatched;

    impl CopyObserver for Unwatched {
        fn progress(&self, _: &Copied) {}
        fn interrupted(&self) -> bool {
            false
        }
    }

    #[test]
    fn a_flipped_byte_is_never_given_out_as_a_whole_blob() {
        let contents = splitmix(1_000_000);
        for (at, known) in [(0, false), (999_999, false), (500_000, true)] {
            let place = Place::new(&contents);
            if known {
                assert_eq!(read(&place.service, &place.digest).0, contents);
                block_on(place.service.open_file(&place.digest)).unwrap().unwrap();
            }
            place.flip(at);
            let service: std::sync::Arc<dyn BlobService> =
                std::sync::Arc::new(if known { place.service } else { place.another() });
            let store = Store { blobs: service.clone(), ..Store::memory() };
            let (part, ended) = read(&*service, &place.digest);
            let error = ended.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            assert!(error.to_string().contains(place.path.to_str().unwrap()), "{error}");
            assert!(part.len() < contents.len());
            let mut reader = block_on(service.open_read(&place.digest)).unwrap().unwrap();
            block_on(reader.seek(io::SeekFrom::Start(700_000))).unwrap();
            assert_eq!(block_on(reader.read(&mut [0])).unwrap_err().kind(), io::ErrorKind::InvalidData);

            assert_eq!(block_on(service.open_file(&place.digest)).unwrap_err().kind(), io::ErrorKind::InvalidData);
            let out = place._dir.path().join("out");
            export(&store, &place.node, &out).unwrap_err();
            assert!(!out.exists());
            copy(&store, &Store::memory(), std::slice::from_ref(&place.node), &Unwatched).unwrap_err();
            nar::write(&store, &place.node, Path::new("node"), &mut io::sink(), &|| false).unwrap_err();
            let (peer, _dir) = serve_on_socket(&store, &[Package::Snix]);
            let (part, ended) = read(&GrpcBlobService::new(peer), &place.digest);
            assert!(part.len() < contents.len());
            assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn a_file_that_shrinks_or_grows_while_it_is_read_is_no_blob() {
        let contents = splitmix(100_000);
        for bytes in [50_000, 200_000] {
            let place = Place::new(&contents);
            let mut reader = block_on(place.service.open_read(&place.digest)).unwrap().unwrap();
            let mut read = vec![0; 10_000];
            block_on(reader.read_exact(&mut read)).unwrap();
            fs::set_permissions(&place.path, Permissions::from_mode(0o644)).unwrap();
            File::options().write(true).open(&place.path).unwrap().set_len(bytes).unwrap();
            let ended = block_on(reader.read_to_end(&mut read));
            // Bytes that were added are not returned.
            assert_eq!(ended.is_ok(), bytes > 100_000);
            assert!(ended.is_err() || read == contents);
            assert!(block_on(place.service.open_file(&place.digest)).is_err());
        }
    }

    #[test]
    fn a_file_is_verified_once_despite_the_stores_own_changes() {
        let place = Place::new(b"contents");
        assert!(place.knows(), "what was written here is known");
        block_on(place.service.batch().has(&place.digest)).unwrap();
        assert!(place.knows(), "a batch has linked and renewed it");
        let old = SystemTime::now() - Duration::from_secs(600);
        File::open(&place.path).unwrap().set_modified(old).unwrap();
        let file = block_on(place.service.open_file(&place.digest)).unwrap().unwrap();
        place.service.mark_used(&place.digest, &file);
        assert!(place.knows() && file.metadata().unwrap().modified().unwrap() > old, "its use has renewed it");
        File::open(&place.path).unwrap().set_times(FileTimes::new().set_modified(SystemTime::now())).unwrap();
        assert!(!place.knows(), "this change did not come from the store");
        block_on(place.service.open_file(&place.digest)).unwrap().unwrap();
        assert!(place.knows());
    }

    #[test]
    fn large_unverified_blobs_are_not_ready() {
        let place = Place::new(&splitmix(2_000_000));
        let other = place.another();
        assert!(block_on(other.open_file_if_ready(&place.digest)).unwrap().is_none());
        block_on(other.open_file(&place.digest)).unwrap().unwrap();
        assert!(block_on(other.open_file_if_ready(&place.digest)).unwrap().is_some());
    }
}
