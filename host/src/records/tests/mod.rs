mod disk;
mod kill;
mod readers;

use std::{
    collections::BTreeSet,
    fs,
    sync::atomic::{AtomicBool, Ordering},
};

use cofferdam_castore::Node;
use cofferdam_protocol::Usage;
use proptest::{collection::vec, prelude::*};
use serde_json::json;
use tempfile::TempDir;

use super::{log::MAX_CHUNK_BYTES, *};
use crate::{
    build::failure::FailureKind,
    build::{BuildError, ExecutorError, Failed, Reason},
    network::{Connection, Verdict},
    request::OutputOrder,
};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn open(dir: &Path) -> Records {
    Records::open(dir, Retention::default()).unwrap()
}

fn digest(of: &str) -> B3Digest {
    B3Digest::of(of.as_bytes())
}

fn request(of: &str) -> Request {
    Request {
        digest: digest(of),
        environment: digest("environment"),
        key: digest(of),
        client: "c".into(),
        description: of.into(),
        output_order: OutputOrder::default(),
        output_paths: Vec::new(),
        log_bytes: 64 << 20,
        secrets: Vec::new(),
    }
}

fn machine() -> Machine {
    Machine { vmm: "qemu".into(), version: "7.2".into(), accelerator: "KVM".into() }
}

fn built() -> End {
    let outputs = vec![
        Output { node: Node::File { digest: digest("o"), size: 1, executable: true }, needles: BTreeSet::from([0, 7]) },
        Output { node: Node::Symlink { target: "t".try_into().unwrap() }, needles: BTreeSet::new() },
    ];
    End { outcome: Outcome::Built(outputs), usage: Some(Usage { wall_us: 5, ..Usage::default() }), kept: None }
}

fn not_built(error: BuildError) -> End {
    End::from(&Err(error))
}

/// A build from its request to its end.
fn run(records: &Records, of: &str, log: &[u8], end: End) -> Record {
    let recording = records.begin(request(of));
    recording.start(machine(), &[]).unwrap();
    recording.log(log).unwrap();
    recording.finish(end).unwrap()
}

fn files(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir.join("logs")).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn tidy(records: &Records) {
    records.shared.tidy(Some(SystemTime::now())).unwrap();
}

/// Reads the present log from an offset on.
fn log_from(records: &Records, id: BuildId, offset: u64) -> Vec<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let mut reader = records.read_log(id, offset).unwrap().unwrap();
        let mut log = Vec::new();
        while let Some(bytes) = reader.available().await.unwrap() {
            assert!(bytes.len() <= MAX_CHUNK_BYTES);
            log.extend(bytes);
        }
        log
    })
}

#[test]
fn a_record_follows_its_build_and_stays() {
    let dir = TempDir::new().unwrap();
    let records = open(dir.path());
    let recording = records.begin(request("r"));
    let id = recording.id();
    let queued = records.get(id).unwrap().unwrap();
    assert_eq!((queued.status(), queued.phases[0].0, &*queued.client), (Status::Unfinished, Phase::Queued, "c"));
    assert_eq!(records.shared.database.get(id).unwrap(), None);
    recording.start(machine(), &[]).unwrap();
    for phase in [Phase::Resolving, Phase::Booting, Phase::Running, Phase::Running] {
        recording.phase(phase);
    }
    recording.log(b"one\n").unwrap();
    assert_eq!(records.get(id).unwrap().unwrap().log, Log { bytes: 4, truncated: false });
    assert_eq!(files(dir.path()), [format!("{id}.log")]);
    let finished = recording.finish(built()).unwrap();
    assert_eq!(finished.phases.len(), 4);
    assert!(finished.phases.is_sorted_by_key(|(_, began)| *began) && finished.ended >= Some(finished.phases[3].1));
    assert_eq!((finished.outcome.clone(), finished.machine.clone()), (Some(built().outcome), Some(machine())));
    assert_eq!(records.get(id).unwrap().as_ref(), Some(&finished));
    // Only the first end counts.
    assert_eq!(recording.finish(not_built(BuildError::Executor(ExecutorError::Interrupted))).unwrap(), finished);
    assert!(recording.log(b"more").is_err());
    drop((recording, records));
    let records = open(dir.path());
    tidy(&records);
    assert_eq!(records.get(id).unwrap().as_ref(), Some(&finished));
    assert_eq!(files(dir.path()), [format!("{id}.log.zst")]);
    assert_eq!(log_from(&records, id, 1), b"ne\n");
}

