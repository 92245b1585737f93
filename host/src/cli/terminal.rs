//! Lends this process's terminal to a build.

use std::{
    env,
    io::{self, IsTerminal, Read, Write, stderr, stdin},
    thread,
};

use bytes::Bytes;
use cofferdam_protocol::WindowSize;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use parking_lot::Mutex;
use rustix::termios::tcgetwinsize;
use tokio::{
    runtime::Handle,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::JoinHandle,
};

use crate::build::{Terminal, TerminalInput};

/// Messages that wait in each direction.
const QUEUE: usize = 4;

/// Bytes of typed input that are read at a time.
const TYPED_BYTES: usize = 4096;

/// Whether there is a terminal to lend.
pub(super) fn is_there() -> bool {
    stdin().is_terminal() && stderr().is_terminal()
}

/// Lends the terminal. The task ends soon after the shell, when the terminal's settings have been restored.
pub(super) fn lend(runtime: &Handle) -> io::Result<(Terminal, JoinHandle<()>)> {
    let _entered = runtime.enter();
    let mut resized = signal(SignalKind::window_change())?;
    let size = size()?;
    let raw = Raw::enter()?;
    let (typed, input) = mpsc::channel(QUEUE);
    let (output, mut shown) = mpsc::channel::<Bytes>(QUEUE);
    let resizes = typed.clone();
    // It ends with the process at the latest: nothing wakes a thread that waits for a key.
    thread::Builder::new().name("terminal".to_owned()).spawn(move || read_keys(&typed))?;
    let watching = runtime.spawn(async move {
        while resized.recv().await.is_some() {
            let Ok(size) = self::size() else { break };
            if resizes.send(TerminalInput::Resize(size)).await.is_err() {
                break;
            }
        }
    });
    let returned = runtime.spawn_blocking(move || {
        while let Some(bytes) = shown.blocking_recv() {
            if stderr().write_all(&bytes).is_err() {
                break;
            }
        }
        watching.abort();
        drop(raw);
    });
    let kind = env::var("TERM").unwrap_or_default();
    Ok((Terminal { kind, size, input, output }, returned))
}

fn read_keys(typed: &mpsc::Sender<TerminalInput>) {
    let mut buffer = [0; TYPED_BYTES];
    while let Ok(length @ 1..) = stdin().read(&mut buffer) {
        if typed.blocking_send(TerminalInput::Bytes(Bytes::copy_from_slice(&buffer[..length]))).is_err() {
            break;
        }
    }
}

fn size() -> io::Result<WindowSize> {
    let size = tcgetwinsize(stderr())?;
    Ok(WindowSize { rows: size.ws_row, columns: size.ws_col })
}

/// The terminal's settings before it was lent.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Takes the terminal back when dropped, also when this process panics.
pub(super) struct TakeBack;

impl Drop for TakeBack {
    fn drop(&mut self) {
        take_back();
    }
}

/// Restores the settings of a lent terminal, before this process ends at once.
pub(super) fn take_back() {
    if let Some(before) = BEFORE.lock().take() {
        let _ = tcsetattr(stdin(), SetArg::TCSADRAIN, &before);
    }
}

/// The terminal in raw mode, until dropped.
struct Raw;

impl Raw {
    fn enter() -> io::Result<Self> {
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        *BEFORE.lock() = Some(before);
        let entered = Self;
        tcsetattr(stdin(), SetArg::TCSADRAIN, &raw)?;
        Ok(entered)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        take_back();
    }
}
