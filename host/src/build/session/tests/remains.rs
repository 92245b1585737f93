//! Keeping the remains of a failed build.

use super::*;

fn keeping() -> Options {
    Options { keep_failed: true, ..options() }
}

fn kept_of(messages: &[FromGuest<'_>], store: &Store) -> Option<Kept> {
    let messages = [&[HELLO, exited(End::Exited(7))], messages].concat();
    let failed = Ended::of(&keeping(), Ending::new(), &wire(&messages), &["build/a"], store).failed();
    // The build's failure stands, even if keeping fails.
    assert_eq!(failed.reason, Reason::ExitCode(7));
    failed.kept
}

const FILE: FromGuest<'_> = FromGuest::Tree(Event::File { name: b"file", executable: false });
const DATA: FromGuest<'_> = FromGuest::Tree(Event::Data(b"left"));

#[test]
fn remains_of_a_failed_build_are_stored() {
    let store = Store::memory();
    let kept = kept_of(&[ROOT, FILE, DATA, END, END, FromGuest::Kept { skipped: 3 }], &store).unwrap();
    assert_eq!(kept.skipped, 3);
    let Node::Directory { digest, size: 2 } = kept.node else { panic!("{:?}", kept.node) };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    assert!(runtime.block_on(store.directories.get(&digest)).unwrap().is_some());
    assert!(runtime.block_on(store.blobs.has(&blake3::hash(b"left").into())).unwrap());
    assert_eq!(kept_of(&[FromGuest::Kept { skipped: 0 }], &store), None);
}

#[test]
fn malformed_remains_are_dropped_and_the_failure_stands() {
    let large = [0; 65];
    for messages in [
        vec![],
        vec![ROOT, FromGuest::Kept { skipped: 0 }],
        vec![ROOT, END, ROOT, END, FromGuest::Kept { skipped: 0 }],
        vec![ROOT, FILE, FILE],
        vec![ROOT, FILE, FromGuest::Tree(Event::Data(&large)), END, END, FromGuest::Kept { skipped: 0 }],
        vec![ROOT, END, FromGuest::Finished],
        vec![FromGuest::Missing { below_working_dir: false }],
        vec![FromGuest::Sample(Sample::default())],
    ] {
        let store = Store::memory();
        assert_eq!(kept_of(&messages, &store), None, "{messages:?}");
    }
}

#[test]
fn remains_are_requested_only_with_keep_failed() {
    let messages = wire(&[HELLO, exited(End::Exited(7)), ROOT, END, FromGuest::Kept { skipped: 0 }]);
    let ended = Ended::of(&options(), Ending::new(), &messages, &[], &Store::memory());
    assert!(matches!(ended.said[..], [FromHost::Specification(_), FromHost::Acknowledge]), "{:?}", ended.said);
    assert_eq!(ended.failed().kept, None);
    // Nor when the task has claimed the end.
    let ending = Ending::new();
    assert_eq!(ending.claim(Party::Task), Claim::Won);
    let ended = Ended::of(&keeping(), ending, &messages, &[], &Store::memory());
    assert!(matches!(ended.said[..], [FromHost::Specification(_), FromHost::Acknowledge]), "{:?}", ended.said);
}

#[test]
fn remains_are_kept_after_missing_or_unsupported_outputs() {
    let left = [ROOT, END, FromGuest::Kept { skipped: 0 }];
    let unsupported = FromGuest::Unsupported { path: b"", kind: UnsupportedKind::Fifo };
    for (outputs, code) in [
        (&[FromGuest::Missing { below_working_dir: false }, FromGuest::Finished][..], "output_missing"),
        (&[unsupported], "output_unsupported"),
    ] {
        let messages = [&[HELLO, exited(End::Exited(0))], outputs, &left].concat();
        let ended = Ended::of(&keeping(), Ending::new(), &wire(&messages), &["build/a"], &Store::memory());
        let failed = ended.failed();
        assert_eq!(failed.reason.code(), code);
        assert!(failed.kept.is_some());
    }
}

#[test]
fn a_command_at_the_log_limit_is_stopped_and_its_remains_are_kept() {
    let log = FromGuest::Log(&[b'x'; LOG_BYTES as usize]);
    let left = [exited(End::Signaled(9)), ROOT, END, FromGuest::Kept { skipped: 0 }];
    let messages = [&[HELLO, log.clone(), log.clone(), log][..], &left].concat();
    let ended = Ended::of(&keeping(), Ending::new(), &wire(&messages), &[], &Store::memory());
    let said = [FromHost::Stop, FromHost::Keep(options().limits.outputs()), FromHost::Acknowledge];
    assert_eq!(ended.said[1..], said);
    let failed = ended.failed();
    assert_eq!(failed.reason, Reason::LimitReached { limit: Limit::LogBytes, allowed: LOG_BYTES });
    assert!(failed.kept.is_some());
}

#[test]
fn messages_about_remains_are_refused_before_a_failure() {
    for (message, name) in [
        (FromGuest::Finished, "the end of the outputs"),
        (FromGuest::Kept { skipped: 0 }, "the end of the remains"),
        (FromGuest::Output(b"$ "), "a shell's output"),
        (FromGuest::ShellEnded, "a shell's end"),
    ] {
        for (told, place) in [
            (refusal(std::slice::from_ref(&message), &[]), "instead of its hello"),
            (refusal(&[HELLO, message.clone()], &[]), "while the command ran"),
            (refusal_of_outputs(std::slice::from_ref(&message)), "before all outputs had come"),
        ] {
            assert!(told.contains(&format!("it sent {name} {place}")), "{told}");
        }
    }
}