#[test]
fn denials_leave_room_for_connections_that_carried_something() {
    let dir = TempDir::new().unwrap();
    let recording = open(dir.path()).begin(request("r"));
    let denied = |sent| Connection { sent, verdict: Verdict::Denied("no rule".into()), ..Connection::default() };
    for _ in 0..recording::MAX_CONNECTIONS {
        recording.connection(&denied(0));
    }
    // One that a limit has cut off, and one that it hasn't.
    let others = [denied(1), Connection::default()];
    others.iter().for_each(|other| recording.connection(other));
    let record = recording.finish(built()).unwrap();
    let listed = record.connections.len();
    assert_eq!((&record.connections[listed - 2..], record.more_connections), (&others[..], 502 - listed as u64));
}

#[test]
fn a_build_that_is_given_up_is_lost() {
    let dir = TempDir::new().unwrap();
    let records = open(dir.path());
    let id = records.begin(request("r")).id();
    let Some(Outcome::Failed(failure)) = records.get(id).unwrap().unwrap().outcome else { panic!("it has an outcome") };
    assert_eq!((failure.kind, &*failure.reason), (FailureKind::ExecutorFailed, "lost"));
}

#[test]
fn a_failure_has_text_and_fields() {
    let dir = TempDir::new().unwrap();
    let records = open(dir.path());
    let usage = Usage { user_us: 3, ..Usage::default() };
    let error = BuildError::Failed(Box::new(Failed::new(Reason::ExitCode(7), Some(usage))));
    let id = run(&records, "r", b"", not_built(error)).id;
    let record = records.get(id).unwrap().unwrap();
    assert_eq!(record.usage, Some(usage));
    let Some(Outcome::Failed(failure)) = record.outcome else { panic!("it has an outcome") };
    let expected = json!({
        "kind": "build_failed",
        "reason": "exit_code",
        "message": "the build failed: the command exited with status 7",
        "fields": failure.fields,
    });
    assert_eq!(failure.to_json(), expected);
    assert_eq!(failure.fields["exit_code"], 7);
    assert_eq!(failure.fields["usage"]["user_us"], 3);
    let failure = Failure::executor("lost", "é".repeat(100_000));
    assert!(failure.message.len() < 40_000);
}

#[test]
fn a_log_ends_at_its_limit() {
    let dir = TempDir::new().unwrap();
    let records = open(dir.path());
    let recording = records.begin(Request { log_bytes: 10, ..request("r") });
    recording.log(b"0123456").unwrap();
    recording.log(b"789ab").unwrap();
    recording.log(b"c").unwrap();
    assert_eq!(recording.finish(built()).unwrap().log, Log { bytes: 10, truncated: true });
    assert_eq!(log_from(&records, recording.id(), 0), b"0123456789");
}

#[test]
fn the_latest_success_answers_an_equal_request() {
    let dir = TempDir::new().unwrap();
    let records = open(dir.path());
    let failed = || not_built(BuildError::Executor(ExecutorError::Interrupted));
    run(&records, "r", b"", failed());
    assert_eq!(records.result_for(&digest("r")).unwrap(), None);
    run(&records, "r", b"", built());
    let latest = run(&records, "r", b"", built());
    run(&records, "r", b"", failed());
    run(&records, "other", b"", built());
    assert_eq!(records.result_for(&digest("r")).unwrap(), Some(latest));
}

#[test]
fn the_oldest_finished_builds_are_deleted_beyond_the_size() {
    let dir = TempDir::new().unwrap();
    let noise: Vec<u8> = (0..100_000_u32).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let retention = Retention { max_bytes: 1_000_000, ..Retention::default() };
    let records = Records::open(dir.path(), retention.clone()).unwrap();
    let running = records.begin(request("running"));
    running.start(machine(), &[]).unwrap();
    running.log(&noise).unwrap();
    let ids: Vec<_> = (0..6).map(|number| run(&records, &number.to_string(), &noise, built()).id).collect();
    tidy(&records);
    let kept: Vec<_> = ids.iter().map(|id| records.get(*id).unwrap().is_some()).collect();
    let packed = fs::metadata(dir.path().join(format!("logs/{}.log.zst", ids[5]))).unwrap().len();
    let fit = (retention.max_bytes / (packed + 1000)).min(6) as usize;
    assert!((1..6).contains(&fit), "{packed}");
    assert_eq!(kept, (0..6).map(|index| index >= 6 - fit).collect::<Vec<_>>());
    assert_eq!(files(dir.path()).len(), fit + 1);
    assert_eq!(records.result_for(&digest("0")).unwrap(), None);
    assert!(records.read_log(ids[0], 0).unwrap().is_none());
    assert_eq!(records.get(running.id()).unwrap().unwrap().status(), Status::Unfinished);
}

