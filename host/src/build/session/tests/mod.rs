//! Hostile guests: each breaks one rule of the protocol, and the error names that rule.

mod remains;
mod shell;

use std::{os::unix::net::UnixStream, sync::Arc, time::Duration};

use bytes::Bytes;
use cofferdam_castore::{Node, Store};
use cofferdam_protocol::{
    MAX_DETAIL_BYTES, MAX_INPUT_BYTES, Sample, UnsupportedKind, WindowSize,
    frame::{FrameError, FrameReader, FrameWriter, MAX_DATA_BYTES, MAX_FROM_HOST_BYTES},
    tree::{self, Event},
};

use tokio::sync::mpsc;

use super::*;
use crate::{
    build::{
        Observer, Options, Terminal, TerminalInput,
        ending::Ending,
        error::Kept,
        progress::Progress,
        rehearsal::{Silent, rehearse, specification},
    },
    limits::Limits,
};

const OUTPUT_ENTRIES: u32 = 20_000;
const OUTPUT_BYTES: u64 = 64;
const LOG_BYTES: u64 = 32;
const HELLO: FromGuest<'_> = FromGuest::Hello { version: VERSION, uptime_us: 1 };
const ROOT: FromGuest<'_> = FromGuest::Tree(Event::Directory { name: b"" });
const END: FromGuest<'_> = FromGuest::Tree(Event::End);

fn exited(end: End) -> FromGuest<'static> {
    FromGuest::Exited(Report {
        end,
        out_of_memory: false,
        scratch_full: false,
        too_many_processes: None,
        usage: Usage::default(),
    })
}

fn options() -> Options {
    let limits = Limits {
        log_bytes: LOG_BYTES,
        output_bytes: OUTPUT_BYTES,
        output_entries: OUTPUT_ENTRIES,
        ..Limits::default()
    };
    Options { limits, ..Options::default() }
}

/// The session's outcome with a guest that writes `wire`, ignores the host and hangs up.
fn conclude(wire: &[u8], outputs: &[&str], store: &Store) -> Outcome {
    Ended::of(&options(), Ending::new(), wire, outputs, store).outcome
}

/// A session's outcome, and the messages that it sent.
struct Ended {
    outcome: Outcome,
    said: Vec<FromHost>,
}

impl Ended {
    fn of(options: &Options, ending: Ending, wire: &[u8], outputs: &[&str], store: &Store) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let (outcome, said) = rehearse(runtime.handle(), (options, store, outputs), ending, wire);
        Self { outcome, said }
    }

    /// The failure of the build.
    #[track_caller]
    fn failed(self) -> Failed {
        match self.outcome.unwrap_err() {
            BuildError::Failed(failed) => *failed,
            other => panic!("{}", told(&other)),
        }
    }
}

