//! What is kept of a failed build.

use super::*;

fn keeping() -> Options {
    Options { keep_failed: true, ..options() }
}

fn kept_of(messages: &[FromGuest<'_>], store: &Store) -> Option<Kept> {
    let messages = [&[HELLO, exited(End::Exited(7))], messages].concat();
    let failed = Ended::of(&keeping(), Ending::new(), &wire(&messages), &["build/a"], store).failed();
    // Whatever comes of it.
    assert_eq!(failed.reason, Reason::ExitCode(7));
    failed.kept
}

const FILE: FromGuest<'_> = FromGuest::Tree(Event::File { name: b"file", executable: false });
const DATA: FromGuest<'_> = FromGuest::Tree(Event::Data(b"left"));

#[test]
fn what_a_failed_build_has_left_is_stored() {
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
fn a_guest_that_lies_about_what_is_left_has_nothing_kept_and_has_failed_all_the_same() {
    let large = [0; 65];
    for messages in [
        vec![],
        vec![ROOT, FromGuest::Kept { skipped: 0 }],
        vec![ROOT, END, ROOT, END, FromGuest::Kept { skipped: 0 }],
        vec![ROOT, FILE, FILE],
        vec![ROOT, FILE, FromGuest::Tree(Event::Data(&large)), END, END, FromGuest::Kept { skipped: 0 }],
        vec![ROOT, END, FromGuest::Finished],
        vec![FromGuest::Missing],
        vec![FromGuest::Sample(Sample::default())],
    ] {
        let store = Store::memory();
        assert_eq!(kept_of(&messages, &store), None, "{messages:?}");
    }
}

#[test]
fn nobody_asks_for_what_is_left_unless_somebody_wants_it() {
    let messages = wire(&[HELLO, exited(End::Exited(7)), ROOT, END, FromGuest::Kept { skipped: 0 }]);
    let ended = Ended::of(&options(), Ending::new(), &messages, &[], &Store::memory());
    assert!(matches!(ended.said[..], [FromHost::Specification(_), FromHost::Acknowledge]), "{:?}", ended.said);
    assert_eq!(ended.failed().kept, None);
    // Somebody else has decided how it ends.
    let ending = Ending::new();
    assert_eq!(ending.claim(Party::Task), Claim::Won);
    let ended = Ended::of(&keeping(), ending, &messages, &[], &Store::memory());
    assert!(matches!(ended.said[..], [FromHost::Specification(_), FromHost::Acknowledge]), "{:?}", ended.said);
}

#[test]
fn outputs_that_are_missing_or_can_not_be_stored_leave_something_too() {
    let left = [ROOT, END, FromGuest::Kept { skipped: 0 }];
    let unsupported = FromGuest::Unsupported { path: b"", kind: UnsupportedKind::Fifo };
    for (outputs, code) in
        [(&[FromGuest::Missing, FromGuest::Finished][..], "output_missing"), (&[unsupported], "output_unsupported")]
    {
        let messages = [&[HELLO, exited(End::Exited(0))], outputs, &left].concat();
        let ended = Ended::of(&keeping(), Ending::new(), &wire(&messages), &["build/a"], &Store::memory());
        let failed = ended.failed();
        assert_eq!(failed.reason.code(), code);
        assert!(failed.kept.is_some());
    }
}

#[test]
fn a_command_that_writes_too_much_is_stopped_where_its_guest_is_needed() {
    let log = FromGuest::Log { stream: Stream::Stderr, bytes: &[b'x'; LOG_BYTES as usize] };
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
fn messages_of_what_comes_after_a_failure_have_no_place_before_it() {
    for (message, name) in [
        (FromGuest::Finished, "the end of the outputs"),
        (FromGuest::Kept { skipped: 0 }, "the end of what is kept"),
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
