//! Ways to reach a peer, what it says of itself, and its end.

use std::{sync::Arc, time::Duration};

use cofferdam_rpc::{Identity, Listener, ServeError, Tls};
use futures::{StreamExt as _, stream};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use super::{
    super::{GrpcBlobService, Package, Peer, PeerOptions, SERVICES, ServeOptions, serve, testing::serve_on_socket},
    chunk, put,
};
use crate::{
    B3Digest, BlobService as _, Store,
    export::export,
    grpc::GrpcDirectoryService,
    import::import_path,
    proto::blob_service_client::BlobServiceClient,
    testing::{Tree, name},
};

#[tokio::test]
async fn tls_needs_a_certificate_that_is_trusted() {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let identity = Identity::from_pem(cert.pem(), signing_key.serialize_pem());
    let listeners = vec![Listener::Tls(listener, Tls { identity, client_ca: None })];
    let server = tokio::spawn(async move {
        serve(&Store::memory(), listeners, &ServeOptions::default(), CancellationToken::new()).await
    });

    let addr = format!("grpc+https://localhost:{port}");
    let trusting = PeerOptions { authority: Some(cert.pem().into()), ..PeerOptions::default() };
    let blobs = GrpcBlobService::new(Peer::from_addr(&addr, &trusting).unwrap());
    let digest = put(&blobs, b"sealed").await.unwrap();
    assert!(blobs.has(&digest).await.unwrap());

    let stranger = GrpcBlobService::new(Peer::from_addr(&addr, &PeerOptions::default()).unwrap());
    let error = stranger.has(&digest).await.unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    let other_name = format!("grpc+https://127.0.0.1:{port}");
    let other_name = GrpcBlobService::new(Peer::from_addr(&other_name, &trusting).unwrap());
    let error = other_name.has(&digest).await.unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    let clear = GrpcBlobService::new(super::impatient(&format!("grpc+http://localhost:{port}")));
    clear.has(&digest).await.unwrap_err();
    server.abort();
}

#[tokio::test]
async fn a_certificate_that_is_none_is_an_error() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let identity = Identity::from_pem("no", "no");
    let listeners = vec![Listener::Tls(listener, Tls { identity, client_ca: None })];
    let served = serve(&Store::memory(), listeners, &ServeOptions::default(), CancellationToken::new()).await;
    assert!(served.unwrap_err().to_string().contains("127.0.0.1"));
}

#[tokio::test]
async fn a_peer_that_is_waited_for_must_be_there() {
    let (_, dir) = serve_on_socket(&Store::memory(), &[Package::Snix]);
    let addr = format!("grpc+unix://{}/socket?wait-connect=1", dir.path().display());
    let blobs = GrpcBlobService::new(Peer::from_addr(&addr, &PeerOptions::default()).unwrap());
    assert!(blobs.has(&B3Digest::EMPTY).await.unwrap());
    let addr = format!("grpc+unix://{}/none?wait-connect=1", dir.path().display());
    Peer::from_addr(&addr, &PeerOptions::default()).unwrap_err();
}

/// A server on a socket, and a connection to it.
async fn start(
    options: ServeOptions,
    shutdown: &CancellationToken,
) -> (Channel, tokio::task::JoinHandle<Result<(), ServeError>>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listeners = vec![Listener::Unix(UnixListener::bind(&path).unwrap())];
    let shutdown = shutdown.clone();
    let server = tokio::spawn(async move { serve(&Store::memory(), listeners, &options, shutdown).await });
    let endpoint = Endpoint::from_shared(format!("unix://{}", path.display())).unwrap();
    (endpoint.connect().await.unwrap(), server, dir)
}

