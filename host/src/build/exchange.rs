//! Messages to and from a guest, and their errors. Shared by the session, the keeping of remains, and the shell.

use cofferdam_castore::Store;
use cofferdam_protocol::{
    FromGuest, Usage,
    frame::FrameError,
    tree::{self, TreeError},
};
use tokio::runtime::Handle;

use super::{
    ending::Ending,
    error::{BuildError, ExecutorError, Failed, Limit, ProtocolError, Reason},
    line::{Line, Reader},
    options::Options,
    progress::Progress,
};
use crate::outputs::{self, ReceiveError};

/// The host's side of the exchange with one guest.
pub(super) struct Exchange<'a> {
    pub(super) line: &'a Line,
    pub(super) store: &'a Store,
    pub(super) handle: Handle,
    pub(super) progress: &'a Progress,
    pub(super) ending: &'a Ending,
    pub(super) options: &'a Options,
}

pub(super) fn next<'r>(reader: &'r mut Reader<'_>) -> Result<FromGuest<'r>, BuildError> {
    reader.read().map_err(frame)
}

pub(super) fn frame(error: FrameError) -> BuildError {
    protocol(ProtocolError::Frame(error))
}

pub(super) fn out_of_place(message: &FromGuest<'_>, state: &'static str) -> BuildError {
    let message = match message {
        FromGuest::Hello { .. } => "a hello",
        FromGuest::SetupFailed(_) => "a failure of its setup",
        FromGuest::Log { .. } => "log bytes",
        FromGuest::Exited(_) => "the command's end",
        FromGuest::Missing { .. } => "a missing output",
        FromGuest::Unsupported { .. } => "an output that can't be stored",
        FromGuest::Tree(_) => "a piece of an output",
        FromGuest::Finished => "the end of the outputs",
        FromGuest::Sample(_) => "a sample",
        FromGuest::Kept { .. } => "the end of the remains",
        FromGuest::Output(_) => "a shell's output",
        FromGuest::ShellEnded => "a shell's end",
        FromGuest::Pong => "an answer to a ping",
    };
    protocol(ProtocolError::OutOfPlace { message, state })
}

pub(super) fn protocol(error: ProtocolError) -> BuildError {
    BuildError::Executor(ExecutorError::Protocol(error))
}

pub(super) fn failed(reason: Reason, usage: Option<Usage>) -> BuildError {
    BuildError::Failed(Box::new(Failed::new(reason, usage)))
}

fn limit(limit: Limit, allowed: u64) -> BuildError {
    failed(Reason::LimitReached { limit, allowed }, None)
}

pub(super) fn receive_failed(error: ReceiveError) -> BuildError {
    match error {
        ReceiveError::Tree(TreeError::TooManyBytes { limit: allowed }) => limit(Limit::OutputBytes, allowed),
        ReceiveError::Tree(TreeError::TooManyEntries { limit: allowed }) => limit(Limit::OutputEntries, allowed),
        ReceiveError::Tree(TreeError::TooMuchMetadata) => limit(Limit::OutputMetadata, tree::MAX_METADATA_BYTES),
        ReceiveError::DirectoryMemory(_) => limit(Limit::OutputDirectories, outputs::MAX_DIRECTORY_MEMORY_BYTES),
        ReceiveError::Tree(error) => protocol(ProtocolError::Tree(error)),
        ReceiveError::Store(error) => BuildError::Executor(ExecutorError::Store(error)),
    }
}

/// Whether the connection just ended. A death of the guest or a helper process is then the better explanation.
pub(super) fn is_disconnect(error: &BuildError) -> bool {
    matches!(error, BuildError::Executor(ExecutorError::Protocol(ProtocolError::Frame(FrameError::Io(_)))))
}