fn wire(messages: &[FromGuest<'_>]) -> Vec<u8> {
    let mut wire = Vec::new();
    let mut writer = FrameWriter::new(&mut wire, usize::MAX);
    for message in messages {
        writer.write(message).unwrap();
    }
    wire
}

/// The error with all its causes, in one line.
fn told(error: &BuildError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

fn refusal(messages: &[FromGuest<'_>], outputs: &[&str]) -> String {
    told(&conclude(&wire(messages), outputs, &Store::memory()).unwrap_err())
}

/// The error for a guest whose command succeeds, and which then sends `messages`.
fn refusal_of_outputs(messages: &[FromGuest<'_>]) -> String {
    let start = [HELLO, exited(End::Exited(0))];
    refusal(&[&start, messages].concat(), &["build/a", "build/b"])
}

/// Gives `hold` a session over the host's end of a connection, and the ending that they share.
fn with_session(
    host: UnixStream,
    (options, observer): (&Options, Arc<dyn Observer>),
    silence: Duration,
    hold: impl FnOnce(Session<'_>, &Ending),
) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    let ending = Arc::new(Ending::new());
    ending.connect(host).unwrap();
    let progress = Progress::new(observer, options, Arc::clone(&ending));
    let exchange = Exchange {
        line: ending.line().unwrap(),
        store: &Store::memory(),
        handle: runtime.handle().clone(),
        progress: &progress,
        ending: &ending,
        options,
    };
    let needles = &ReferencePattern::new(["needle"]).unwrap();
    let specification = specification(&[]);
    let session = Session { exchange, specification, needles, memory_bytes: 1 << 30, is_greeted: false, silence };
    hold(session, &ending);
}

#[test]
fn a_guest_that_says_nothing_is_given_up() {
    let (host, guest) = UnixStream::pair().unwrap();
    FrameWriter::new(&guest, usize::MAX).write(&HELLO).unwrap();
    with_session(host, (&options(), Arc::new(Silent)), Duration::from_secs(1), |session, _| {
        let error = session.converse().unwrap_err();
        assert_eq!(told(&error), "the executor failed: the guest broke the protocol: it has not answered for 1 s");
    });
    drop(guest);
}

#[test]
fn an_honest_guest_gets_its_outputs_stored() {
    let store = Store::memory();
    let messages = [
        HELLO,
        FromGuest::Log(b"hi"),
        exited(End::Exited(0)),
        ROOT,
        FromGuest::Tree(Event::File { name: b"f", executable: true }),
        FromGuest::Tree(Event::Data(b"a nee")),
        FromGuest::Tree(Event::Data(b"dle")),
        END,
        END,
        FromGuest::Tree(Event::Symlink { name: b"", target: b"/target" }),
        FromGuest::Finished,
    ];
    let (result, _) = conclude(&wire(&messages), &["build/a", "build/b"], &store).unwrap();
    assert_eq!(result.outputs.len(), 2);
    assert_eq!(result.outputs[0].needles, [0].into());
    assert!(result.outputs[1].needles.is_empty());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let digest = blake3::hash(b"a needle").into();
    assert!(runtime.block_on(store.blobs.has(&digest)).unwrap());
}

#[test]
fn messages_out_of_place_are_refused() {
    let log = FromGuest::Log(b"x");
    for (messages, complaint) in [
        (vec![log.clone()], "it sent log bytes instead of its hello"),
        (vec![FromGuest::Finished], "it sent the end of the outputs instead of its hello"),
        (vec![HELLO, HELLO], "it sent a hello while the command ran"),
        (vec![HELLO, ROOT], "it sent a piece of an output while the command ran"),
        (vec![HELLO, FromGuest::Finished], "it sent the end of the outputs while the command ran"),
    ] {
        let told = refusal(&messages, &["build/a"]);
        assert!(told.contains(complaint), "{told}");
    }
    for (messages, complaint) in [
        (vec![log], "it sent log bytes before all outputs had come"),
        (vec![exited(End::Exited(0))], "it sent the command's end before all outputs had come"),
        (vec![FromGuest::Finished], "it sent the end of the outputs before all outputs had come"),
        (
            vec![ROOT, FromGuest::Missing { below_working_dir: false }],
            "it sent a missing output before all outputs had come",
        ),
        (vec![ROOT, FromGuest::Finished], "it sent the end of the outputs before all outputs had come"),
        (vec![ROOT, END, ROOT, END, ROOT], "it sent a piece of an output after all outputs had come"),
        (
            vec![ROOT, END, ROOT, END, FromGuest::Missing { below_working_dir: false }],
            "it sent a missing output after all outputs had come",
        ),
    ] {
        let told = refusal_of_outputs(&messages);
        assert!(told.contains(complaint), "{told}");
    }
}

#[test]
fn another_version_is_refused() {
    let told = refusal(&[FromGuest::Hello { version: 99, uptime_us: 0 }], &[]);
    assert!(told.contains("it speaks version 99"), "{told}");
}

#[test]
fn frames_are_bounded_and_whole() {
    let hello = wire(&[HELLO]);
    let huge = [&hello[..], &u32::MAX.to_le_bytes()].concat();
    let long = [&hello[..], &wire(&[FromGuest::Log(&vec![0; MAX_DATA_BYTES + 64])])].concat();
    let garbage = [&hello[..], &[3, 0, 0, 0, 0xff, 0xff, 0xff]].concat();
    let cut = &hello[..hello.len() - 1];
    for (wire, complaint) in [
        (&huge[..], "exceeds the limit of 28672 bytes"),
        (&long, "exceeds the limit of 28672 bytes"),
        (&garbage, "does not hold exactly one message"),
        (cut, "the vsock connection failed"),
        (&hello, "the vsock connection failed"),
    ] {
        let told = told(&conclude(wire, &[], &Store::memory()).unwrap_err());
        assert!(told.contains(complaint), "{told}");
    }
}

#[test]
fn lying_trees_are_refused_and_leave_nothing_in_the_store() {
    let file = |name| FromGuest::Tree(Event::File { name, executable: false });
    let long = vec![b'n'; 256];
    for (messages, complaint) in [
        (vec![FromGuest::Tree(Event::Data(b"x"))], "outside of a file"),
        (vec![END], "with nothing open"),
        (vec![ROOT, file(b"..")], "is reserved"),
        (vec![ROOT, file(b"a/b")], "holds a slash"),
        (vec![ROOT, file(b"a\0")], "holds a NUL"),
        (vec![ROOT, file(&long)], "is longer than 255 bytes"),
        (vec![file(b"name")], "must be empty"),
        (vec![ROOT, file(b"b"), END, file(b"a")], "is not greater than"),
        (vec![ROOT, file(b"a"), END, file(b"a")], "is not greater than"),
        (vec![ROOT, FromGuest::Tree(Event::Symlink { name: b"l", target: b"" })], "is empty"),
    ] {
        let told = refusal_of_outputs(&messages);
        assert!(told.contains("the guest broke the protocol") && told.contains(complaint), "{told}");
    }
}

#[test]
fn a_broken_rule_at_the_end_stores_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let blobs = format!("file://{}", directory.path().join("blobs").display());
    let directories = format!("redb://{}", directory.path().join("directories.redb").display());
    let store = cofferdam_castore::Store::from_addrs(&blobs, &directories).unwrap();
    let file =
        [FromGuest::Tree(Event::File { name: b"", executable: false }), FromGuest::Tree(Event::Data(b"lie")), END];
    let messages = [&[HELLO, exited(End::Exited(0))], &file[..], &[FromGuest::Finished]].concat();
    conclude(&wire(&messages), &["build/a", "build/b"], &store).unwrap_err();
    assert_nothing_is_stored(&store);
    // The same, true, but too late.
    let ending = Ending::new();
    assert_eq!(ending.claim(Party::Task), Claim::Won);
    Ended::of(&options(), ending, &wire(&messages), &["build/a"], &store).outcome.unwrap_err();
    assert_nothing_is_stored(&store);
    conclude(&wire(&messages), &["build/a"], &store).unwrap();
}

#[track_caller]
fn assert_nothing_is_stored(store: &Store) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    // As another build's success would commit.
    runtime.block_on(store.blobs.commit()).unwrap();
    assert!(!runtime.block_on(store.blobs.has(&blake3::hash(b"lie").into())).unwrap());
}

#[test]
fn limits_end_the_build_by_name() {
    let log = FromGuest::Log(&[b'x'; LOG_BYTES as usize]);
    let told = refusal(&[HELLO, log.clone(), log], &[]);
    assert!(told.contains("more than 32 bytes to stdout and stderr"), "{told}");

    let data = FromGuest::Tree(Event::Data(&[0; 64]));
    let told = refusal_of_outputs(&[FromGuest::Tree(Event::File { name: b"", executable: false }), data.clone(), data]);
    assert!(told.contains("the outputs hold more than 64 bytes"), "{told}");

    let names: Vec<_> = (0..20_001).map(|number| format!("{number:05}")).collect();
    let symlinks = |target| {
        let symlinks = names.iter().map(|name| FromGuest::Tree(Event::Symlink { name: name.as_bytes(), target }));
        refusal_of_outputs(&[ROOT].into_iter().chain(symlinks).collect::<Vec<_>>())
    };
    let told = symlinks(b"t");
    assert!(told.contains("the outputs hold more than 20000 files, directories and symlinks"), "{told}");
    let long = &[b't'; tree::MAX_TARGET_BYTES];
    let told = symlinks(long);
    assert!(
        told.contains("the directories of the outputs take more than 134217728 bytes of the host's memory"),
        "{told}"
    );
    let mut events = vec![ROOT];
    for (directory, names) in names.iter().zip(names.chunks(1_000)) {
        events.push(FromGuest::Tree(Event::Directory { name: directory.as_bytes() }));
        events.extend(names.iter().map(|name| FromGuest::Tree(Event::Symlink { name: name.as_bytes(), target: long })));
        events.push(FromGuest::Tree(Event::End));
    }
    let told = refusal_of_outputs(&events[..18 * 1_000]);
    assert!(told.contains("the outputs hold more than 67108864 bytes of names and symlink targets"), "{told}");
}

#[test]
fn texts_of_a_guest_are_bounded_and_escaped() {
    let long = "x".repeat(MAX_DETAIL_BYTES + 1);
    let failure = |detail| FromGuest::SetupFailed(SetupFailure { step: Step::Root, detail });
    let told = refusal(&[HELLO, failure(&long)], &[]);
    assert!(told.contains("the limit is 4096"), "{told}");
    let told = refusal(&[HELLO, failure("\x1b]0;owned\x07")], &[]);
    assert!(told.contains("assembling the build's root") && !told.contains('\x1b'), "{told}");

    let unsupported = |path| FromGuest::Unsupported { path, kind: UnsupportedKind::Fifo };
    let told = refusal_of_outputs(&[unsupported(long.as_bytes())]);
    assert!(told.contains("the limit is 4096"), "{told}");
    let told = refusal_of_outputs(&[unsupported(b"\x1b[2J")]);
    assert!(told.contains("\"build/a\" holds a named pipe") && !told.contains('\x1b'), "{told}");
}

#[test]
fn ends_of_commands_are_distinguished() {
    let report = |end, out_of_memory, scratch_full| {
        let usage = Usage::default();
        FromGuest::Exited(Report { end, out_of_memory, scratch_full, too_many_processes: None, usage })
    };
    let crowded = |end| Report {
        end,
        out_of_memory: false,
        scratch_full: false,
        too_many_processes: Some(7),
        usage: Usage::default(),
    };
    for (report, code) in [
        (report(End::Exited(7), false, false), "exit_code"),
        (report(End::Signaled(9), false, false), "signal"),
        (report(End::Signaled(9), true, false), "out_of_memory"),
        (report(End::Exited(1), false, true), "scratch_full"),
        (FromGuest::Exited(crowded(End::Exited(1))), "too_many_processes"),
        (FromGuest::Exited(Report { scratch_full: true, ..crowded(End::Exited(1)) }), "scratch_full"),
        (report(End::NotExecuted(2), false, false), "command_not_found"),
        (report(End::NotExecuted(13), false, false), "command_not_executable"),
        (report(End::NoInterpreter("/bin/python".into()), false, false), "interpreter_not_found"),
        (report(End::NoWorkingDir(2), false, false), "no_working_dir"),
    ] {
        match conclude(&wire(&[HELLO, report]), &["build/a"], &Store::memory()).unwrap_err() {
            BuildError::Failed(failed) => assert_eq!(failed.reason.code(), code),
            other => panic!("{}", told(&other)),
        }
    }
}

/// A build can't make a device, so only a guest that was taken over can have one in an output.
#[test]
fn unsupported_files_in_outputs_are_named() {
    for (kind, name) in [
        (UnsupportedKind::Fifo, "a named pipe"),
        (UnsupportedKind::Socket, "a Unix socket"),
        (UnsupportedKind::BlockDevice, "a block device"),
        (UnsupportedKind::CharacterDevice, "a character device"),
        (UnsupportedKind::TooDeep, "directories nested too deeply"),
        (UnsupportedKind::TooManyNames, "a directory with too many names to hold in memory"),
    ] {
        let told = refusal_of_outputs(&[ROOT, FromGuest::Unsupported { path: b"sub/it", kind }]);
        assert!(told.contains(&format!("output \"build/a\" holds {name} at \"sub/it\"")), "{told}");
    }
}

#[test]
fn unreadable_outputs_are_the_executors_failure() {
    let kind = UnsupportedKind::Unreadable(5);
    let messages = [HELLO, exited(End::Exited(0)), ROOT, FromGuest::Unsupported { path: b"sub\x1bit", kind }];
    let error = conclude(&wire(&messages), &["build/a"], &Store::memory()).unwrap_err();
    assert!(matches!(error, BuildError::Executor(_)));
    let told = told(&error);
    assert!(told.contains("output \"build/a\" at \"sub\\x1bit\": Input/output error"), "{told}");
}

#[test]
fn conflicting_paths_are_the_requests_fault() {
    for (step, field) in
        [(Step::Places, "inputs must not conflict"), (Step::AdditionalFiles, "additional_files must fit")]
    {
        let failure = SetupFailure { step, detail: "scratch path \"a\x1b\": Not a directory" };
        let error = conclude(&wire(&[HELLO, FromGuest::SetupFailed(failure)]), &[], &Store::memory()).unwrap_err();
        assert!(matches!(error, BuildError::Request(_)));
        let told = told(&error);
        assert!(told.contains(field) && told.contains("Not a directory") && !told.contains('\x1b'), "{told}");
    }
}

#[test]
fn all_missing_outputs_are_named() {
    let told = refusal_of_outputs(&[
        FromGuest::Missing { below_working_dir: false },
        FromGuest::Missing { below_working_dir: false },
        FromGuest::Finished,
    ]);
    assert!(told.contains("\"build/a\", \"build/b\""), "{told}");
}

#[test]
fn samples_out_of_place_and_empty_log_messages_are_refused() {
    let sample = FromGuest::Sample(Sample::default());
    let told = refusal(std::slice::from_ref(&sample), &[]);
    assert!(told.contains("it sent a sample instead of its hello"), "{told}");
    let told = refusal_of_outputs(std::slice::from_ref(&sample));
    assert!(told.contains("it sent a sample before all outputs had come"), "{told}");
    let told = refusal(&[HELLO, FromGuest::Log(b"")], &[]);
    assert!(told.contains("an empty piece of the log"), "{told}");
    let many = [&[HELLO][..], &vec![sample; 1000], &[exited(End::Exited(0)), FromGuest::Finished]].concat();
    conclude(&wire(&many), &[], &Store::memory()).unwrap();
}
