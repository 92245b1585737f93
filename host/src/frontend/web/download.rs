//! What a build has made, as a stream of bytes.

use std::{
    io::{self, Write},
    path::Path,
    time::Duration,
};

use bytes::Bytes;
use cofferdam_castore::{Node, Store, archive, export::ExportError, nar, tar};
use cofferdam_rpc::{Page, Turn};
use futures::{Stream, stream};
use tokio::{runtime::Handle, sync::mpsc, time::timeout};

use super::{
    answer::{self, Problem},
    path::Question,
};

/// How long a client may take for a piece.
pub(super) const PIECE_TIMEOUT: Duration = Duration::from_secs(60);

/// Pieces that wait for a client.
const BUFFERED_PIECES: usize = 4;

/// Most entries of an archive: their directories are in memory while it is made.
const MAX_ARCHIVED: u64 = 100_000;

/// An answer that ends before it is complete. The connection is cut, so that the client notices.
#[derive(Debug, thiserror::Error)]
#[error("the answer is cut short")]
pub(super) struct CutShort;

/// In which form something is downloaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    File,
    Tar,
    Nar,
}

impl Form {
    /// The form that is asked for, if there is one.
    pub(super) fn of(question: &Question) -> Result<Option<Self>, Problem> {
        match question.get("as") {
            None => Ok(None),
            Some("file") => Ok(Some(Self::File)),
            Some("tar") => Ok(Some(Self::Tar)),
            Some("nar") => Ok(Some(Self::Nar)),
            Some(_) => Err(Problem::wrong("as must be file, tar or nar")),
        }
    }

    fn suffix(self) -> &'static str {
        match self {
            Self::File => "",
            Self::Tar => ".tar",
            Self::Nar => ".nar",
        }
    }

    /// The form of a node in the name of a file.
    pub(super) fn page(self, store: Store, node: Node, name: &[u8], turn: Turn) -> Result<Page, Problem> {
        let bytes = match (self, &node) {
            (Self::File, Node::File { size, .. }) => Some(*size),
            (Self::File, _) => return Err(Problem::wrong("only a file can be downloaded as one; ask for tar or nar")),
            (Self::Tar, Node::Directory { size, .. }) | (Self::Nar, Node::Directory { size, .. })
                if *size > MAX_ARCHIVED =>
            {
                let message = format!(
                    "the directory has {size} entries, and this page makes archives of at most {MAX_ARCHIVED}; \
                     use `cofferdam export`"
                );
                return Err(Problem::wrong(message));
            }
            (Self::Tar, Node::File { .. } | Node::Symlink { .. }) => {
                return Err(Problem::wrong("only a directory can be downloaded as tar; ask for nar, or for the file"));
            }
            _ => None,
        };
        let name = [name, self.suffix().as_bytes()].concat();
        let contents = pieces(move |out| self.write(&store, &node, out), turn);
        Ok(answer::download(&name, bytes, contents))
    }

    fn write(self, store: &Store, node: &Node, out: &mut Pipe) -> Result<(), ExportError> {
        let (name, never) = (Path::new("the download"), || false);
        match (self, node) {
            (Self::File, Node::File { digest, size, .. }) => {
                archive::read_blob(store, digest, *size, name, &never, &mut |bytes| {
                    let failed = |source| ExportError::Write { path: name.to_owned(), action: "send it", source };
                    out.write_all(bytes).map_err(failed)
                })
            }
            (Self::Tar, _) => tar::write(store, node, name, out, &never),
            _ => nar::write(store, node, name, out, &never),
        }
    }
}

/// Where a thread writes what a client reads.
struct Pipe {
    pieces: mpsc::Sender<Result<Bytes, CutShort>>,
    runtime: Handle,
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = timeout(PIECE_TIMEOUT, self.pieces.send(Ok(Bytes::copy_from_slice(bytes))));
        match self.runtime.block_on(sent) {
            Ok(Ok(())) => Ok(bytes.len()),
            Ok(Err(_)) => Err(io::ErrorKind::BrokenPipe.into()),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a thread writes. The turn is over when it ends.
fn pieces(
    write: impl FnOnce(&mut Pipe) -> Result<(), ExportError> + Send + 'static,
    turn: Turn,
) -> impl Stream<Item = Result<Bytes, CutShort>> + Send + 'static {
    let (sender, pieces) = mpsc::channel(BUFFERED_PIECES);
    let mut pipe = Pipe { pieces: sender, runtime: Handle::current() };
    tokio::task::spawn_blocking(move || {
        let _turn = turn;
        if let Err(error) = write(&mut pipe) {
            tracing::debug!(error = &error as &dyn std::error::Error, "a download is cut short");
            let cut = timeout(PIECE_TIMEOUT, pipe.pieces.send(Err(CutShort)));
            drop(pipe.runtime.block_on(cut));
        }
    });
    received(pieces)
}

/// A channel's messages.
pub(super) fn received<T: Send + 'static>(messages: mpsc::Receiver<T>) -> impl Stream<Item = T> + Send + 'static {
    stream::unfold(messages, |mut messages| async { Some((messages.recv().await?, messages)) })
}
