//! Every reader gets exactly the bytes from its offset on, also while the log is written, compressed or deleted.

use std::time::Duration;

use futures::poll;
use proptest::{collection::vec, prelude::*};
use tempfile::TempDir;
use tokio::task::JoinHandle;

use super::{
    super::{log::MAX_CHUNK_BYTES, *},
    built, files, log_from, open, request, tidy,
};

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|index| (index % 251) as u8 ^ (index / 65_536) as u8).collect()
}

/// Reads to the end on a task of its own.
fn follow(records: &Records, id: BuildId, offset: u64) -> JoinHandle<Vec<u8>> {
    let mut reader = records.read_log(id, offset).unwrap().unwrap();
    tokio::spawn(async move {
        let mut log = Vec::new();
        while let Some(bytes) = reader.next().await.unwrap() {
            assert!(!bytes.is_empty() && bytes.len() <= MAX_CHUNK_BYTES);
            log.extend(bytes);
            assert_eq!(reader.position(), offset + log.len() as u64);
        }
        log
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn readers_that_come_at_any_time_get_everything(
        writes in vec(1..200_000_usize, 1..12),
        comers in vec((0..14_usize, any::<prop::sample::Index>()), 1..6),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
        runtime.block_on(async {
            let dir = TempDir::new().unwrap();
            let records = open(dir.path());
            let recording = records.begin(request("r"));
            let all = pattern(writes.iter().sum());
            let (mut written, mut readers) = (0, Vec::new());
            let mut come = |moment: usize, written: usize| {
                for (_, offset) in comers.iter().filter(|(at, _)| *at == moment) {
                    let offset = offset.index(written + 1);
                    readers.push((offset, follow(&records, recording.id(), offset as u64)));
                }
            };
            for (moment, bytes) in writes.iter().enumerate() {
                come(moment, written);
                recording.log(&all[written..written + bytes]).unwrap();
                written += bytes;
            }
            recording.finish(built()).unwrap();
            come(12, written);
            tidy(&records);
            come(13, written);
            for (offset, reader) in readers {
                assert!(reader.await.unwrap() == all[offset..], "from {offset}");
            }
        });
    }
}

#[tokio::test]
async fn an_idle_reader_delays_nobody_and_keeps_its_offset_during_compression() {
    let dir = TempDir::new().unwrap();
    let records = open(dir.path());
    let recording = records.begin(request("r"));
    let all = pattern(3_000_000);
    recording.log(&all[..200_000]).unwrap();
    let mut begun = records.read_log(recording.id(), 0).unwrap().unwrap();
    let mut not_begun = records.read_log(recording.id(), 100_000).unwrap().unwrap();
    let mut log = begun.next().await.unwrap().unwrap().to_vec();
    // Nobody reads meanwhile.
    recording.log(&all[200_000..]).unwrap();
    recording.finish(built()).unwrap();
    tidy(&records);
    assert_eq!(files(dir.path()), [format!("{}.log.zst", recording.id())]);
    while let Some(bytes) = begun.next().await.unwrap() {
        log.extend(bytes);
    }
    assert!(log == all);
    log.truncate(100_000);
    while let Some(bytes) = not_begun.next().await.unwrap() {
        log.extend(bytes);
    }
    assert!(log == all);
}

#[tokio::test]
async fn a_reader_waits_for_bytes_and_for_the_end() {
    let dir = TempDir::new().unwrap();
    let records = open(dir.path());
    let recording = records.begin(request("r"));
    let mut reader = records.read_log(recording.id(), 0).unwrap().unwrap();
    {
        let mut next = std::pin::pin!(reader.next());
        assert!(poll!(&mut next).is_pending());
        recording.log(b"a").unwrap();
        assert_eq!(next.await.unwrap().unwrap(), "a");
    }
    assert_eq!(reader.available().await.unwrap(), None);
    // A dropped read loses nothing.
    recording.log(b"b").unwrap();
    for _ in 0..3 {
        if poll!(Box::pin(reader.next())).is_ready() {
            // It was fast enough to read it.
            recording.log(b"b").unwrap();
        }
    }
    assert_eq!(reader.next().await.unwrap().unwrap()[..1], *b"b");
    let mut next = std::pin::pin!(reader.next());
    assert!(poll!(&mut next).is_pending());
    recording.finish(built()).unwrap();
    assert_eq!(next.await.unwrap(), None);
}

#[tokio::test]
async fn an_offset_beyond_the_end_is_refused_with_the_length() {
    let dir = TempDir::new().unwrap();
    let records = open(dir.path());
    let recording = records.begin(request("r"));
    let id = recording.id();
    recording.log(b"12345").unwrap();
    let refused = |records: &Records| {
        let error = records.read_log(id, 6).unwrap_err().to_string();
        assert_eq!(error, format!("offset 6 is beyond the end of the log of build {id}, which has 5 bytes"));
        records.read_log(id, 5).unwrap().unwrap()
    };
    let mut reader = refused(&records);
    assert_eq!(reader.available().await.unwrap(), None);
    recording.finish(built()).unwrap();
    tidy(&records);
    let mut reader = refused(&records);
    assert_eq!(reader.next().await.unwrap(), None);
    let unknown = Ids::after(Some(id)).next(SystemTime::now());
    assert!(records.read_log(unknown, 0).unwrap().is_none());
}

#[test]
fn a_log_that_is_cut_is_an_error_until_the_packer_has_seen_it() {
    let dir = TempDir::new().unwrap();
    let records = open(dir.path());
    let recording = records.begin(request("r"));
    let id = recording.id();
    recording.log(b"12345").unwrap();
    let tidying = records.shared.tidying.lock();
    recording.finish(built()).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(dir.path().join(format!("logs/{id}.log"))).unwrap();
    // As a power failure does.
    file.set_len(3).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let mut reader = records.read_log(id, 0).unwrap().unwrap();
        assert_eq!(reader.next().await.unwrap().unwrap(), "123");
        let error = reader.next().await.unwrap_err().to_string();
        assert_eq!(error, format!("the log of build {id} ends after 3 of 5 bytes"));
    });
    drop(tidying);
    tidy(&records);
    assert_eq!(records.get(id).unwrap().unwrap().log, Log { bytes: 3, truncated: true });
}

#[test]
fn the_packer_wakes_by_itself() {
    let dir = TempDir::new().unwrap();
    let records = open(dir.path());
    let recording = records.begin(request("r"));
    recording.log(&pattern(100_000)).unwrap();
    recording.finish(built()).unwrap();
    let packed = dir.path().join(format!("logs/{}.log.zst", recording.id()));
    let patience = std::time::Instant::now() + Duration::from_secs(60);
    while !packed.exists() {
        assert!(std::time::Instant::now() < patience);
        std::thread::yield_now();
    }
    assert!(log_from(&records, recording.id(), 70_000) == pattern(100_000)[70_000..]);
}
