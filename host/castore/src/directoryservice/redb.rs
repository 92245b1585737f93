//! Directories in one redb file that several processes share.
//!
//! redb lets one process write or several read. So the file is opened for each group of operations and closed at once,
//! and who finds it locked tries again for [`PATIENCE`].
//!
//! A file whose making was cut short is no database to redb for ever, so a new one gets its name when it is whole.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io, mem,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    thread,
    time::{Duration, Instant, SystemTime},
};

use async_trait::async_trait;
use futures::stream::BoxStream;
use redb::{Builder, Database, DatabaseError, ReadOnlyDatabase, ReadableDatabase as _, TableDefinition, TableError};
use tokio::runtime::Handle;

use super::{DirectoryPutter, DirectoryService, decode_batch, order::LeavesFirst, walk};
use crate::{B3Digest, Directory};

pub(super) const TABLE: TableDefinition<'_, [u8; B3Digest::LENGTH], Vec<u8>> = TableDefinition::new("directory");

/// The same for snix's redb.
const SNIX_TABLE: redb_of_snix::TableDefinition<'_, [u8; B3Digest::LENGTH], Vec<u8>> =
    redb_of_snix::TableDefinition::new("directory");

/// When each tree was put last, by its root, in nanoseconds since 1970; see [`crate::gc`]. snix knows nothing of it, but
/// its redb must know the types.
pub(super) const RECENT: TableDefinition<'_, &[u8], u64> = TableDefinition::new("cofferdam_recent_roots");

/// How long to try when another process has the file.
const PATIENCE: Duration = Duration::from_secs(10);

const RETRY: Duration = Duration::from_millis(5);

/// The file is open for moments only, so a small page cache does.
const CACHE_BYTES: usize = 16 * 1024 * 1024;

/// Directories in a redb file, in the layout of snix: table `directory`, from digest to canonical encoding.
#[derive(Debug)]
pub struct RedbDirectoryService {
    pub(super) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(super) struct Shared {
    path: PathBuf,
    /// Threads of this process queue here, fairly, instead of meeting at the file's lock.
    pub(super) turn: RwLock<()>,
    patience: Duration,
}

impl RedbDirectoryService {
    /// The service of this file, which need not be there yet; the directory that it is in is made.
    ///
    /// # Errors
    ///
    /// When the file is no redb database, or its directory can't be made.
    pub fn open(path: &Path) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let shared = Shared { path: path.to_owned(), turn: RwLock::new(()), patience: PATIENCE };
        shared.get_many(&[])?;
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Does what may block: on a thread for that, if this one belongs to an async runtime. A future that is dropped leaves
    /// no more than this one operation behind, which ends by itself.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let Ok(runtime) = Handle::try_current() else { return work(&self.shared) };
        let shared = self.shared.clone();
        runtime.spawn_blocking(move || work(&shared)).await.map_err(io::Error::other)?
    }
}

impl Shared {
    /// Directories in the order asked; fewer than asked when they are large, but at least one.
    pub(super) fn get_many(&self, digests: &[B3Digest]) -> io::Result<Vec<Option<Directory>>> {
        let _turn = self.turn.read().unwrap_or_else(PoisonError::into_inner);
        let Some(database) = self.open_to_read()? else { return Ok(vec![None; digests.len()]) };
        let read = database.begin_read().map_err(|error| self.failed(error))?;
        let table = match read.open_table(TABLE) {
            Ok(table) => table,
            Err(TableError::TableDoesNotExist(_)) => return Ok(vec![None; digests.len()]),
            Err(error) => return Err(self.failed(error)),
        };
        decode_batch(digests, |digest| {
            let encoded = table.get(digest.as_bytes()).map_err(|error| self.failed(error))?;
            Ok(encoded.map(|encoded| encoded.value()))
        })
    }

    /// Adds these, and that their root is new, in one durable transaction.
    fn put_many(&self, root: &B3Digest, directories: &[(B3Digest, Vec<u8>)]) -> io::Result<()> {
        let _turn = self.turn.write().unwrap_or_else(PoisonError::into_inner);
        let database = self.retry(|| self.open_to_write())?;
        let write = database.begin_write().map_err(|error| self.failed(error))?;
        {
            let mut table = write.open_table(TABLE).map_err(|error| self.failed(error))?;
            for (digest, encoded) in directories {
                table.insert(digest.as_bytes(), encoded).map_err(|error| self.failed(error))?;
            }
            let mut recent = write.open_table(RECENT).map_err(|error| self.failed(error))?;
            recent.insert(root.as_slice(), unix_nanos(SystemTime::now())).map_err(|error| self.failed(error))?;
        }
        write.commit().map_err(|error| self.failed(error))
    }