#[test]
fn old_records_are_deleted_and_a_jump_of_the_clock_deletes_none() {
    let dir = TempDir::new().unwrap();
    let records = Records::open(dir.path(), Retention { max_age: 20 * DAY, ..Retention::default() }).unwrap();
    let running = records.begin(request("running"));
    running.start(machine(), &[]).unwrap();
    let id = run(&records, "r", b"log", built()).id;
    let now = SystemTime::now();
    for jump in [now + 40_000 * DAY, now - 10_000 * DAY, now + 40_000 * DAY, now] {
        // The packer may look at the true time in between.
        records.shared.tidy(Some(jump)).unwrap();
        assert!(records.get(id).unwrap().is_some());
    }
    for day in 1..=21 {
        assert!(day > 10 || records.get(id).unwrap().is_some());
        records.shared.tidy(Some(now + day * DAY)).unwrap();
    }
    assert_eq!(records.get(id).unwrap(), None);
    assert!(files(dir.path()).is_empty());
    assert!(records.get(running.id()).unwrap().is_some());
}

#[test]
fn only_one_process_has_the_records() {
    let dir = TempDir::new().unwrap();
    let records = open(dir.path());
    let error = Records::open(dir.path(), Retention::default()).err().unwrap().to_string();
    assert!(error.contains(&format!("in use by process {};", std::process::id())), "{error}");
    assert!(error.contains(dir.path().to_str().unwrap()), "{error}");
    drop(records);
    open(dir.path());
}

fn write_raw(dir: &Path, write: impl FnOnce(&redb::WriteTransaction)) {
    let database = redb::Database::open(dir.join("records.redb")).unwrap();
    let transaction = database.begin_write().unwrap();
    write(&transaction);
    transaction.commit().unwrap();
}

#[test]
fn what_a_newer_program_made_is_refused_and_stays() {
    let dir = TempDir::new().unwrap();
    drop(open(dir.path()));
    write_raw(dir.path(), |write| {
        let meta = redb::TableDefinition::<&str, u64>::new("meta");
        write.open_table(meta).unwrap().insert("format", 2).unwrap();
    });
    let error = Records::open(dir.path(), Retention::default()).err().unwrap().to_string();
    assert!(error.contains("format 2, this program knows those up to 1; run the newer program"), "{error}");
}

#[test]
fn a_damaged_record_is_an_error_that_names_it() {
    let dir = TempDir::new().unwrap();
    let records = open(dir.path());
    let (id, other) = (run(&records, "r", b"", built()).id, run(&records, "r", b"", built()).id);
    let good = records.get(other).unwrap().unwrap().encode().unwrap();
    drop(records);
    for damaged in [b"{}".to_vec(), b"\xff".to_vec(), good.clone(), good[..good.len() / 2].to_vec()] {
        write_raw(dir.path(), |write| {
            let table = redb::TableDefinition::<u128, &[u8]>::new("records");
            write.open_table(table).unwrap().insert(id.as_u128(), &*damaged).unwrap();
        });
        let records = open(dir.path());
        let error = records.get(id).unwrap_err().to_string();
        assert!(error.starts_with(&format!("the record of build {id} in ")), "{error}");
        assert!(records.get(other).unwrap().is_some());
        tidy(&records);
        let listed = records.list(&|_| true, None, MAX_PAGE).unwrap();
        assert_eq!(listed.records.iter().map(|record| record.id).collect::<Vec<_>>(), [other]);
    }
}

#[test]
fn something_else_than_a_database_is_refused() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("records.redb"), "not a database".repeat(1000)).unwrap();
    let error = Records::open(dir.path(), Retention::default()).err().unwrap().to_string();
    assert!(error.contains("records.redb"), "{error}");
}

