use std::{fs, io, path::Path, sync::Arc, thread, time::Duration};

use futures::{StreamExt as _, poll};
use redb::{Builder, DatabaseError, ReadOnlyDatabase};

use super::{
    RedbDirectoryService,
    database::{SNIX_TABLE, TABLE},
};
use crate::{
    Directory, DirectoryService as _,
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
async fn a_walk_over_large_directories_needs_several_batches() {
    let dir = tempfile::tempdir().unwrap();
    let service = RedbDirectoryService::open(&dir.path().join("d.redb")).unwrap();
    let large = large_tree();
    let mut putter = service.put_multiple_start();
    for directory in &large {
        putter.put(directory.clone()).await.unwrap();
    }
    let root = putter.close().await.unwrap();
    let digests: Vec<_> = large.iter().map(Directory::digest).collect();
    let batch = service.database.get_many(&digests).unwrap();
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
    Arc::get_mut(&mut service.database).unwrap().patience = Duration::from_millis(50);
    let error = service.get(&directory("t").digest()).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    assert!(error.to_string().contains("d.redb"), "{error}");
    assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
}

#[tokio::test]
async fn waiting_for_a_locked_file_does_not_block_the_thread() {
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
    for mut builder in [tokio::runtime::Builder::new_current_thread(), tokio::runtime::Builder::new_multi_thread()] {
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
    let _database = RedbDirectoryService::open(&path).unwrap().database.create().unwrap();
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