    /// Opens the database; makes it when there is no file.
    pub(super) fn open_to_write(&self) -> Result<Database, DatabaseError> {
        match OpenOptions::new().read(true).write(true).open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.create(),
            file => {
                let file = file?;
                if file.metadata()?.len() == 0 {
                    create_table(&file)?;
                }
                builder().create_file(file)
            }
        }
    }

    /// Makes the database under another name and links it when it is whole and durable. Only one at a time does, under
    /// a lock on the directory, which ends with its holder: whatever has the other name here is a dead maker's.
    fn create(&self) -> Result<Database, DatabaseError> {
        let parent = self.path.parent().filter(|parent| *parent != Path::new(""));
        let dir = File::open(parent.unwrap_or(Path::new(".")))?;
        match dir.try_lock() {
            Err(TryLockError::WouldBlock) => return Err(DatabaseError::DatabaseAlreadyOpen),
            Err(TryLockError::Error(error)) => return Err(error.into()),
            Ok(()) => {}
        }
        let unfinished = self.path.with_added_extension("new");
        match fs::remove_file(&unfinished) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&unfinished)?;
        create_table(&file)?;
        let database = builder().create_file(file.try_clone()?)?;
        file.sync_all()?;
        let linked = fs::hard_link(&unfinished, &self.path);
        fs::remove_file(&unfinished)?;
        match linked {
            // Somebody was faster, and that one's is the database.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(DatabaseError::DatabaseAlreadyOpen),
            linked => {
                linked?;
                dir.sync_all()?;
                Ok(database)
            }
        }
    }

    /// `None` while there is no file.
    pub(super) fn open_to_read(&self) -> io::Result<Option<ReadOnlyDatabase>> {
        // A file that is there but empty is one that another program is about to make into a database.
        match fs::metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Ok(metadata) if metadata.is_file() && metadata.len() == 0 => return Ok(None),
            _ => {}
        }
        let opened = self.retry(|| match builder().open_read_only(&self.path) {
            // Its last writer was killed: opening it to write repairs it.
            Err(DatabaseError::RepairAborted) => {
                builder().open(&self.path).map(drop)?;
                builder().open_read_only(&self.path)
            }
            opened => opened,
        });
        opened.map(Some)
    }

    pub(super) fn retry<T>(&self, mut open: impl FnMut() -> Result<T, DatabaseError>) -> io::Result<T> {
        let deadline = Instant::now() + self.patience;
        loop {
            match open() {
                Err(DatabaseError::DatabaseAlreadyOpen) if Instant::now() < deadline => thread::sleep(RETRY),
                Err(DatabaseError::DatabaseAlreadyOpen) => return Err(self.held()),
                opened => return opened.map_err(|error| self.failed(error)),
            }
        }
    }

    pub(super) fn failed(&self, error: impl Into<redb::Error>) -> io::Error {
        let error = error.into();
        io::Error::other(format!("the directories in {}: {error}", self.path.display()))
    }

    fn held(&self) -> io::Error {
        let holder = match lock_holder(&self.path) {
            Some(pid) => format!("process {pid} has held it"),
            None => "another process has held it".to_owned(),
        };
        let (path, seconds) = (self.path.display(), self.patience.as_secs());
        let message = format!("the directories in {path}: {holder} for {seconds} s; try again when it has ended");
        io::Error::new(io::ErrorKind::WouldBlock, message)
    }
}

/// Nanoseconds since 1970.
pub(super) fn unix_nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Makes a database in an empty file, with the table as snix makes it: a later redb adds to it, but names its types
/// otherwise.
fn create_table(file: &File) -> Result<(), DatabaseError> {
    let create = || {
        let database = redb_of_snix::Builder::new().create_file(file.try_clone()?)?;
        let write = database.begin_write()?;
        write.open_table(SNIX_TABLE)?;
        Ok(write.commit()?)
    };
    create().map_err(|error| match error {
        redb_of_snix::Error::DatabaseAlreadyOpen => DatabaseError::DatabaseAlreadyOpen,
        redb_of_snix::Error::Io(error) => error.into(),
        error => io::Error::other(error).into(),
    })
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_BYTES);
    builder
}