#[test]
fn files_that_no_record_knows_go_and_others_stay() {
    let dir = TempDir::new().unwrap();
    let records = open(dir.path());
    let id = run(&records, "r", b"log", built()).id;
    let stranger = Ids::after(Some(id)).next(SystemTime::now());
    tidy(&records);
    drop(records);
    for name in ["log", "log.zst", "log.zst.new"] {
        fs::write(dir.path().join(format!("logs/{stranger}.{name}")), "x").unwrap();
    }
    fs::write(dir.path().join(format!("logs/{id}.log")), "packed already").unwrap();
    fs::write(dir.path().join("logs/README"), "not ours").unwrap();
    let records = open(dir.path());
    assert_eq!(files(dir.path()), [format!("{id}.log.zst"), "README".to_owned()]);
    assert_eq!(log_from(&records, id, 0), b"log");
}

#[test]
fn a_description_is_one_short_harmless_line() {
    let line = |args: &[&str]| describe(&args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>());
    assert_eq!(line(&["/bin/sh", "-c", "make -j4"]), r#"/bin/sh -c "make -j4""#);
    assert_eq!(line(&["a", ""]), r#"a """#);
    let hostile = "\n\u{1b}[2J\u{202e}".repeat(100_000);
    let shown = line(&[&hostile, &hostile]);
    assert!(
        shown.chars().count() <= 201 && !shown.contains(char::is_control) && !shown.contains('\u{202e}'),
        "{shown}"
    );
    assert!(line(&vec!["x"; 100_000]).len() < 300);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn pages_hold_every_wanted_record_once_newest_first(
        builds in vec((0..3_u8, 0..4_u8), 0..20),
        most in 1..8_usize,
        client in proptest::option::of(0..3_u8),
        status in proptest::option::of(0..3_usize),
    ) {
        let dir = TempDir::new().unwrap();
        let records = open(dir.path());
        let mut unfinished = Vec::new();
        let mut expected = Vec::new();
        let statuses = [Status::Built, Status::Failed, Status::Unfinished];
        let status = status.map(|status| statuses[status]);
        for (of_client, fate) in builds {
            let recording = records.begin(Request { client: of_client.to_string(), ..request("r") });
            let got = match fate {
                0 => recording.finish(built()).map(|_| Status::Built).unwrap(),
                1 => {
                    let end = not_built(BuildError::Executor(ExecutorError::Interrupted));
                    recording.finish(end).map(|_| Status::Failed).unwrap()
                }
                2 => recording.start(machine(), &[]).map(|()| Status::Unfinished).unwrap(),
                _ => Status::Unfinished,
            };
            if client.is_none_or(|client| client == of_client) && status.is_none_or(|status| status == got) {
                expected.push(recording.id());
            }
            unfinished.push(recording);
        }
        expected.reverse();
        let wanted = |record: &Record| {
            client.is_none_or(|client| record.client == client.to_string())
                && status.is_none_or(|status| record.status() == status)
        };
        let (mut listed, mut before) = (Vec::new(), None);
        loop {
            let page = records.list(&wanted, before, most).unwrap();
            prop_assert!(page.records.len() <= most);
            listed.extend(page.records.iter().map(|record| record.id));
            let Some(next) = page.next else { break };
            before = Some(next);
        }
        prop_assert_eq!(listed, expected);
    }
}

#[test]
fn many_records_are_listed_in_bounded_steps_and_by_time() {
    let dir = TempDir::new().unwrap();
    let records = open(dir.path());
    let first = run(&records, "r", b"", built());
    let later = first.created + DAY;
    let many: Vec<_> = (0..MAX_EXAMINED as u64 + 500)
        .map(|number| {
            let created = if number % 5_000 == 0 { later } else { first.created };
            Record { id: records.shared.ids.next(SystemTime::now()), created, ..first.clone() }
        })
        .collect();
    drop(records);
    write_raw(dir.path(), |write| {
        let mut table = write.open_table(redb::TableDefinition::<u128, &[u8]>::new("records")).unwrap();
        for record in &many {
            table.insert(record.id.as_u128(), &*record.encode().unwrap()).unwrap();
        }
    });
    let records = open(dir.path());
    let page = records.list(&|_| true, None, usize::MAX).unwrap();
    assert_eq!(page.records.len(), MAX_PAGE);
    assert!(page.records == many.iter().rev().take(MAX_PAGE).cloned().collect::<Vec<_>>());
    let since = |record: &Record| record.created >= later;
    let page = records.list(&since, None, MAX_PAGE).unwrap();
    assert_eq!(page.records.len(), 2);
    let rest = records.list(&since, page.next, MAX_PAGE).unwrap();
    assert_eq!((rest.records.len(), rest.next), (1, None));
    let nobodys = |record: &Record| record.client == "nobody";
    let page = records.list(&nobodys, None, 1).unwrap();
    assert!(page.records.is_empty() && page.next.is_some());
}

#[test]
fn readers_and_ending_builds_do_not_block_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let records = Arc::new(open(dir.path()));
    let (ended, all_ended) = std::sync::mpsc::channel();
    let theirs = Arc::clone(&records);
    let ending = thread::spawn(move || {
        (0..50).for_each(|number| drop(run(&theirs, &number.to_string(), b"x", built())));
        ended.send(()).unwrap();
    });
    let ended = Arc::new(AtomicBool::new(false));
    let theirs = Arc::clone(&ended);
    let asking = thread::spawn(move || {
        while !theirs.load(Ordering::Relaxed) {
            let page = records.list(&|_| true, None, 10).unwrap();
            page.records.iter().for_each(|record| drop(records.get(record.id).unwrap()));
        }
    });
    all_ended.recv_timeout(Duration::from_secs(300)).expect("no deadlock");
    ended.store(true, Ordering::Relaxed);
    [ending, asking].into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn large_records_come_a_few_at_a_time_and_each_once() {
    let dir = tempfile::tempdir().unwrap();
    let records = open(dir.path());
    let output = Output { node: Node::Symlink { target: "t".try_into().unwrap() }, needles: (0..700_000).collect() };
    let large = || End { outcome: Outcome::Built(vec![output.clone()]), usage: None, kept: None };
    let mut made: Vec<_> = (0..6).map(|number: u8| run(&records, &number.to_string(), b"", large()).id).collect();
    made.reverse();
    let (mut seen, mut before) = (Vec::new(), None);
    loop {
        let page = records.list(&|_| true, before, MAX_PAGE).unwrap();
        assert!(page.records.len() <= 4, "{} records of 5 MB each", page.records.len());
        seen.extend(page.records.iter().map(|record| record.id));
        before = page.next;
        if before.is_none() {
            break;
        }
    }
    assert_eq!(seen, made);
}

#[test]
fn a_failure_of_many_long_names_is_a_small_record() {
    let dir = tempfile::tempdir().unwrap();
    let name = "\u{1}".repeat(4095);
    let reason = Reason::OutputMissing { outputs: vec![name; 4096], meant: None };
    let failed = BuildError::Failed(Box::new(Failed::new(reason, None)));
    let missing = run(&open(dir.path()), "m", b"", not_built(failed));
    let bytes = missing.encode().unwrap().len();
    assert!(bytes < 1 << 20, "{bytes}");
}

#[test]
fn a_proof_stays_as_long_as_its_record() {
    let dir = TempDir::new().unwrap();
    let proof = vec![7; 400_000];
    let retention = Retention { max_bytes: 1_000_000, ..Retention::default() };
    let records = Records::open(dir.path(), retention).unwrap();
    let ids: Vec<_> = (0..4)
        .map(|number| {
            let recording = records.begin(request("r"));
            let proof = proof.clone();
            recording.finish_with(built(), |record| record.outcome.is_some().then_some(proof)).unwrap();
            assert_eq!(records.proof(recording.id()).unwrap().map(|proof| proof.len()), Some(400_000), "{number}");
            recording.id()
        })
        .collect();
    let unproven = run(&records, "u", b"", built());
    assert_eq!(records.proof(unproven.id).unwrap(), None);
    // Proofs count, also after the log has been compressed.
    tidy(&records);
    tidy(&records);
    let kept = ids.iter().map(|id| (records.get(*id).unwrap().is_some(), records.proof(*id).unwrap().is_some()));
    assert_eq!(kept.collect::<Vec<_>>(), [(false, false), (false, false), (true, true), (true, true)]);
}

#[test]
fn a_flood_of_records_evicts_those_of_its_client_alone() {
    let dir = TempDir::new().unwrap();
    let records = Records::open(dir.path(), Retention { max_bytes: 40_000, ..Retention::default() }).unwrap();
    let by = |client: &str| {
        let recording = records.begin(Request { client: client.to_owned(), ..request("r") });
        recording.finish(built()).unwrap();
        recording.id()
    };
    let quiet: Vec<_> = (0..20).map(|_| by("quiet")).collect();
    let flood: Vec<_> = (0..200).map(|_| by("flood")).collect();
    tidy(&records);
    let is_there = |id: &BuildId| records.get(*id).unwrap().is_some();
    assert!(quiet.iter().all(is_there));
    assert!(!is_there(&flood[0]) && is_there(&flood[199]));
}
