//! The host's side of a device's connection: hands out this build's inputs, and nothing else.
//!
//! ```text
//!   request ──▶ one of the Tree's? ──yes──▶ directory: its bytes · blobs: read-only files, opened in the store
//!                     │ no                                                        │ the store fails
//!                     ▼                                                           ▼
//!      close: an honest device asks for nothing else         close: the build must not take it for its own failure
//! ```

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use cofferdam_castore::{B3Digest, Store};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::resolve::Tree;
use super::wire::{self, NoRequest, Request};

/// Why a device's connection was closed from this side.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The connection broke.
    #[error("the connection to the inputs' device failed")]
    Connection(#[source] io::Error),
    /// The device sent something else than a request: it has been taken over or is broken.
    #[error("the inputs' device broke the protocol")]
    Protocol(#[from] NoRequest),
    /// The device asked for what isn't in this build's inputs: it has been taken over or is broken.
    #[error("the inputs' device asked for the {kind} {digest}, which does not belong to this build's inputs")]
    Foreign {
        /// "directory" or "blob".
        kind: &'static str,
        /// What it asked for.
        digest: B3Digest,
    },
    /// The store failed to give out a blob that it had when the build began.
    #[error("the store can't open the blob {digest}")]
    Store {
        /// The blob.
        digest: B3Digest,
        /// What the store said.
        #[source]
        source: io::Error,
    },
    /// The server's thread panicked.
    #[error("the thread that serves the inputs panicked")]
    Panicked,
}

/// A thread that serves one device until either side closes the connection.
#[derive(Debug)]
pub struct Server {
    /// `None` once it has said how it ended.
    ended: Option<oneshot::Receiver<Result<(), ServeError>>>,
}

impl Server {
    /// Starts the thread. It uses `handle` to wait for stores that are not on this machine.
    ///
    /// # Errors
    ///
    /// The thread can't be started.
    pub fn start(socket: OwnedFd, tree: Arc<Tree>, store: Store, handle: Handle) -> io::Result<Self> {
        let (end, ended) = oneshot::channel();
        std::thread::Builder::new().name("inputs".into()).spawn(move || {
            let result = serve(&socket, &tree, &store, &handle);
            // Before anyone hears of the end, the device does.
            drop(socket);
            // Whoever started the server need not wait for it.
            let _ = end.send(result);
        })?;
        Ok(Self { ended: Some(ended) })
    }

    /// Waits for the end of the connection. Cancel safe; an error is returned once, and later calls return `Ok`.
    ///
    /// # Errors
    ///
    /// It was this side that had to end it, see [`ServeError`].
    pub async fn ended(&mut self) -> Result<(), ServeError> {
        let Some(ended) = &mut self.ended else { return Ok(()) };
        let result = ended.await.unwrap_or(Err(ServeError::Panicked));
        self.ended = None;
        result
    }
}

fn serve(socket: impl AsFd, tree: &Tree, store: &Store, handle: &Handle) -> Result<(), ServeError> {
    while let Some(request) = unless_gone(wire::receive_request(&socket))?.flatten() {
        let sent = match request? {
            Request::Root => wire::send_directory(&socket, &tree.root().encode()),
            Request::Directory(digest) => match tree.directory(&digest) {
                Some(directory) => wire::send_directory(&socket, &directory.encode()),
                None => return Err(ServeError::Foreign { kind: "directory", digest }),
            },
            Request::Blobs(digests) => {
                if let Some(digest) = digests.iter().find(|digest| !tree.has_blob(digest)) {
                    return Err(ServeError::Foreign { kind: "blob", digest: *digest });
                }
                let files = digests.iter().map(|digest| open(digest, store, handle)).collect::<Result<Vec<_>, _>>()?;
                wire::send_blobs(&socket, &files)
            }
        };
        if unless_gone(sent)?.is_none() {
            break;
        }
    }
    Ok(())
}

fn open(digest: &B3Digest, store: &Store, handle: &Handle) -> Result<std::fs::File, ServeError> {
    let failed = |source| ServeError::Store { digest: *digest, source };
    let file = handle.block_on(store.blobs.open_file(digest)).map_err(failed)?;
    file.ok_or_else(|| failed(io::Error::new(io::ErrorKind::NotFound, "it was there when the build began")))
}

/// `None` when the device has gone, perhaps with an answer unread: that is an end like any other.
fn unless_gone<T>(result: io::Result<T>) -> Result<Option<T>, ServeError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe) => Ok(None),
        Err(error) => Err(ServeError::Connection(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::os::fd::AsRawFd as _;

    use cofferdam_castore::Node;
    use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, recv, send, sendmsg};

    use super::super::resolve::resolve;
    use super::super::testing::{directory, file, inputs, serve, serve_tree};
    use super::super::wire::MAX_BLOBS;
    use super::*;

    /// What a process that holds the device's end can do: any packets at all. Returns how the server took them.
    async fn played(packets: &[&[u8]]) -> Result<(), ServeError> {
        let store = Store::memory();
        let f = file(&store, b"f").await;
        let tree = resolve(&store, &inputs(&[("f", f)])).await.unwrap();
        let (device, mut server) = serve_tree(&store, tree);
        for packet in packets {
            // The server may have closed already.
            let _ = send(device.as_raw_fd(), packet, MsgFlags::MSG_NOSIGNAL);
        }
        if packets.last().is_some_and(|last| last.is_empty()) {
            drop(device);
            return server.ended().await;
        }
        let ended = server.ended().await;
        assert_eq!(recv(device.as_raw_fd(), &mut [0], MsgFlags::empty()), Ok(0), "the connection must be closed");
        ended
    }

    #[tokio::test]
    async fn a_device_gets_what_belongs_to_its_build() {
        let store = Store::memory();
        let f = file(&store, b"contents").await;
        let dir = directory(&store, &[("f", f.clone())]).await;
        let (host, mut server) = serve(&store, &[("dir", dir.clone())]).await;
        let (Node::Directory { digest, .. }, Node::File { digest: blob, .. }) = (&dir, &f) else { unreachable!() };
        assert_eq!(host.root().unwrap().get(b"dir"), Some(&dir));
        assert_eq!(host.directory(digest).unwrap().get(b"f"), Some(&f));
        let [file] = host.blobs(vec![*blob]).unwrap().try_into().unwrap();
        assert_eq!(io::read_to_string(&file).unwrap(), "contents");
        assert!(io::Write::write(&mut &file, b"x").is_err(), "the descriptor must be read-only");
        drop(host);
        server.ended().await.unwrap();
    }

    #[tokio::test]
    async fn a_directory_of_many_packets_arrives_whole() {
        let store = Store::memory();
        let f = file(&store, b"").await;
        let names: Vec<String> = (0..5_000).map(|index| format!("{index:0200}")).collect();
        let entries: Vec<_> = names.iter().map(|name| (name.as_str(), f.clone())).collect();
        let (host, _) = serve(&store, &entries).await;
        assert_eq!(host.root().unwrap().len(), 5_000);
    }

    #[tokio::test]
    async fn what_the_store_has_beside_the_build_is_out_of_reach() {
        let store = Store::memory();
        let secret = file(&store, b"secret").await;
        let secrets = directory(&store, &[("secret", secret.clone())]).await;
        let (Node::Directory { digest, .. }, Node::File { digest: blob, .. }) = (secrets, secret) else {
            unreachable!()
        };
        let own = file(&store, b"own").await;
        let Node::File { digest: own_blob, .. } = own else { unreachable!() };

        let (host, mut server) = serve(&store, &[("own", own.clone())]).await;
        host.directory(&digest).unwrap_err();
        assert!(matches!(server.ended().await, Err(ServeError::Foreign { kind: "directory", .. })));
        host.root().unwrap_err();

        let (host, mut server) = serve(&store, &[("own", own)]).await;
        host.blobs(vec![own_blob, blob]).unwrap_err();
        assert!(matches!(server.ended().await, Err(ServeError::Foreign { kind: "blob", .. })));
    }

    #[tokio::test]
    async fn packets_that_are_no_requests_end_the_connection() {
        let huge = vec![2; 1 + 32 * MAX_BLOBS + 1];
        for packet in [&b"GET / HTTP/1.1"[..], &[0, 0], &[1; 32], &[2; 34], &[3], &[255; 33], &huge] {
            assert!(matches!(played(&[packet]).await, Err(ServeError::Protocol(_))), "{packet:?}");
        }
    }

    #[tokio::test]
    async fn a_device_that_goes_without_reading_its_answers_is_an_ordinary_end() {
        played(&[&[0], &[0], &[0], &[]]).await.unwrap();
        played(&[&[]]).await.unwrap();
    }

    #[tokio::test]
    async fn descriptors_that_a_device_sends_are_not_kept() {
        let store = Store::memory();
        let tree = resolve(&store, &inputs(&[])).await.unwrap();
        let (device, mut server) = serve_tree(&store, tree);
        let (kept, sent) = super::super::testing::connection();
        let rights = [sent.as_raw_fd()];
        let parts = [IoSlice::new(&[9])];
        let control = [ControlMessage::ScmRights(&rights)];
        sendmsg::<UnixAddr>(device.as_raw_fd(), &parts, &control, MsgFlags::empty(), None).unwrap();
        drop(sent);
        server.ended().await.unwrap_err();
        // With every copy of the other end closed, this one reads the end.
        assert_eq!(recv(kept.as_raw_fd(), &mut [0], MsgFlags::empty()), Ok(0));
    }

    #[tokio::test]
    async fn a_blob_that_the_store_has_lost_is_the_stores_failure() {
        let store = Store::memory();
        let f = file(&store, b"f").await;
        let Node::File { digest, .. } = f else { unreachable!() };
        let tree = resolve(&store, &inputs(&[("f", f)])).await.unwrap();
        let (device, mut server) = serve_tree(&Store::memory(), tree);
        wire::Host::new(device).blobs(vec![digest]).unwrap_err();
        assert!(matches!(server.ended().await, Err(ServeError::Store { digest: lost, .. }) if lost == digest));
        server.ended().await.unwrap();
    }
}