/// The process that has locked the file, as far as the kernel tells.
fn lock_holder(path: &Path) -> Option<u32> {
    let metadata = fs::metadata(path).ok()?;
    let (major, minor) = (nix::libc::major(metadata.dev()), nix::libc::minor(metadata.dev()));
    let file = format!("{major:02x}:{minor:02x}:{}", metadata.ino());
    let locks = fs::read_to_string("/proc/locks").ok()?;
    // "1: FLOCK  ADVISORY  WRITE 4711 fe:00:1234 0 EOF"
    locks.lines().find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let at = fields.iter().position(|field| *field == file)?;
        fields.get(at.checked_sub(1)?)?.parse().ok()
    })
}

#[async_trait]
impl DirectoryService for RedbDirectoryService {
    async fn get(&self, digest: &B3Digest) -> io::Result<Option<Directory>> {
        let digest = *digest;
        Ok(self.blocking(move |shared| shared.get_many(&[digest])).await?.pop().flatten())
    }

    async fn put(&self, directory: Directory) -> io::Result<B3Digest> {
        let encoded = directory.encode();
        let digest = B3Digest::of(&encoded);
        self.blocking(move |shared| shared.put_many(&digest, &[(digest, encoded)])).await?;
        Ok(digest)
    }

    fn get_recursive(&self, root: &B3Digest) -> BoxStream<'_, io::Result<Directory>> {
        walk::breadth_first(root, |digests| self.blocking(move |shared| shared.get_many(&digests)))
    }

    fn put_multiple_start(&self) -> Box<dyn DirectoryPutter + '_> {
        Box::new(RedbDirectoryPutter { service: self, order: LeavesFirst::default(), encoded: Vec::new() })
    }
}

/// Collects a tree, for one transaction at its end.
struct RedbDirectoryPutter<'a> {
    service: &'a RedbDirectoryService,
    order: LeavesFirst,
    encoded: Vec<(B3Digest, Vec<u8>)>,
}

#[async_trait]
impl DirectoryPutter for RedbDirectoryPutter<'_> {
    async fn put(&mut self, directory: Directory) -> io::Result<()> {
        let encoded = directory.encode();
        let digest = B3Digest::of(&encoded);
        if self.order.admit(digest, &directory)? {
            self.encoded.push((digest, encoded));
        }
        Ok(())
    }

    async fn close(&mut self) -> io::Result<B3Digest> {
        let root = self.order.close()?;
        let mut directories = mem::take(&mut self.encoded);
        // In the order of the keys a B-tree fills best.
        directories.sort_unstable_by_key(|(digest, _)| *digest);
        self.service.blocking(move |shared| shared.put_many(&root, &directories)).await?;
        Ok(root)
    }
}

#[cfg(test)]
mod tests {
    use futures::{StreamExt as _, poll};

    use super::*;
    use crate::{
        directoryservice::{BATCH_BYTES, Reachable},
        testing::{name, symlink},
    };

    /// Directories of three quarters of a batch each, and their parent.
    fn large_tree() -> Vec<Directory> {
        let target = "t".repeat(4000);
        let large = |at: usize| {
            let entries = (0..BATCH_BYTES * 3 / 4 / target.len()).map(|entry| name(&format!("{at}-{entry}")));
            Directory::try_from_iter(entries.map(|entry| (entry, symlink(&target)))).unwrap()
        };
        let mut directories: Vec<_> = (0..5).map(large).collect();
        let children = directories.iter().enumerate().map(|(at, child)| (name(&at.to_string()), child.to_node()));
        directories.push(Directory::try_from_iter(children).unwrap());
        directories
    }

    fn directory(target: &str) -> Directory {
        Directory::try_from_iter([(name("l"), symlink(target))]).unwrap()
    }

    /// Writes past the service, as another program would.
    fn write_raw(path: &Path, key: [u8; 32], value: Vec<u8>) {
        let database = redb_of_snix::Builder::new().create(path).unwrap();
        let write = database.begin_write().unwrap();
        write.open_table(SNIX_TABLE).unwrap().insert(key, value).unwrap();
        write.commit().unwrap();
    }

