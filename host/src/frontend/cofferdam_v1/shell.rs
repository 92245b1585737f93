use std::time::Duration;

use cofferdam_protocol::WindowSize;
use tokio::{sync::mpsc, time::timeout};
use tonic::{Status, Streaming};

use cofferdam_proto::cofferdam::v1::{ShellInput, ShellStart, TerminalSize, shell_input::Input};

use super::super::outlet::BUFFERED_MESSAGES;
use crate::build::{Terminal, TerminalInput};

/// How long a client may take to name the build.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// The first message.
pub(super) async fn start(inputs: &mut Streaming<ShellInput>) -> Result<ShellStart, Status> {
    let first = timeout(START_TIMEOUT, inputs.message()).await;
    let first = first.map_err(|_| Status::deadline_exceeded("the client did not name a build in time"))??;
    match first.and_then(|first| first.input) {
        Some(Input::Start(start)) => Ok(start),
        _ => Err(Status::invalid_argument("the first message must be `start`")),
    }
}

/// A terminal for the shell, and the client's ends of it.
pub(super) fn terminal(start: ShellStart) -> (Terminal, mpsc::Sender<TerminalInput>, mpsc::Receiver<bytes::Bytes>) {
    let (typed, input) = mpsc::channel(BUFFERED_MESSAGES);
    let (output, shown) = mpsc::channel(BUFFERED_MESSAGES);
    let size = size(start.size.unwrap_or(TerminalSize { rows: 24, columns: 80 }));
    (Terminal { kind: start.kind, size, input, output }, typed, shown)
}

/// Passes typed bytes on until either side ends.
pub(super) async fn pass(mut inputs: Streaming<ShellInput>, typed: mpsc::Sender<TerminalInput>) {
    loop {
        let message = tokio::select! {
            () = typed.closed() => return,
            message = inputs.message() => message,
        };
        let Ok(Some(message)) = message else { return };
        let input = match message.input {
            Some(Input::Typed(bytes)) => TerminalInput::Bytes(bytes),
            Some(Input::Resize(to)) => TerminalInput::Resize(size(to)),
            Some(Input::Start(_)) | None => return,
        };
        if typed.send(input).await.is_err() {
            return;
        }
    }
}

fn size(TerminalSize { rows, columns }: TerminalSize) -> WindowSize {
    let within = |count| u16::try_from(count).unwrap_or(u16::MAX);
    WindowSize { rows: within(rows), columns: within(columns) }
}
