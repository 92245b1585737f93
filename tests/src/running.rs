//! A running `cofferdam` process.

use std::{
    fs::File,
    io::Read,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    Outcome,
    outcome::Expected,
    processes,
    slots::Slots,
    stretched,
    terminal::{self, Terminal},
};

/// Time limit for any command of any test, on a slow and busy machine.
const PATIENCE: Duration = Duration::from_secs(900);

/// Interval between two looks at a running process.
const LOOK: Duration = Duration::from_millis(10);

/// A started command. It is killed when dropped before its end.
#[derive(Debug)]
pub struct Running {
    child: Child,
    begun: Instant,
    stdout: Capture,
    stderr: Capture,
    expected: Expected,
    peak_bytes: u64,
    person: Option<File>,
    _slots: Option<Slots>,
}

impl Running {
    /// Starts a command. It keeps `slots` until its end.
    pub(crate) fn start(mut command: Command, expected: Expected, slots: Option<Slots>) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("can't start {command:?}: {error}"));
        let stdout = Capture::of(child.stdout.take().expect("stdout is a pipe"));
        let stderr = Capture::of(child.stderr.take().expect("stderr is a pipe"));
        Self { child, begun: Instant::now(), stdout, stderr, expected, peak_bytes: 0, person: None, _slots: slots }
    }

    /// Starts a command on a terminal. The terminal's output counts as its stderr.
    pub(crate) fn start_on(terminal: Terminal, command: &Command, expected: Expected, slots: Option<Slots>) -> Self {
        let mut command = terminal.put_on(command);
        let mut child = command.stdout(Stdio::piped()).spawn().expect("setsid is there");
        // It holds copies of the program's side of the terminal, which would keep the terminal open.
        drop(command);
        let stdout = Capture::of(child.stdout.take().expect("stdout is a pipe"));
        let person = terminal.into_person();
        let stderr = Capture::of(person.try_clone().expect("descriptors can be copied"));
        let begun = Instant::now();
        Self { child, begun, stdout, stderr, expected, peak_bytes: 0, person: Some(person), _slots: slots }
    }

    /// Types a text at its terminal.
    #[track_caller]
    pub fn types(&self, text: &str) -> &Self {
        terminal::type_into(self.person.as_ref().expect("it runs on a terminal"), text);
        self
    }

    /// Changes the size of its terminal.
    #[track_caller]
    pub fn resizes(&self, size: (u16, u16)) -> &Self {
        terminal::resize(self.person.as_ref().expect("it runs on a terminal"), size);
        self
    }

    /// The person's side of its terminal.
    #[track_caller]
    pub fn terminal(&self) -> &File {
        self.person.as_ref().expect("it runs on a terminal")
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Waits until it has written `text` to stderr, where a build's own output appears.
    pub fn wait_for(&self, text: &str) -> &Self {
        let told = self.stderr.wait_until(stretched(PATIENCE), |bytes| contains(bytes, text.as_bytes()));
        assert!(told, "it never said {text:?}, but:\n{}", self.stderr.text());
        self
    }

    /// Waits until it has written `text` to stderr so many times.
    pub fn wait_for_times(&self, text: &str, times: usize) -> &Self {
        let told = self.stderr.wait_until(stretched(PATIENCE), |bytes| {
            bytes.windows(text.len()).filter(|window| *window == text.as_bytes()).count() >= times
        });
        assert!(told, "it did not say {text:?} {times} times, but:\n{}", self.stderr.text());
        self
    }

    /// The first lines of its stdout, as soon as there are so many.
    #[track_caller]
    pub fn stdout_lines(&self, count: usize) -> Vec<String> {
        let lines = |bytes: &[u8]| bytes.iter().filter(|&&byte| byte == b'\n').count();
        let told = self.stdout.wait_until(stretched(PATIENCE), |bytes| lines(bytes) >= count);
        assert!(told, "it never wrote {count} lines, but:\n{}", self.stdout.text());
        self.stdout.text().lines().take(count).map(str::to_owned).collect()
    }

    /// The time since its start.
    pub fn age(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Its stderr so far.
    pub fn stderr_so_far(&self) -> String {
        self.stderr.text()
    }

    /// Sends a signal to the `cofferdam` process alone.
    pub fn signal(&self, signal: Signal) -> &Self {
        kill(Pid::from_raw(self.pid()), signal).expect("it is our child and not waited for");
        self
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("it is our child").is_none()
    }

    /// Waits for its end, and looks at what it leaves before its terminal is closed.
    pub fn end_with<T>(mut self, look: impl FnOnce(&Self) -> T) -> (Outcome, T) {
        let status = self.wait();
        let seen = look(&self);
        (self.outcome(status), seen)
    }

    /// Waits for its end.
    pub fn end(mut self) -> Outcome {
        let status = self.wait();
        self.outcome(status)
    }

    fn wait(&mut self) -> ExitStatus {
        let waiting = Instant::now();
        loop {
            self.peak_bytes = self.peak_bytes.max(processes::peak_resident_bytes(self.child.id()).unwrap_or(0));
            if let Some(status) = self.child.try_wait().expect("it is our child") {
                return status;
            }
            assert!(
                waiting.elapsed() < stretched(PATIENCE),
                "it did not end within {} seconds more; stderr:\n{}",
                stretched(PATIENCE).as_secs(),
                self.stderr.text()
            );
            thread::sleep(LOOK);
        }
    }

    fn outcome(mut self, status: ExitStatus) -> Outcome {
        let took = self.begun.elapsed();
        let expected = std::mem::take(&mut self.expected);
        Outcome::new(status, took, self.peak_bytes, self.stdout.finish(), &self.stderr.finish(), expected)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The contents of a pipe, read by a thread.
#[derive(Debug)]
struct Capture {
    shared: Arc<(Mutex<Said>, Condvar)>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Said {
    bytes: Vec<u8>,
    ended: bool,
}

impl Capture {
    fn of(mut pipe: impl Read + Send + 'static) -> Self {
        let shared = Arc::new((Mutex::new(Said::default()), Condvar::new()));
        let theirs = Arc::clone(&shared);
        let reader = thread::spawn(move || {
            let mut buffer = [0; 64 * 1024];
            loop {
                let length = pipe.read(&mut buffer).unwrap_or(0);
                let mut said = lock(&theirs.0);
                said.bytes.extend_from_slice(&buffer[..length]);
                said.ended = length == 0;
                theirs.1.notify_all();
                if said.ended {
                    return;
                }
            }
        });
        Self { shared, reader: Some(reader) }
    }

    fn wait_until(&self, patience: Duration, enough: impl Fn(&[u8]) -> bool) -> bool {
        let (said, changed) = &*self.shared;
        let waiting = |said: &mut Said| !said.ended && !enough(&said.bytes);
        let (said, _) =
            changed.wait_timeout_while(lock(said), patience, waiting).unwrap_or_else(PoisonError::into_inner);
        enough(&said.bytes)
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&lock(&self.shared.0).bytes).into_owned()
    }

    /// Everything up to the pipe's end, which comes when the last process with it ends.
    fn finish(&mut self) -> Vec<u8> {
        assert!(
            self.wait_until(stretched(Duration::from_secs(5)), |_| false) || lock(&self.shared.0).ended,
            "the command has ended, but something that it left behind still holds its output open"
        );
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the reader doesn't panic");
        }
        std::mem::take(&mut lock(&self.shared.0).bytes)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn contains(bytes: &[u8], text: &[u8]) -> bool {
    bytes.windows(text.len()).any(|window| window == text)
}
