//! A session with a guest whose whole side of the conversation is known: for tests, and for fuzzing.

use std::{io::Write, net::Shutdown, os::unix::net::UnixStream, sync::Arc, thread, time::Duration};

use cofferdam_castore::{Store, refscan::ReferencePattern};
use cofferdam_protocol::{
    FromHost, Specification,
    frame::{FrameReader, MAX_FROM_HOST_BYTES},
};
use tokio::runtime::Handle;

use super::{
    ending::Ending,
    error::BuildError,
    exchange::Exchange,
    observer::Observer,
    options::Options,
    phase::Phase,
    progress::Progress,
    session::{Outcome, Session},
};

/// Longest time for which the host waits for a byte. The guest has written all of them before.
const PATIENCE: Duration = Duration::from_secs(10);

/// The string that outputs are scanned for.
const NEEDLE: &str = "needle";

pub(super) struct Silent;

impl Observer for Silent {
    fn phase(&self, _: Phase) {}
    fn log(&self, _: &[u8]) {}
}

/// Holds the session with a guest that writes `wire`, ignores the host and hangs up. Gives the outcome, and the messages that the
/// host sent.
pub(super) fn rehearse(
    runtime: &Handle,
    (options, store, outputs): (&Options, &Store, &[&str]),
    ending: Ending,
    wire: &[u8],
) -> (Outcome, Vec<FromHost>) {
    let (host, mut guest) = UnixStream::pair().expect("sockets can be made");
    ending.connect(host).expect("nothing is connected yet");
    let ending = Arc::new(ending);
    let line = ending.line().expect("it is connected");
    let progress = Progress::new(Arc::new(Silent), options, Arc::clone(&ending));
    let needles = ReferencePattern::new([NEEDLE]).expect("it is short");
    thread::scope(|scope| {
        let guest = scope.spawn(move || {
            // The host may hang up at the first broken rule.
            let _ = guest.write_all(wire);
            let _ = guest.shutdown(Shutdown::Write);
            let mut reader = FrameReader::new(guest, MAX_FROM_HOST_BYTES);
            std::iter::from_fn(|| reader.read().ok()).collect()
        });
        let exchange = Exchange { line, store, handle: runtime.clone(), progress: &progress, ending: &ending, options };
        let session = Session {
            exchange,
            specification: specification(outputs),
            needles: &needles,
            memory_bytes: 1 << 30,
            is_greeted: false,
            silence: PATIENCE,
        };
        let outcome = session.converse();
        ending.hang_up();
        (outcome, guest.join().expect("it only copies bytes"))
    })
}

/// What the guest would be told.
pub(super) fn specification(outputs: &[&str]) -> Specification {
    Specification {
        command_args: vec!["command".to_owned()],
        environment: vec![],
        working_dir: "build".to_owned(),
        inputs_dir: "inputs".to_owned(),
        scratch_paths: vec!["build".to_owned()],
        additional_files: vec![],
        outputs: outputs.iter().map(|&output| output.to_owned()).collect(),
        provide_bin_sh: false,
        host_paths: Vec::new(),
        network: false,
        kvm: false,
        processes: 100,
        user_namespaces: false,
        ca_file: None,
        secrets: Vec::new(),
        unix_time_ns: 0,
        terminal: None,
    }
}

/// Whether a guest that says this comes to the end of a build, with success or not. Its outputs are `build/a` and `build/b`.
pub(crate) fn ends_a_build(runtime: &Handle, options: &Options, wire: &[u8]) -> bool {
    let (outcome, _) = rehearse(runtime, (options, &Store::memory(), &["build/a", "build/b"]), Ending::new(), wire);
    match outcome {
        Ok((result, _)) => result.outputs.len() == 2,
        Err(error) => matches!(error, BuildError::Failed(_)),
    }
}
