//! Servers for tests, on a runtime of their own: they serve until the tests end.

use std::sync::LazyLock;

use cofferdam_rpc::{Listener, serve_routes};
use tempfile::TempDir;
use tokio::{
    net::{TcpListener, UnixListener},
    runtime::Runtime,
};
use tokio_util::sync::CancellationToken;
use tonic::service::RoutesBuilder;

use super::{
    Package, Peer, PeerOptions, ServeOptions,
    server::{TvixBlobs, TvixDirectories, services},
};
use crate::{Store, Views};

pub(crate) static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().unwrap());

pub(crate) fn peer(addr: &str) -> Peer {
    Peer::from_addr(addr, &PeerOptions::default()).unwrap()
}

/// A peer that serves under these names only, and the directory of its socket.
pub(crate) fn serve_on_socket(store: &Store, packages: &[Package]) -> (Peer, TempDir) {
    let (blobs, directories) =
        services(&Views::whole(store.clone()), &ServeOptions::default(), CancellationToken::new());
    let mut routes = RoutesBuilder::default();
    for package in packages {
        match package {
            Package::Snix => routes.add_service(blobs.clone()).add_service(directories.clone()),
            Package::Tvix => {
                routes.add_service(TvixBlobs(blobs.clone())).add_service(TvixDirectories(directories.clone()))
            }
        };
    }
    let (addr, dir) = serve_routes_on_socket(routes);
    (peer(&addr), dir)
}

/// The address of these services.
pub(crate) fn serve_routes_on_socket(routes: RoutesBuilder) -> (String, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let _inside = RUNTIME.enter();
    let listener = Listener::Unix(UnixListener::bind(&path).unwrap());
    spawn_routes(routes, listener);
    (format!("grpc+unix://{}", path.display()), dir)
}

/// The address of a store that is served like this.
pub(crate) fn serve_with(store: &Store, options: &ServeOptions) -> (String, TempDir) {
    let mut routes = RoutesBuilder::default();
    super::add_services(&mut routes, &Views::whole(store.clone()), options, CancellationToken::new());
    serve_routes_on_socket(routes)
}

/// A peer on a port of its own.
pub(crate) fn serve_on_tcp(store: &Store) -> Peer {
    let _inside = RUNTIME.enter();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let listener = TcpListener::from_std(listener).unwrap();
    let addr = format!("grpc+http://{}", listener.local_addr().unwrap());
    let store = store.clone();
    RUNTIME.spawn(async move {
        let never = CancellationToken::new();
        super::serve(&store, vec![Listener::Tcp(listener)], &ServeOptions::default(), never).await.unwrap();
    });
    peer(&addr)
}

pub(crate) fn spawn_routes(routes: RoutesBuilder, listener: Listener) {
    spawn_routes_on(routes, vec![listener]);
}

pub(crate) fn spawn_routes_on(routes: RoutesBuilder, listeners: Vec<Listener>) {
    RUNTIME.spawn(async move {
        let (shutdown, stop) = (CancellationToken::new(), CancellationToken::new());
        serve_routes(routes, &[], &[], listeners, &cofferdam_rpc::ServeOptions::default(), shutdown, stop)
            .await
            .unwrap();
    });
}
