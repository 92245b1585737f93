//! An archive as the body of an answer.

use std::{
    io::{self, BufWriter, Write},
    path::Path,
};

use bytes::Bytes;
use cofferdam_castore::{Node, Store, blobservice::Lease, export::ExportError, nar};
use cofferdam_nix::StorePath;
use cofferdam_rpc::{HttpBody, Turn};
use futures::stream;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use tokio::{sync::mpsc, task::spawn_blocking};
use zstd::{DEFAULT_COMPRESSION_LEVEL, Encoder};

use super::route::Compression;

/// Bytes of a piece on its way to the client.
const PIECE_BYTES: usize = 64 * 1024;

/// Pieces that wait for a client to take them.
const WAITING_PIECES: usize = 4;

/// Streams the archive of a node from a thread, which ends when the client is gone. The thread keeps the turn, and the lease
/// that keeps the node in the store.
pub(super) fn body(
    store: Store,
    path: StorePath,
    node: Node,
    compression: Compression,
    (turn, lease): (Turn, Lease),
) -> HttpBody {
    let (sender, receiver) = mpsc::channel(WAITING_PIECES);
    spawn_blocking(move || {
        let _kept = (turn, lease);
        if let Err(error) = write(&store, &path, &node, compression, Pieces(sender.clone())) {
            tracing::debug!(%path, error = &error as &dyn std::error::Error, "can't send an archive to its end");
            // Whoever has gone needs no error.
            let _ = sender.blocking_send(Err(io::Error::other(error)));
        }
    });
    let pieces = stream::unfold(receiver, |mut receiver: mpsc::Receiver<io::Result<Bytes>>| async {
        let piece = receiver.recv().await?;
        Some((piece.map(Frame::data), receiver))
    });
    StreamBody::new(pieces).boxed_unsync()
}

fn write(
    store: &Store,
    path: &StorePath,
    node: &Node,
    compression: Compression,
    pieces: Pieces,
) -> Result<(), ExportError> {
    let name = Path::new(path.base_name());
    let failed = |source| ExportError::Write { path: name.to_owned(), action: "send it", source };
    let mut pieces = BufWriter::with_capacity(PIECE_BYTES, pieces);
    match compression {
        Compression::None => nar::write(store, node, name, &mut pieces, &|| false)?,
        Compression::Zstd => {
            let mut encoder = Encoder::new(&mut pieces, DEFAULT_COMPRESSION_LEVEL).map_err(failed)?;
            nar::write(store, node, name, &mut encoder, &|| false)?;
            encoder.finish().map_err(failed)?;
        }
    }
    pieces.flush().map_err(failed)
}

struct Pieces(mpsc::Sender<io::Result<Bytes>>);

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.0.blocking_send(Ok(Bytes::copy_from_slice(bytes)));
        sent.map(|()| bytes.len()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
