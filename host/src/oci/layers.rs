//! Layers on their way to the store: one thread reads, hashes and decompresses, another one imports.

use std::{
    io::{self, Read},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
};

use cofferdam_castore::{
    Node, Store,
    archive::{ArchiveError, Limits, decompress},
    import::Lost,
    tar::Layers,
};

use super::{Digest, OciError, digest::Hashed};

/// Bytes that go from one thread to the other at a time.
const PIECE_BYTES: usize = 256 * 1024;

/// Pieces that are on their way at a time.
const PIECES: usize = 4;

/// What a layer's digest is of.
#[derive(Debug, Clone, Copy)]
pub(super) enum DigestOf {
    /// The blob, of at most so many bytes.
    Packed(u64),
    /// The archive in it.
    Plain,
}

/// The layers that are imported.
pub(super) struct Stack {
    layers: Layers,
    limits: Limits,
    /// The number of the current one, from 1.
    number: usize,
    of: usize,
}

/// Why a layer was not read to its end.
enum Unread {
    Unopened(OciError),
    Unpacked(ArchiveError),
    Broken(io::Error),
    /// The other thread has had enough.
    Stopped,
}

type Piece = io::Result<Vec<u8>>;

impl Stack {
    pub(super) fn new(store: &Store, limits: Limits, of: usize) -> Self {
        Self { layers: Layers::new(store, limits), limits, number: 1, of }
    }

    /// Imports the next layer, which `open` opens on another thread. Where it has another digest than `expected`, that is the
    /// reason for whatever else is wrong with it.
    pub(super) fn add<'a>(
        &mut self,
        expected: Digest,
        of: DigestOf,
        open: impl FnOnce() -> Result<Box<dyn Read + 'a>, OciError> + Send,
    ) -> Result<(), OciError> {
        let (sender, pieces) = sync_channel(PIECES);
        let (stop, limit) = (AtomicBool::new(false), self.limits.bytes);
        let (applied, found) = thread::scope(|scope| {
            let reading = scope.spawn(|| read(open, of, limit, sender, &stop));
            let applied = self.layers.apply(Pieces { pieces, piece: io::Cursor::default() });
            // The limits are there to stop reading.
            let is_enough = matches!(applied, Err(ArchiveError::Limit { .. } | ArchiveError::Store { .. }));
            stop.store(is_enough, Ordering::Relaxed);
            (applied, reading.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        let (number, of) = (self.number, self.of);
        let at = format!("layer {number} of {of}");
        let failed = |source| OciError::Layer { number, of, source };
        match (found, applied) {
            (Err(Unread::Unopened(error)), _) => return Err(error),
            (Err(Unread::Unpacked(error)), _) => return Err(failed(error)),
            (Err(Unread::Broken(source)), _) => return Err(OciError::Read { at, source }),
            (Ok(found), _) if found != expected => return Err(OciError::Digest { at, expected, found }),
            (_, Err(error)) => return Err(failed(error)),
            (Err(Unread::Stopped), Ok(())) => unreachable!("only a failure stops it"),
            (Ok(_), Ok(())) => {}
        }
        self.number += 1;
        Ok(())
    }

    /// Makes the root visible.
    pub(super) fn finish(self) -> Result<(Node, Lost), OciError> {
        let (number, of) = (self.of, self.of);
        self.layers.finish().map_err(|source| OciError::Layer { number, of, source })
    }
}

/// Sends the archive of a layer piece by piece. Returns its digest, for which all of it is read.
fn read<'a>(
    open: impl FnOnce() -> Result<Box<dyn Read + 'a>, OciError>,
    of: DigestOf,
    limit: u64,
    sender: SyncSender<Piece>,
    stop: &AtomicBool,
) -> Result<Digest, Unread> {
    let blob = open().map_err(Unread::Unopened)?;
    let is_to_stop = || stop.load(Ordering::Relaxed);
    let digest = match of {
        DigestOf::Packed(size) => {
            // One byte more than there may be shows in the digest.
            let mut packed = Hashed::new(blob.take(size.saturating_add(1)));
            let mut plain = decompress(&mut packed).map_err(Unread::Unpacked)?;
            send(&mut plain, sender);
            drop(plain);
            packed.digest(is_to_stop).map_err(Unread::Broken)
        }
        DigestOf::Plain => {
            let mut plain = Hashed::new(decompress(blob).map_err(Unread::Unpacked)?.take(limit));
            send(&mut plain, sender);
            let damaged = |source| ArchiveError::Read { at: "the archive".to_owned(), source };
            plain.digest(is_to_stop).map_err(|error| Unread::Unpacked(damaged(error)))
        }
    }?;
    digest.ok_or(Unread::Stopped)
}

/// Sends what can be read, up to an error or until nobody receives it.
#[expect(clippy::needless_pass_by_value, reason = "its end tells the receiver that there is no more")]
fn send(plain: &mut dyn Read, sender: SyncSender<Piece>) {
    loop {
        let mut piece = Vec::with_capacity(PIECE_BYTES);
        let read = plain.take(PIECE_BYTES as u64).read_to_end(&mut piece);
        let (is_last, error) = match read {
            Ok(read) => (read < PIECE_BYTES, None),
            Err(error) => (true, Some(error)),
        };
        if sender.send(Ok(piece)).is_err() || error.is_some_and(|error| sender.send(Err(error)).is_err()) || is_last {
            return;
        }
    }
}

/// The other end.
struct Pieces {
    pieces: Receiver<Piece>,
    piece: io::Cursor<Vec<u8>>,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.piece.read(buffer)? {
                0 if !buffer.is_empty() => match self.pieces.recv() {
                    Ok(piece) => self.piece = io::Cursor::new(piece?),
                    Err(_) => return Ok(0),
                },
                read => return Ok(read),
            }
        }
    }
}