    #[tokio::test]
    async fn a_damaged_directory_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.redb");
        let digest = directory("t").digest();
        write_raw(&path, *digest.as_bytes(), directory("other").encode());
        let error = RedbDirectoryService::open(&path).unwrap().get(&digest).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(error.to_string().contains("damaged"));
    }

    #[tokio::test]
    async fn a_batch_of_large_directories_ends_early_and_a_walk_goes_on_with_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let service = RedbDirectoryService::open(&dir.path().join("d.redb")).unwrap();
        let large = large_tree();
        let mut putter = service.put_multiple_start();
        for directory in &large {
            putter.put(directory.clone()).await.unwrap();
        }
        let root = putter.close().await.unwrap();
        let digests: Vec<_> = large.iter().map(Directory::digest).collect();
        let batch = service.shared.get_many(&digests).unwrap();
        assert_eq!(batch.len(), 2);
        assert!(batch.into_iter().eq(large[..2].iter().cloned().map(Some)));
        let walked: Vec<_> = service.get_recursive(&root).map(Result::unwrap).collect().await;
        assert_eq!(walked.len(), large.len());
        assert!(large.iter().all(|directory| walked.contains(directory)));
        let mut reachable = Reachable::default();
        service.reach(&[large[large.len() - 1].to_node()], &mut reachable).unwrap();
        assert_eq!((reachable.directories, reachable.missing.len()), (digests.into_iter().collect(), 0));
    }

    #[tokio::test]
    async fn what_another_program_wrote_is_read_and_the_other_way_round() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.redb");
        let (theirs, ours) = (directory("theirs"), directory("ours"));
        write_raw(&path, *theirs.digest().as_bytes(), theirs.encode());
        let service = RedbDirectoryService::open(&path).unwrap();
        assert_eq!(service.get(&theirs.digest()).await.unwrap(), Some(theirs));
        service.put(ours.clone()).await.unwrap();
        // Or had made.
        use redb_of_snix::ReadableDatabase as _;
        let made = dir.path().join("made.redb");
        RedbDirectoryService::open(&made).unwrap().put(ours.clone()).await.unwrap();
        for path in [path, made] {
            let database = redb_of_snix::Builder::new().open(&path).unwrap();
            let table = database.begin_read().unwrap().open_table(SNIX_TABLE).unwrap();
            assert_eq!(table.get(ours.digest().as_bytes()).unwrap().unwrap().value(), ours.encode());
        }
    }

    #[tokio::test]
    async fn a_held_file_is_waited_for_and_then_named_with_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.redb");
        let mut service = RedbDirectoryService::open(&path).unwrap();
        service.put(directory("t")).await.unwrap();
        let _held = Builder::new().open(&path).unwrap();
        Arc::get_mut(&mut service.shared).unwrap().patience = Duration::from_millis(50);
        let error = service.get(&directory("t").digest()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(error.to_string().contains("d.redb"), "{error}");
        assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
    }

    #[tokio::test]
    async fn who_waits_for_a_held_file_holds_up_nobody_else_on_the_thread() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.redb");
        let service = RedbDirectoryService::open(&path).unwrap();
        let there = service.put(directory("t")).await.unwrap();
        let held = Builder::new().open(&path).unwrap();
        let mut get = service.get(&there);
        let mut walk = service.get_recursive(&there);
        let mut put = service.put(directory("u"));
        let mut putter = service.put_multiple_start();
        putter.put(directory("v")).await.unwrap();
        let mut close = putter.close();
        assert!(poll!(&mut get).is_pending());
        assert!(poll!(walk.next()).is_pending());
        assert!(poll!(&mut put).is_pending());
        assert!(poll!(&mut close).is_pending());
        drop(held);
        assert_eq!(get.await.unwrap(), Some(directory("t")));
        assert_eq!(walk.next().await.unwrap().unwrap(), directory("t"));
        assert_eq!(put.await.unwrap(), directory("u").digest());
        assert_eq!(close.await.unwrap(), directory("v").digest());
    }

    #[test]
    fn it_works_on_the_threads_of_any_runtime_and_beside_them() {
        let dir = tempfile::tempdir().unwrap();
        let service = RedbDirectoryService::open(&dir.path().join("d.redb")).unwrap();
        let work = async || {
            let digest = service.put(directory("t")).await.unwrap();
            assert_eq!(service.get(&digest).await.unwrap(), Some(directory("t")));
        };
        futures::executor::block_on(work());
        for mut builder in [tokio::runtime::Builder::new_current_thread(), tokio::runtime::Builder::new_multi_thread()]
        {
            let runtime = builder.build().unwrap();
            runtime.block_on(work());
            runtime.block_on(async { futures::executor::block_on(work()) });
            thread::scope(|scope| {
                scope.spawn(|| runtime.handle().block_on(work()));
            });
        }
    }

    #[tokio::test]
    async fn a_file_whose_writer_was_killed_is_repaired() {
        let dir = tempfile::tempdir().unwrap();
        let (path, copy) = (dir.path().join("d.redb"), dir.path().join("killed.redb"));
        let service = RedbDirectoryService::open(&path).unwrap();
        service.put(directory("t")).await.unwrap();
        // A copy of the file while it is open has what a killed process leaves.
        let database = Builder::new().open(&path).unwrap();
        let write = database.begin_write().unwrap();
        write.open_table(TABLE).unwrap().insert([0; 32], Vec::new()).unwrap();
        write.commit().unwrap();
        fs::copy(&path, &copy).unwrap();
        assert!(matches!(ReadOnlyDatabase::open(&copy), Err(DatabaseError::RepairAborted)));
        let repaired = RedbDirectoryService::open(&copy).unwrap();
        assert_eq!(repaired.get(&directory("t").digest()).await.unwrap(), Some(directory("t")));
    }

    #[tokio::test]
    async fn a_database_is_whole_as_soon_as_it_has_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let (path, copy) = (dir.path().join("d.redb"), dir.path().join("killed.redb"));
        // What a process leaves that is killed at once.
        let _database = RedbDirectoryService::open(&path).unwrap().shared.create().unwrap();
        fs::copy(&path, &copy).unwrap();
        let service = RedbDirectoryService::open(&copy).unwrap();
        assert_eq!(service.get(&directory("t").digest()).await.unwrap(), None);
        service.put(directory("t")).await.unwrap();
        assert_eq!(service.get(&directory("t").digest()).await.unwrap(), Some(directory("t")));
    }

    #[tokio::test]
    async fn what_a_killed_maker_left_is_replaced() {
        for leftover in [vec![], vec![0; 1 << 20], b"redb, but not the rest".to_vec()] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("d.redb");
            fs::write(dir.path().join("d.redb.new"), leftover).unwrap();
            let service = RedbDirectoryService::open(&path).unwrap();
            service.put(directory("t")).await.unwrap();
            assert_eq!(service.get(&directory("t").digest()).await.unwrap(), Some(directory("t")));
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        }
    }

    /// The test below runs this in processes that it kills.
    #[test]
    fn put_where_a_variable_says() {
        let Some(path) = std::env::var_os(PUT_THERE) else { return };
        let service = RedbDirectoryService::open(Path::new(&path)).unwrap();
        futures::executor::block_on(service.put(directory(&std::process::id().to_string()))).unwrap();
    }

    const PUT_THERE: &str = "COFFERDAM_TEST_PUT_THERE";

    fn putter(path: &Path) -> std::process::Child {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "directoryservice::redb::tests::put_where_a_variable_says"]);
        command.env(PUT_THERE, path).stdout(std::process::Stdio::null()).spawn().unwrap()
    }

    #[tokio::test]
    async fn a_maker_may_be_killed_at_any_moment() {
        for _ in 0..20 {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("d.redb");
            let mut killed = putter(&path);
            // From here on it is a race that the making of the file must survive wherever it stands.
            while fs::read_dir(dir.path()).unwrap().next().is_none() && killed.try_wait().unwrap().is_none() {
                thread::yield_now();
            }
            killed.kill().unwrap();
            killed.wait().unwrap();
            let service = RedbDirectoryService::open(&path).unwrap();
            service.put(directory("t")).await.unwrap();
            assert_eq!(service.get(&directory("t").digest()).await.unwrap(), Some(directory("t")));
        }
    }

    #[tokio::test]
    async fn processes_that_make_the_file_at_once_all_put() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.redb");
        let mut putters: Vec<_> = (0..8).map(|_| putter(&path)).collect();
        let service = RedbDirectoryService::open(&path).unwrap();
        for putter in &mut putters {
            assert!(putter.wait().unwrap().success());
            let digest = directory(&putter.id().to_string()).digest();
            assert!(service.get(&digest).await.unwrap().is_some());
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn many_threads_and_services_share_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.redb");
        let shared = Arc::new(RedbDirectoryService::open(&path).unwrap());
        thread::scope(|scope| {
            for number in 0..4 {
                let service =
                    if number % 2 == 0 { shared.clone() } else { Arc::new(RedbDirectoryService::open(&path).unwrap()) };
                scope.spawn(move || {
                    for round in 0..5 {
                        let put = directory(&format!("{number}-{round}"));
                        let digest = futures::executor::block_on(service.put(put.clone())).unwrap();
                        assert_eq!(futures::executor::block_on(service.get(&digest)).unwrap(), Some(put));
                    }
                });
            }
        });
    }

    #[test]
    fn something_else_than_a_database_is_refused_at_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.redb");
        fs::write(&path, "not a database, but long enough to have a header".repeat(100)).unwrap();
        assert!(RedbDirectoryService::open(&path).unwrap_err().to_string().contains("d.redb"));
        assert!(RedbDirectoryService::open(dir.path()).is_err());
    }
}
