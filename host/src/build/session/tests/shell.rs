//! The shell in a failed build.

use super::*;

/// A client with this terminal.
struct Client(parking_lot::Mutex<Option<Terminal>>);

impl Observer for Client {
    fn phase(&self, _: Phase) {}
    fn log(&self, _: &[u8]) {}
    fn terminal(&self, _: Option<&Reason>) -> Option<Terminal> {
        self.0.lock().take()
    }
}

/// The guest's side of a conversation whose build has failed.
struct FailedGuest {
    reader: FrameReader<UnixStream>,
    writer: FrameWriter<UnixStream>,
    stream: UnixStream,
}

impl FailedGuest {
    fn hear(&mut self) -> Option<FromHost> {
        self.reader.read().ok()
    }

    fn show(&mut self, bytes: &[u8]) -> Result<(), FrameError> {
        self.writer.write(&FromGuest::Output(bytes))
    }
}

/// Runs a session whose build fails and whose client has a terminal. The outcome must be that failure.
fn with_shell(
    guest: impl FnOnce(FailedGuest) + Send,
    client: impl FnOnce(mpsc::Sender<TerminalInput>, mpsc::Receiver<Bytes>, &Ending) + Send,
) {
    let (typed, input) = mpsc::channel(1);
    let (output, shown) = mpsc::channel(1);
    let size = WindowSize { rows: 24, columns: 80 };
    let terminal = Terminal { kind: "xterm".to_owned(), size, input, output };
    let options = Options { shell: Some(Duration::from_secs(60)), ..options() };
    let (host, stream) = UnixStream::pair().unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let observer = Arc::new(Client(Some(terminal).into()));
    with_session(host, (&options, observer), SILENCE, |session, ending| {
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let clone = || stream.try_clone().unwrap();
                let mut it = FailedGuest {
                    reader: FrameReader::new(clone(), MAX_FROM_HOST_BYTES),
                    writer: FrameWriter::new(clone(), usize::MAX),
                    stream: clone(),
                };
                it.writer.write(&HELLO).unwrap();
                it.writer.write(&exited(End::Exited(7))).unwrap();
                assert!(matches!(it.hear(), Some(FromHost::Specification(_))));
                assert_eq!(it.hear(), Some(FromHost::Shell { term: "xterm".to_owned(), size }));
                guest(it);
            });
            scope.spawn(move || client(typed, shown, ending));
            match session.converse().unwrap_err() {
                BuildError::Failed(failed) => assert_eq!(failed.reason, Reason::ExitCode(7)),
                other => panic!("{}", told(&other)),
            }
        });
    });
}

#[test]
fn a_shell_and_its_terminal_exchange_bytes_until_the_shell_ends() {
    let size = WindowSize { rows: 50, columns: 132 };
    let long = vec![b'l'; MAX_INPUT_BYTES + 1];
    with_shell(
        |mut guest| {
            guest.show(b"$ ").unwrap();
            assert_eq!(guest.hear(), Some(FromHost::Resize(size)));
            assert_eq!(guest.hear(), Some(FromHost::Input(long[1..].to_vec().into())));
            assert_eq!(guest.hear(), Some(FromHost::Input(b"l".to_vec().into())));
            guest.show(b"bye").unwrap();
            guest.writer.write(&FromGuest::ShellEnded).unwrap();
            assert_eq!(guest.hear(), None);
        },
        |typed, mut shown, _| {
            assert_eq!(shown.blocking_recv().unwrap(), "$ ");
            typed.blocking_send(TerminalInput::Resize(size)).unwrap();
            typed.blocking_send(TerminalInput::Bytes(long.clone().into())).unwrap();
            assert_eq!(shown.blocking_recv().unwrap(), "bye");
            assert_eq!(shown.blocking_recv(), None);
            assert!(typed.is_closed());
        },
    );
}

#[test]
fn a_client_that_goes_away_ends_its_shell() {
    for keeps_reading in [true, false] {
        with_shell(
            |mut guest| {
                while guest.show(b"x").is_ok() {}
                while guest.hear().is_some() {}
            },
            |typed, mut shown, _| {
                let first = shown.blocking_recv().unwrap();
                assert_eq!(first, "x");
                if keeps_reading {
                    drop(typed);
                    while shown.blocking_recv().is_some() {}
                } else {
                    drop(shown);
                    while !typed.is_closed() {
                        std::thread::yield_now();
                    }
                }
            },
        );
    }
}

#[test]
fn a_client_that_stops_reading_blocks_the_shell_until_hang_up() {
    let (stuck, is_stuck) = std::sync::mpsc::channel();
    with_shell(
        move |mut guest| {
            guest.stream.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
            let piece = vec![0; MAX_DATA_BYTES];
            let written = (0..10_000).take_while(|_| guest.show(&piece).is_ok()).count();
            assert!(written < 100, "the host took {written} unread pieces");
            stuck.send(()).unwrap();
            // To the end of the connection.
            while guest.hear().is_some() {}
        },
        move |_typed, _shown, ending| {
            is_stuck.recv().unwrap();
            ending.hang_up();
        },
    );
}

#[test]
fn a_guest_that_breaks_a_rule_ends_its_shell() {
    for lie in [FromGuest::Finished, HELLO, FromGuest::Tree(Event::End), FromGuest::Kept { skipped: 0 }] {
        with_shell(
            |mut guest| {
                guest.writer.write(&lie).unwrap();
                assert_eq!(guest.hear(), None);
            },
            |_typed, mut shown, _| assert_eq!(shown.blocking_recv(), None),
        );
    }
}
