//! The two directions of a stream, for a thread that may block.

use std::{
    io::{self, Read, Write},
    sync::Arc,
};

use bytes::{Buf as _, Bytes};
use cofferdam_proto::cofferdam::v1::NixBytes;
use tokio::{runtime::Handle, sync::mpsc};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::Streaming;

use crate::frontend::outlet::Outlet;

/// Pieces of a client's stream that wait to be read.
const BUFFERED_PIECES: usize = 4;

/// What the client sends.
pub(super) struct Inbox {
    pieces: mpsc::Receiver<Bytes>,
    piece: Bytes,
    _forward: AbortOnDropHandle<()>,
}

impl Inbox {
    /// `gone` is cancelled when the client has ended its stream: then it waits for no build.
    pub(super) fn new(mut stream: Streaming<NixBytes>, handle: &Handle, gone: CancellationToken) -> Self {
        let (sender, pieces) = mpsc::channel(BUFFERED_PIECES);
        let forward = handle.spawn(async move {
            while let Ok(Some(NixBytes { data, .. })) = stream.message().await {
                if sender.send(data).await.is_err() {
                    return;
                }
            }
            gone.cancel();
        });
        Self { pieces, piece: Bytes::new(), _forward: AbortOnDropHandle::new(forward) }
    }
}

impl Read for Inbox {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !buffer.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.piece = piece,
                None => return Ok(0),
            }
        }
        let most = buffer.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut buffer[..most]);
        Ok(most)
    }
}

/// What the client gets.
pub(super) struct Outbox {
    outlet: Arc<Outlet<NixBytes>>,
    handle: Handle,
    wrap: fn(Bytes) -> NixBytes,
    /// Ends with the last of them.
    watch: Arc<AbortOnDropHandle<()>>,
}

impl Outbox {
    /// `gone` is cancelled when the client has gone.
    pub(super) fn new(outlet: Outlet<NixBytes>, handle: Handle, gone: CancellationToken) -> Self {
        let outlet = Arc::new(outlet);
        let watched = Arc::clone(&outlet);
        let watch = handle.spawn(async move {
            watched.closed().await;
            gone.cancel();
        });
        let wrap = |data| NixBytes { data, log: Bytes::new() };
        Self { outlet, handle, wrap, watch: Arc::new(AbortOnDropHandle::new(watch)) }
    }

    /// Where the log goes.
    pub(super) fn log(&self) -> Self {
        let wrap = |log| NixBytes { data: Bytes::new(), log };
        Self { outlet: Arc::clone(&self.outlet), handle: self.handle.clone(), wrap, watch: Arc::clone(&self.watch) }
    }
}

impl Write for Outbox {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let message = (self.wrap)(Bytes::copy_from_slice(bytes));
        let said = self.handle.block_on(self.outlet.say(message));
        said.map(|()| bytes.len()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