#[tokio::test]
async fn every_service_is_healthy_and_described() {
    let shutdown = CancellationToken::new();
    let (channel, server, _dir) = start(ServeOptions::default(), &shutdown).await;
    let mut health = HealthClient::new(channel.clone());
    for service in SERVICES.iter().copied().chain([""]) {
        let request = HealthCheckRequest { service: service.to_owned() };
        assert_eq!(health.check(request).await.unwrap().into_inner().status(), ServingStatus::Serving);
    }

    let ask = async |message_request| {
        let request = ServerReflectionRequest { host: String::new(), message_request: Some(message_request) };
        let mut client = ServerReflectionClient::new(channel.clone());
        let mut answers = client.server_reflection_info(stream::iter([request])).await.unwrap().into_inner();
        answers.message().await.unwrap().unwrap().message_response.unwrap()
    };
    let MessageResponse::ListServicesResponse(list) = ask(MessageRequest::ListServices(String::new())).await else {
        panic!("no list")
    };
    let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    for service in SERVICES.iter().chain(&["grpc.health.v1.Health"]) {
        assert!(names.contains(service), "{names:?}");
    }
    for symbol in ["snix.castore.v1.Entry", "tvix.castore.v1.Node", "snix.castore.v1.BlobService"] {
        let answer = ask(MessageRequest::FileContainingSymbol(symbol.to_owned())).await;
        assert!(matches!(answer, MessageResponse::FileDescriptorResponse(_)), "{answer:?}");
    }
    shutdown.cancel();
    server.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_shutdown_lets_requests_end_for_a_while() {
    let shutdown = CancellationToken::new();
    let options = ServeOptions {
        rpc: cofferdam_rpc::ServeOptions { drain: Duration::from_secs(2), ..Default::default() },
        ..Default::default()
    };
    let (channel, server, _dir) = start(options, &shutdown).await;
    let mut blobs = BlobServiceClient::new(channel.clone());
    // One request that ends in time, and one that never would.
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let (told, started) = tokio::sync::oneshot::channel();
    let ends = stream::iter([chunk(&b"drained"[..])]).chain(stream::once(async {
        told.send(()).unwrap();
        ended.await.unwrap();
        chunk(Vec::new())
    }));
    let mut other = blobs.clone();
    let ending = tokio::spawn(async move { other.put(ends).await });
    started.await.unwrap();
    let (told, started) = tokio::sync::oneshot::channel();
    let never = stream::once(async {
        told.send(()).unwrap();
        chunk(vec![0])
    });
    let hanging = tokio::spawn(async move { blobs.put(never.chain(stream::pending())).await });
    started.await.unwrap();
    // Both are with the server when it answers this one.
    HealthClient::new(channel).check(HealthCheckRequest::default()).await.unwrap();
    shutdown.cancel();
    end.send(()).unwrap();
    let digest = ending.await.unwrap().unwrap().into_inner().digest;
    assert_eq!(digest, B3Digest::of(b"drained").as_slice());
    let status = hanging.await.unwrap().unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
    server.await.unwrap().unwrap();
}

/// Import and export block the thread that they are on, here that of the test's runtime, and import has others of its own.
#[tokio::test]
async fn a_tree_goes_out_and_comes_back() {
    let file = |size: usize| Tree::File { contents: (0..size).map(|at| (at / 7) as u8).collect(), executable: true };
    let files = |sizes: std::ops::Range<usize>| {
        Tree::Directory(sizes.map(|size| (super::numbered(size), file(size))).collect())
    };
    let large = [(name("large"), file(3_000_000)), (name("many"), files(0..200)), (name("few"), files(0..3))];
    let tree = Tree::Directory(large.into());
    let dir = tempfile::tempdir().unwrap();
    tree.write(&dir.path().join("out"));
    for package in [Package::Snix, Package::Tvix] {
        let (peer, _dir) = serve_on_socket(&Store::memory(), &[package]);
        let store = Store {
            blobs: Arc::new(GrpcBlobService::new(peer.clone())),
            directories: Arc::new(GrpcDirectoryService::new(peer)),
        };
        let node = import_path(&store, &dir.path().join("out")).unwrap();
        assert_eq!(node, tree.node());
        let back = dir.path().join(format!("{package:?}"));
        export(&store, &node, &back).unwrap();
        assert_eq!(Tree::read(&back), tree);
    }
}
