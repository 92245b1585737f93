//! What this module's tests share: trees in a memory store, and a device's connection to a real server.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use cofferdam_castore::directoryservice::DirectoryMemory;
use cofferdam_castore::{Directory, Node, PathComponent, Store, SymlinkTarget};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use tokio::io::AsyncWriteExt as _;
use tokio::runtime::Handle;

use super::resolve::{NIX_TIME, ResolveError, Tree, resolve};
use super::server::Server;
use super::wire::Host;

pub(super) type Inputs = BTreeMap<PathComponent, Node>;

pub(super) fn name(name: &str) -> PathComponent {
    PathComponent::try_from(name).unwrap()
}

pub(super) fn symlink(target: &str) -> Node {
    Node::Symlink { target: SymlinkTarget::try_from(target).unwrap() }
}

pub(super) async fn file(store: &Store, contents: &[u8]) -> Node {
    let mut blob = store.blobs.open_write().await;
    blob.write_all(contents).await.unwrap();
    let digest = blob.close().await.unwrap();
    Node::File { digest, size: contents.len() as u64, executable: false }
}

pub(super) fn executable(node: Node) -> Node {
    match node {
        Node::File { digest, size, .. } => Node::File { digest, size, executable: true },
        other => other,
    }
}

pub(super) fn unstored_directory(entries: &[(&str, Node)]) -> Directory {
    Directory::try_from_iter(entries.iter().map(|(at, node)| (name(at), node.clone()))).unwrap()
}

pub(super) async fn directory(store: &Store, entries: &[(&str, Node)]) -> Node {
    let directory = unstored_directory(entries);
    let node = directory.to_node();
    store.directories.put(directory).await.unwrap();
    node
}

pub(super) fn inputs(entries: &[(&str, Node)]) -> Inputs {
    entries.iter().map(|(at, node)| (name(at), node.clone())).collect()
}

pub(super) fn connection() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

/// Resolves inputs in any amount of memory.
pub(super) async fn resolve_all(store: &Store, inputs: &Inputs) -> Result<Tree, ResolveError> {
    resolve(store, inputs, DirectoryMemory::unlimited()).await
}

/// A server of these inputs, and the device's end of its connection.
pub(super) async fn serve(store: &Store, entries: &[(&str, Node)]) -> (Arc<Host>, Server) {
    serve_writable(store, entries, &[]).await
}

/// The same, of which the build has writable copies at some paths.
pub(super) async fn serve_writable(store: &Store, entries: &[(&str, Node)], writable: &[&str]) -> (Arc<Host>, Server) {
    let tree =
        resolve_all(store, &inputs(entries)).await.unwrap().with_writable(writable.iter().copied()).with_time(NIX_TIME);
    let (host, server) = serve_tree(store, tree);
    (Arc::new(Host::new(vec![host])), server)
}

pub(super) fn serve_tree(store: &Store, tree: Tree) -> (OwnedFd, Server) {
    let (ours, theirs) = connection();
    let (server, unbound) = Server::start(vec![ours], store, &Handle::current()).unwrap();
    unbound.bind(Arc::new(tree));
    (theirs, server)
}
