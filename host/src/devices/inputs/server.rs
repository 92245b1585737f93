//! The host's side of a device's connection: hands out this build's inputs, and nothing else.
//!
//! ```text
//!   request ──▶ one of the Tree's? ──yes──▶ directory: its bytes · blobs: read-only files, opened in the store
//!                     │ no                                                        │ the store fails
//!                     ▼                                                           ▼
//!      close: an honest device asks for nothing else         close: the build must not take it for its own failure
//! ```

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::sync::Arc;

use cofferdam_castore::{B3Digest, Store};
use nix::sys::socket::{Shutdown, shutdown};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

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

/// The inputs that a server still lacks. Dropping it ends the server at its next request.
#[derive(Debug)]
pub struct Unbound(watch::Sender<Option<Arc<Tree>>>);

impl Unbound {
    /// Fills in the inputs, which answers the requests that wait for them.
    pub fn bind(self, tree: Arc<Tree>) {
        self.0.send_replace(Some(tree));
    }
}

/// Threads that serve one device, each on a connection of its own, until either side closes them.
#[derive(Debug)]
pub struct Server {
    /// Connections that have not said how they ended.
    open: usize,
    ended: mpsc::Receiver<Result<(), ServeError>>,
}

impl Server {
    /// Starts the threads, one for each connection. They use `handle` to wait for stores that are not on this machine,
    /// which keep what they have fetched as long as the threads live.
    ///
    /// # Errors
    ///
    /// A thread can't be started.
    pub fn start(sockets: Vec<OwnedFd>, store: &Store, handle: &Handle) -> io::Result<(Self, Unbound)> {
        let open = sockets.len();
        let (end, ended) = mpsc::channel(open.max(1));
        let sockets: Arc<[OwnedFd]> = sockets.into();
        let store = store.batch();
        let (unbound, tree) = watch::channel(None);
        for at in 0..open {
            let hang_up = HangUp(sockets.clone());
            let (tree, store, handle, end) = (tree.clone(), store.clone(), handle.clone(), end.clone());
            std::thread::Builder::new().name("inputs".into()).spawn(move || {
                let result = serve(&hang_up.0[at], tree, &store, &handle);
                // Before anyone hears of the end, the device does.
                drop(hang_up);
                // The server may have been dropped.
                let _ = end.try_send(result);
            })?;
        }
        Ok((Self { open, ended }, Unbound(unbound)))
    }

    /// Waits for the end of the connections. Cancel safe; an error is returned once, and later calls return `Ok`.
    ///
    /// # Errors
    ///
    /// It was this side that had to end it, see [`ServeError`].
    pub async fn ended(&mut self) -> Result<(), ServeError> {
        while self.open > 0 {
            let Some(ended) = self.ended.recv().await else {
                self.open = 0;
                return Err(ServeError::Panicked);
            };
            self.open -= 1;
            if ended.is_err() {
                self.open = 0;
                return ended;
            }
        }
        Ok(())
    }
}

/// Closes every connection when one has ended: the device has gone, or has to go.
struct HangUp(Arc<[OwnedFd]>);

impl Drop for HangUp {
    fn drop(&mut self) {
        for socket in &*self.0 {
            // It may be closed already.
            let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
        }
    }
}

fn serve(
    socket: impl AsFd,
    mut bound: watch::Receiver<Option<Arc<Tree>>>,
    store: &Store,
    handle: &Handle,
) -> Result<(), ServeError> {
    while let Some(request) = unless_gone(wire::receive_request(&socket))?.flatten() {
        let request = request?;
        let Some(tree) = handle.block_on(tree(&mut bound)) else { break };
        let sent = match request {
            Request::Root => wire::send_whole(&socket, tree.root()),
            Request::Appearance => wire::send_whole(&socket, &tree.appearance()),
            Request::Directory(digest) => match tree.directory(&digest) {
                Some(directory) => wire::send_whole(&socket, directory),
                None => return Err(ServeError::Foreign { kind: "directory", digest }),
            },
            Request::Blobs(digests) => {
                if let Some(digest) = digests.iter().find(|digest| !tree.has_blob(digest)) {
                    return Err(ServeError::Foreign { kind: "blob", digest: *digest });
                }
                wire::send_blobs(&socket, &open_all(&digests, store, handle)?)
            }
        };
        if unless_gone(sent)?.is_none() {
            break;
        }
    }
    Ok(())
}

