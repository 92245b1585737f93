//! Progress on a terminal: a spinner that names the phase, and the build's log.
//!
//! If stderr is not a terminal, there is no spinner, and the log is passed on byte for byte.

use std::{
    borrow::Cow,
    io::{self, IsTerminal, Write},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use cofferdam_protocol::Sample;
use indicatif::{ProgressBar, ProgressStyle};
use parking_lot::{Mutex, MutexGuard};
use tokio::{runtime::Handle, task::JoinHandle};

use super::{plain_text::PlainText, quantity::show_size, terminal, timestamps::Timestamps};
use crate::{
    build::{Observer, Phase, Reason, Terminal, Times},
    network::{Connection, Verdict},
};

const TICK: Duration = Duration::from_millis(100);

/// Most denied connections that are shown.
const MAX_DENIALS: u32 = 20;

/// Writes to stderr.
pub(super) struct Progress {
    screen: Mutex<Screen>,
    /// Set if the terminal may be lent.
    lender: Option<Handle>,
    /// Ends when the shell has returned the terminal.
    lent: Mutex<Option<JoinHandle<()>>>,
    clock: Mutex<Clock>,
    /// Connections that were denied.
    denials: AtomicU32,
}

/// Shows how much a step has done: files, bytes and rate.
pub(super) struct Counter {
    step: &'static str,
    progress: Arc<Progress>,
    begun: Instant,
    files: AtomicU64,
    bytes: AtomicU64,
    /// When it was last shown, in ticks since the beginning.
    shown: AtomicU64,
}

impl Counter {
    pub(super) fn new(step: &'static str, progress: &Arc<Progress>) -> Self {
        let (files, bytes, shown) = Default::default();
        Self { step, progress: Arc::clone(progress), begun: Instant::now(), files, bytes, shown }
    }

    /// So many more.
    pub(super) fn add(&self, files: u64, bytes: u64) {
        let files = self.files.fetch_add(files, Ordering::Relaxed) + files;
        let bytes = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let time = self.begun.elapsed();
        let tick = u64::try_from(time.as_millis() / TICK.as_millis()).unwrap_or(u64::MAX);
        if self.shown.fetch_max(tick, Ordering::Relaxed) < tick {
            let line = format!("{}: {files} files, {}", self.step, with_rate(bytes, time));
            self.progress.update(&line);
        }
    }
}

/// Bytes, and how many a second.
pub(super) fn with_rate(bytes: u64, time: Duration) -> String {
    let rate = bytes as f64 / time.as_secs_f64().max(0.001);
    format!("{}, {}/s", show_size(bytes), show_size(rate as u64))
}

/// The current phase with its start, and the times of earlier phases.
#[derive(Default)]
struct Clock {
    phase: Option<(Phase, Instant)>,
    times: Times,
}

impl Clock {
    fn enter(&mut self, phase: Option<Phase>) {
        let now = Instant::now();
        if let Some((last, begun)) = self.phase {
            let spent = match last {
                Phase::Resolving => Some(&mut self.times.resolve),
                Phase::Booting => Some(&mut self.times.boot),
                Phase::Running => Some(&mut self.times.run),
                Phase::Ingesting => Some(&mut self.times.ingest),
                Phase::Queued | Phase::Keeping | Phase::Shell => None,
            };
            spent.into_iter().for_each(|spent| *spent += now - begun);
        }
        self.phase = phase.map(|phase| (phase, now));
    }
}

#[derive(Default)]
struct Screen {
    is_terminal: bool,
    /// Shows the build's log only.
    is_quiet: bool,
    spinner: Option<ProgressBar>,
    plain_text: PlainText,
    /// Of the build's log, if they are asked for.
    timestamps: Option<Timestamps>,
    /// Whether the build's last line is still incomplete.
    within_line: bool,
}

impl Progress {
    pub(super) fn new(is_quiet: bool) -> Self {
        let screen = Screen { is_terminal: io::stderr().is_terminal(), is_quiet, ..Screen::default() };
        Self {
            screen: Mutex::new(screen),
            lender: None,
            lent: Mutex::default(),
            clock: Mutex::default(),
            denials: AtomicU32::new(0),
        }
    }

    /// Begins each line of the build's log with the time when it comes.
    pub(super) fn stamp_log(self) -> Self {
        self.screen().timestamps = Some(Timestamps::default());
        self
    }

    /// Lends the terminal to an interactive command, or to the shell of a failed build.
    pub(super) fn lend_terminal(mut self, runtime: Handle) -> Self {
        self.lender = Some(runtime);
        self
    }

    /// Lends the terminal to the command or, after a failure, to a shell, if that is allowed.
    pub(super) fn lend(&self, failure: Option<&dyn std::fmt::Display>) -> Option<Terminal> {
        let lender = self.lender.as_ref()?;
        self.clear();
        if let Some(reason) = failure {
            self.note(&format!("the build failed: {reason}"));
            self.note("this is a shell in its machine; the machine ends with it");
        }
        match terminal::lend(lender) {
            Ok((terminal, lent)) => {
                *self.lent.lock() = Some(lent);
                Some(terminal)
            }
            Err(error) => {
                self.note(&format!("the terminal can't be lent to the build: {error}"));
                None
            }
        }
    }

    /// Waits until a lent terminal has been returned.
    pub(super) async fn terminal_returned(&self) {
        let lent = self.lent.lock().take();
        if let Some(lent) = lent {
            let _ = lent.await;
        }
    }

    /// Shows that a step of this command begins.
    pub(super) fn step(&self, message: &'static str) {
        self.screen().spin(message.into());
    }

    /// Shows how far a step has come.
    pub(super) fn update(&self, message: &str) {
        let mut screen = self.screen();
        match &screen.spinner {
            Some(spinner) => spinner.set_message(message.to_owned()),
            None => screen.spin(message.to_owned().into()),
        }
    }

    /// Prints one line, on a terminal or not.
    pub(super) fn note(&self, line: &str) {
        // A lent terminal is in raw mode.
        let end = if self.lent.lock().is_some() { "\r\n" } else { "\n" };
        let mut screen = self.screen();
        if !screen.is_quiet {
            screen.write(format!("{line}{end}").as_bytes());
        }
    }

    /// Removes the spinner; stderr is at the beginning of a line then.
    pub(super) fn clear(&self) {
        self.screen().end_line();
    }

    /// Removes the spinner and, on a terminal only, prints a last line.
    pub(super) fn finish(&self, line: &str) {
        let mut screen = self.screen();
        screen.stop();
        if screen.is_terminal && !screen.is_quiet {
            screen.end_line();
            screen.write(format!("{line}\n").as_bytes());
        }
    }

    /// The time of each phase. Of a build that was joined late, only what was watched counts.
    pub(super) fn times(&self) -> Times {
        let mut clock = self.clock.lock();
        clock.enter(None);
        clock.times
    }

    fn screen(&self) -> MutexGuard<'_, Screen> {
        self.screen.lock()
    }
}

