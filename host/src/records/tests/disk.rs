//! A disk that runs full.

use std::{error::Error as _, fs, io};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

use super::{super::*, built, log_from, machine, open, request, run, tidy};

/// A small disk.
struct Disk(TempDir);

impl Disk {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        mount(Some("small"), dir.path(), Some("tmpfs"), MsFlags::empty(), Some("size=8m")).expect("this needs root");
        Self(dir)
    }

    fn fill(&self) {
        let filler = fs::OpenOptions::new().append(true).create(true).open(self.0.path().join("filler")).unwrap();
        let full = io::copy(&mut io::repeat(0), &mut &filler).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    }

    fn make_room(&self) {
        fs::remove_file(self.0.path().join("filler")).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        umount2(self.0.path(), MntFlags::MNT_DETACH).unwrap();
    }
}

#[test]
fn a_full_disk_fails_the_log_and_the_records_stay_intact() {
    let disk = Disk::new();
    let dir = disk.0.path().join("records");
    let records = open(&dir);
    let before = run(&records, "before", b"before", built()).id;
    tidy(&records);
    let recording = records.begin(request("r"));
    let id = recording.id();
    recording.start(machine()).unwrap();
    recording.log(b"while there is room").unwrap();
    disk.fill();
    let error = loop {
        if let Err(error) = recording.log(&[b'x'; 1000]) {
            break error;
        }
    };
    assert_eq!(error.to_string(), format!("can't write the log {}/logs/{id}.log", dir.display()));
    assert!(error.source().unwrap().to_string().contains("No space left"));
    assert!(recording.log(b"no gap").is_err());
    let log = recording.record().log;
    assert!(log.truncated);
    // Whether these succeed depends on the room in the database's file.
    let finished = recording.finish(built()).is_ok();
    for number in 0..200 {
        let another = records.begin(Request { description: "d".repeat(20_000), ..request(&number.to_string()) });
        if another.start(machine()).and_then(|()| another.finish(built()).map(drop)).is_err() {
            break;
        }
        assert!(number < 199, "the database's file must grow");
    }
    // An unfinished log is not compressed, since that would need room.
    assert!(!finished || records.shared.tidy(SystemTime::now()).is_err());
    assert!(records.get(before).unwrap().is_some());
    disk.make_room();
    let after = run(&records, "after", b"after", built()).id;
    tidy(&records);
    assert_eq!(records.get(id).unwrap().unwrap().status() == Status::Built, finished);
    drop((recording, records));
    let records = open(&dir);
    tidy(&records);
    assert!(log_from(&records, id, 0).starts_with(b"while there is room"));
    assert_eq!(log_from(&records, id, 0).len() as u64, log.bytes);
    assert_eq!(log_from(&records, before, 0), b"before");
    assert_eq!(log_from(&records, after, 0), b"after");
}