/// The inputs, once they are bound; nothing if they never will be.
async fn tree(bound: &mut watch::Receiver<Option<Arc<Tree>>>) -> Option<Arc<Tree>> {
    bound.wait_for(Option::is_some).await.ok()?.clone()
}

/// The file of the first blob, which may take long, and the files of those others that are ready by then.
fn open_all(digests: &[B3Digest], store: &Store, handle: &Handle) -> Result<Vec<Option<File>>, ServeError> {
    let failed = |digest: &B3Digest| {
        let digest = *digest;
        move |source| ServeError::Store { digest, source }
    };
    handle.block_on(async {
        let Some((wanted, guesses)) = digests.split_first() else { return Ok(Vec::new()) };
        let found = store.blobs.open_file(wanted).await.map_err(failed(wanted))?;
        let lost = || failed(wanted)(io::Error::new(io::ErrorKind::NotFound, "it was there when the build began"));
        let mut files = vec![Some(found.ok_or_else(lost)?)];
        for guess in guesses {
            files.push(store.blobs.open_file_if_ready(guess).await.map_err(failed(guess))?);
        }
        Ok(files)
    })
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

    use async_trait::async_trait;
    use cofferdam_castore::{
        Node,
        blobservice::{BlobReader, BlobService, BlobWriter},
    };
    use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, recv, send, sendmsg};

    use tokio::sync::Notify;

    use super::super::testing::{connection, directory, file, inputs, resolve_all, serve, serve_tree};
    use super::super::wire::MAX_BLOBS;
    use super::*;

    /// What a process that holds the device's end can do: any packets at all. Returns how the server took them.
    async fn played(packets: &[&[u8]]) -> Result<(), ServeError> {
        let store = Store::memory();
        let f = file(&store, b"f").await;
        let tree = resolve_all(&store, &inputs(&[("f", f)])).await.unwrap();
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
        let [(_, file)] = host.blobs(vec![*blob]).unwrap().try_into().unwrap();
        assert_eq!(io::read_to_string(&file).unwrap(), "contents");
        assert!(io::Write::write(&mut &file, b"x").is_err(), "the descriptor must be read-only");
        drop(host);
        server.ended().await.unwrap();
    }

    /// A store that has nothing at hand, and gives out each blob when it is told to.
    #[derive(Clone)]
    struct Slow {
        blobs: Arc<dyn BlobService>,
        held_up: B3Digest,
        asked: Arc<Notify>,
        go_on: Arc<Notify>,
    }

    #[async_trait]
    impl BlobService for Slow {
        async fn has(&self, digest: &B3Digest) -> io::Result<bool> {
            self.blobs.has(digest).await
        }
        async fn open_read(&self, digest: &B3Digest) -> io::Result<Option<Box<dyn BlobReader>>> {
            if *digest == self.held_up {
                self.asked.notify_one();
                self.go_on.notified().await;
            }
            self.blobs.open_read(digest).await
        }
        async fn open_write(&self) -> Box<dyn BlobWriter> {
            self.blobs.open_write().await
        }
        fn batch(&self) -> Arc<dyn BlobService> {
            Arc::new(self.clone())
        }
        async fn commit(&self) -> io::Result<()> {
            self.blobs.commit().await
        }
        fn is_remote(&self) -> bool {
            true
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_blob_that_takes_long_holds_up_nobody_but_its_readers() {
        let store = Store::memory();
        let (slow, fast) = (file(&store, b"slow").await, file(&store, b"fast").await);
        let dir = directory(&store, &[("slow", slow.clone()), ("fast", fast.clone())]).await;
        let tree = Arc::new(resolve_all(&store, &inputs(&[("dir", dir.clone())])).await.unwrap());
        let (Node::File { digest: slow, .. }, Node::File { digest: fast, .. }) = (slow, fast) else { unreachable!() };
        let Node::Directory { digest: dir, .. } = dir else { unreachable!() };
        let held_up = Slow { blobs: store.blobs.clone(), held_up: slow, asked: Arc::default(), go_on: Arc::default() };
        let (asked, go_on) = (held_up.asked.clone(), held_up.go_on.clone());
        let store = Store { blobs: Arc::new(held_up), ..store };
        let ((one, device_one), (other, device_other)) = (connection(), connection());
        let (mut server, unbound) = Server::start(vec![one, other], &store, &Handle::current()).unwrap();
        unbound.bind(tree);
        let host = Arc::new(wire::Host::new(vec![device_one, device_other]));

        let reader = host.clone();
        let reader = tokio::task::spawn_blocking(move || reader.blobs(vec![slow, fast]).unwrap());
        asked.notified().await;
        assert_eq!(host.directory(&dir).unwrap().len(), 2);
        // A blob that isn't ready is left out of the answer, and doesn't delay it.
        let [(found, file)] = host.blobs(vec![fast, slow]).unwrap().try_into().unwrap();
        assert_eq!((found, io::read_to_string(file).unwrap().as_str()), (fast, "fast"));
        go_on.notify_one();
        let [(found, file)] = reader.await.unwrap().try_into().unwrap();
        assert_eq!((found, io::read_to_string(file).unwrap().as_str()), (slow, "slow"));
        drop(host);
        server.ended().await.unwrap();
    }

    #[tokio::test]
    async fn requests_wait_until_the_inputs_are_bound() {
        let store = Store::memory();
        let f = file(&store, b"f").await;
        let tree = resolve_all(&store, &inputs(&[("f", f.clone())])).await.unwrap();
        let (ours, theirs) = connection();
        let (mut server, unbound) = Server::start(vec![ours], &store, &Handle::current()).unwrap();
        let host = wire::Host::new(vec![theirs]);
        let root = tokio::task::spawn_blocking(move || host.root());
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        assert!(!root.is_finished());
        unbound.bind(Arc::new(tree));
        assert_eq!(root.await.unwrap().unwrap().get(b"f"), Some(&f));
        server.ended().await.unwrap();
    }

    #[tokio::test]
    async fn a_server_that_never_gets_inputs_ends_with_its_first_request() {
        let (ours, theirs) = connection();
        let (mut server, unbound) = Server::start(vec![ours], &Store::memory(), &Handle::current()).unwrap();
        drop(unbound);
        let host = wire::Host::new(vec![theirs]);
        tokio::task::spawn_blocking(move || host.root().unwrap_err()).await.unwrap();
        server.ended().await.unwrap();
    }

    #[tokio::test]
    async fn one_connection_that_breaks_the_protocol_ends_all() {
        let store = Store::memory();
        let tree = Arc::new(resolve_all(&store, &inputs(&[])).await.unwrap());
        let ((one, device_one), (other, device_other)) = (connection(), connection());
        let (mut server, unbound) = Server::start(vec![one, other], &store, &Handle::current()).unwrap();
        unbound.bind(tree);
        send(device_one.as_raw_fd(), b"garbage", MsgFlags::empty()).unwrap();
        assert!(matches!(server.ended().await, Err(ServeError::Protocol(_))));
        assert_eq!(recv(device_other.as_raw_fd(), &mut [0], MsgFlags::empty()), Ok(0));
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
        for packet in [&b"GET / HTTP/1.1"[..], &[0, 0], &[1; 32], &[2; 34], &[3, 0], &[4], &[255; 33], &huge] {
            assert!(matches!(played(&[packet]).await, Err(ServeError::Protocol(_))), "{packet:?}");
        }
    }

    #[tokio::test]
    async fn a_device_may_end_with_unread_answers() {
        played(&[&[0], &[0], &[0], &[]]).await.unwrap();
        played(&[&[]]).await.unwrap();
    }

    #[tokio::test]
    async fn descriptors_that_a_device_sends_are_not_kept() {
        let store = Store::memory();
        let tree = resolve_all(&store, &inputs(&[])).await.unwrap();
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
        let tree = resolve_all(&store, &inputs(&[("f", f)])).await.unwrap();
        let (device, mut server) = serve_tree(&Store::memory(), tree);
        wire::Host::new(vec![device]).blobs(vec![digest]).unwrap_err();
        assert!(matches!(server.ended().await, Err(ServeError::Store { digest: lost, .. }) if lost == digest));
        server.ended().await.unwrap();
    }
}