impl Observer for Progress {
    fn phase(&self, phase: Phase) {
        self.clock.lock().enter(Some(phase));
        if self.lent.lock().is_some() {
            // The screen is the build's.
            return;
        }
        self.step(match phase {
            // A queued build shows its place in the queue, and the shell has the screen.
            Phase::Queued | Phase::Shell => return,
            Phase::Resolving => "resolving inputs",
            Phase::Booting => "booting",
            Phase::Running => "running",
            Phase::Ingesting => "ingesting outputs",
            Phase::Keeping => "keeping what the build left",
        });
    }

    fn connection(&self, connection: &Connection) {
        tracing::debug!("network: {connection}");
        let is_denied = matches!(connection.verdict, Verdict::Denied(_) | Verdict::Failed(_));
        if is_denied && self.denials.fetch_add(1, Ordering::Relaxed) < MAX_DENIALS {
            self.note(&format!("network: {connection}"));
        }
    }

    fn log(&self, bytes: &[u8]) {
        let mut screen = self.screen();
        let mut bytes = Cow::Borrowed(bytes);
        if screen.is_terminal {
            bytes = screen.plain_text.filter(&bytes).into_bytes().into();
        }
        if let Some(timestamps) = &mut screen.timestamps {
            bytes = timestamps.stamp(&bytes, Some(SystemTime::now())).into();
        }
        screen.write(&bytes);
    }

    fn terminal(&self, failure: Option<&Reason>) -> Option<Terminal> {
        self.lend(failure.map(|reason| reason as _))
    }

    fn sample(&self, sample: &Sample) {
        if let Some(spinner) = &self.screen().spinner {
            spinner.set_message(format!("running, with {} of memory", show_size(sample.memory_bytes)));
        }
    }
}

impl Screen {
    fn spin(&mut self, message: Cow<'static, str>) {
        if !self.is_terminal || self.is_quiet {
            return;
        }
        self.end_line();
        let style = ProgressStyle::with_template("{spinner} {msg} ({elapsed})").expect("a constant template");
        let spinner = ProgressBar::new_spinner().with_style(style).with_message(message);
        spinner.enable_steady_tick(TICK);
        self.spinner = Some(spinner);
    }

    fn write(&mut self, bytes: &[u8]) {
        let Some(last) = bytes.last() else {
            return;
        };
        self.within_line = *last != b'\n';
        self.stop();
        // A build goes on even if nobody reads stderr.
        let _ = io::stderr().lock().write_all(bytes);
    }

    fn end_line(&mut self) {
        self.stop();
        if self.within_line {
            self.write(b"\n");
        }
    }

    fn stop(&mut self) {
        if let Some(spinner) = self.spinner.take() {
            spinner.finish_and_clear();
        }
    }
}
