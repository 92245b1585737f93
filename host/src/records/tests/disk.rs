//! A disk that runs full.

use super::{super::*, built, files, log_from, machine, open, request, run, tidy};
use crate::small_disk::{SmallDisk, is_full};

#[test]
fn a_full_disk_fails_the_log_and_the_records_stay_intact() {
    let disk = SmallDisk::new();
    let dir = disk.path().join("records");
    let records = open(&dir);
    let before = run(&records, "before", b"before", built()).id;
    tidy(&records);
    let recording = records.begin(request("r"));
    let id = recording.id();
    recording.start(machine(), &[]).unwrap();
    recording.log(b"while there is room").unwrap();
    disk.fill(0);
    let error = loop {
        if let Err(error) = recording.log(&[b'x'; 1000]) {
            break error;
        }
    };
    assert_eq!(error.to_string(), format!("can't write the log {}/logs/{id}.log", dir.display()));
    assert!(is_full(&error));
    assert!(recording.log(b"no gap").is_err());
    let log = recording.record().log;
    assert!(log.truncated);
    // Whether this succeeds depends on the room in the database's file.
    let finished = recording.finish(built()).is_ok();
    assert_eq!(records.get(id).unwrap().unwrap().status(), Status::Built);
    for number in 0..200 {
        let another = records.begin(Request { description: "d".repeat(20_000), ..request(&number.to_string()) });
        if another.start(machine(), &[]).and_then(|()| another.finish(built()).map(drop)).is_err() {
            break;
        }
        assert!(number < 199, "the database's file must grow");
    }
    // An unfinished log is not compressed, since that would need room.
    assert!(!finished || records.shared.tidy(Some(SystemTime::now())).is_err());
    assert!(records.get(before).unwrap().is_some());
    disk.make_room();
    let after = run(&records, "after", b"after", built()).id;
    tidy(&records);
    assert_eq!(records.get(id).unwrap().unwrap().status(), Status::Built);
    drop((recording, records));
    let records = open(&dir);
    tidy(&records);
    assert!(log_from(&records, id, 0).starts_with(b"while there is room"));
    assert_eq!(log_from(&records, id, 0).len() as u64, log.bytes);
    assert_eq!(log_from(&records, before, 0), b"before");
    assert_eq!(log_from(&records, after, 0), b"after");
}

#[test]
fn wherever_the_disk_ends_a_record_is_whole_or_absent_and_no_end_is_lost() {
    let disk = SmallDisk::new();
    let dir = disk.path().join("records");
    let records = open(&dir);
    let before = run(&records, "before", b"before", built()).id;
    tidy(&records);
    for is_begun in [false, true] {
        let begin = |_| {
            let recording = records.begin(Request { description: "d".repeat(50_000), ..request("r") });
            if is_begun {
                recording.start(machine(), &[]).unwrap();
            }
            recording
        };
        let recordings: Vec<_> = (0..100).map(begin).collect();
        let attempt = |number| {
            let recording: &Recording = &recordings[number];
            let proof = |_: &Record| Some(vec![0; 50_000]);
            if is_begun { recording.finish_with(built(), proof).map(drop) } else { recording.start(machine(), &[]) }
        };
        let expected = if is_begun { Status::Built } else { Status::Unfinished };
        disk.at_each_point(attempt, |number, done| {
            assert!(done.as_ref().err().is_none_or(|error| is_full(error)), "{done:?}");
            assert_eq!(log_from(&records, before, 0), b"before");
            assert_eq!(records.get(recordings[number].id()).unwrap().unwrap().status(), expected, "{number}");
        });
    }
    tidy(&records);
    let all = |records: &Records| {
        let page = records.list(&|_| true, None, MAX_PAGE).unwrap().records;
        page.into_iter().map(|record| (record.id, record.status())).collect::<Vec<_>>()
    };
    let known = all(&records);
    drop(records);
    disk.fill(0);
    assert_eq!(all(&open(&dir)), known);
    disk.make_room();
    let records = open(&dir);
    assert_eq!(all(&records), known);
    assert_eq!(files(&dir), [format!("{before}.log.zst")]);
}
