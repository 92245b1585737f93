//! Two tenants of one store over gRPC: one over TCP, the other over a Unix socket.

use std::{fs, path::Path, time::Duration};

use bytes::Bytes;
use cofferdam_rpc::Listener;
use futures::{StreamExt as _, stream};
use tempfile::TempDir;
use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;
use tonic::{Status, transport::Channel};

use super::*;
use crate::{
    Directory, LocalStore,
    blobservice::note_collected,
    gc,
    grpc::{
        EncodedDirectory, Peer, PeerOptions, ServeOptions, add_services,
        testing::{RUNTIME, spawn_routes_on},
    },
    proto::{
        BlobChunk, GetDirectoryRequest, ReadBlobRequest, StatBlobRequest, blob_service_client::BlobServiceClient,
        directory_service_client::DirectoryServiceClient, get_directory_request::ByWhat,
    },
    testing::{file, name, symlink},
};

const SECRET: &[u8] = b"token=1234";
const ABSENT: &[u8] = b"token=5678";

/// A served store. `.0` is the directory of everything.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    fn local(&self) -> LocalStore {
        LocalStore::open(&self.path("blobs"), &self.path("d.redb")).unwrap()
    }

    fn store(&self) -> Store {
        let dir = self.0.path().display();
        Store::from_addrs(&format!("file://{dir}/blobs"), &format!("redb://{dir}/d.redb")).unwrap()
    }

    fn grants(&self) -> Arc<Grants> {
        Grants::open(&self.path("grants.redb"), Some(&self.path("blobs"))).unwrap()
    }

    /// Removes everything that no root protects.
    fn collect(&self) {
        gc::collect(&self.local(), Duration::ZERO, false).unwrap();
    }

    /// Files that hold blobs, or may become some.
    fn blob_files(&self) -> usize {
        files_below(&self.path("blobs/b3")) + files_below(&self.path("blobs/staging"))
    }
}

fn files_below(dir: &Path) -> usize {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { files_below(&path) } else { 1 }).sum()
}

/// What one tenant can ask.
struct Tenant {
    blobs: BlobServiceClient<Channel>,
    directories: DirectoryServiceClient<Channel>,
}

/// Two tenants of a store, by their connections, and the names that these give them.
fn serve(place: &Place, views: &Views) -> ([Tenant; 2], [String; 2]) {
    let _inside = RUNTIME.enter();
    let mut routes = tonic::service::RoutesBuilder::default();
    add_services(&mut routes, views, &ServeOptions::default(), CancellationToken::new());
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    tcp.set_nonblocking(true).unwrap();
    let addrs = [
        format!("grpc+http://{}", tcp.local_addr().unwrap()),
        format!("grpc+unix://{}", place.path("socket").display()),
    ];
    let unix = UnixListener::bind(place.path("socket")).unwrap();
    spawn_routes_on(routes, vec![Listener::Tcp(TcpListener::from_std(tcp).unwrap()), Listener::Unix(unix)]);
    let tenants = addrs.map(|addr| {
        let channel = Peer::from_addr(&addr, &PeerOptions::default()).unwrap().raw_channel();
        Tenant { blobs: BlobServiceClient::new(channel.clone()), directories: DirectoryServiceClient::new(channel) }
    });
    (tenants, ["address:127.0.0.1".to_owned(), format!("user:{}", nix::unistd::geteuid())])
}

fn wire(digest: &B3Digest) -> Bytes {
    digest.as_slice().to_vec().into()
}

impl Tenant {
    async fn put(&mut self, contents: &[u8]) -> B3Digest {
        let chunks: Vec<_> = contents.chunks(3).map(|data| BlobChunk { data: data.to_vec().into() }).collect();
        let answer = self.blobs.put(stream::iter(chunks)).await.unwrap();
        answer.into_inner().digest.as_ref().try_into().unwrap()
    }

    async fn put_tree(&mut self, directories: &[Directory]) -> B3Digest {
        let encoded: Vec<_> = directories.iter().map(|directory| EncodedDirectory::from(directory.encode())).collect();
        let answer = self.directories.put(stream::iter(encoded)).await.unwrap();
        answer.into_inner().root_digest.as_ref().try_into().unwrap()
    }

    /// What each question about a digest is answered with: to stat it, with and without chunks, to read it, and to get it as a
    /// directory and as a tree.
    async fn ask(&mut self, digest: &B3Digest) -> [Result<usize, Status>; 5] {
        let stat = |send_chunks| StatBlobRequest { digest: wire(digest), send_chunks, ..Default::default() };
        let get = |recursive| GetDirectoryRequest { by_what: Some(ByWhat::Digest(wire(digest))), recursive };
        let mut blobs = self.blobs.clone();
        let stats = [
            blobs.stat(stat(false)).await.map(|answer| answer.into_inner().chunks.len()),
            blobs.stat(stat(true)).await.map(|answer| answer.into_inner().chunks.len()),
        ];
        let read = match blobs.read(ReadBlobRequest { digest: wire(digest) }).await {
            Ok(chunks) => bytes(chunks.into_inner().map(|chunk| chunk.map(|chunk| chunk.data.len()))).await,
            Err(status) => Err(status),
        };
        let mut gets = Vec::new();
        for recursive in [false, true] {
            gets.push(match self.directories.get(get(recursive)).await {
                Ok(directories) => bytes(directories.into_inner().map(|directory| directory.map(|_| 1))).await,
                Err(status) => Err(status),
            });
        }
        let [stat, chunks] = stats;
        let [directory, tree] = gets.try_into().unwrap();
        [stat, chunks, read, directory, tree]
    }

    async fn has(&mut self, digest: &B3Digest) -> [bool; 2] {
        let [stat, chunks, read, directory, tree] = self.ask(digest).await;
        assert_eq!((stat.is_ok(), stat.is_ok()), (chunks.is_ok(), read.is_ok()));
        // The answer for a tree that isn't there has no directories.
        assert_eq!(directory.is_ok(), tree.is_ok_and(|count| count > 0));
        [stat.is_ok(), directory.is_ok()]
    }
}

async fn bytes(mut pieces: impl futures::Stream<Item = Result<usize, Status>> + Unpin) -> Result<usize, Status> {
    let mut bytes = 0;
    while let Some(piece) = pieces.next().await {
        bytes += piece?;
    }
    Ok(bytes)
}

/// All that an answer says, with `X` for the digest that was asked for.
fn said(answers: [Result<usize, Status>; 5], digest: &B3Digest) -> [String; 5] {
    answers.map(|answer| match answer {
        Ok(found) => format!("found {found}"),
        Err(status) => format!(
            "{:?}: {} {:?} {:?}",
            status.code(),
            status.message().replace(&digest.to_string(), "X"),
            status.details(),
            status.metadata().iter().filter(|entry| !format!("{entry:?}").contains("\"date\"")).count(),
        ),
    })
}

/// A tree with the secret in it, leaves first.
fn tree() -> [Directory; 2] {
    let leaf = Directory::try_from_iter([(name("secret"), file(SECRET, false))]).unwrap();
    let root = Directory::try_from_iter([(name("leaf"), leaf.to_node()), (name("link"), symlink("leaf"))]).unwrap();
    [leaf, root]
}

/// The answers to the second tenant about what the first one has put, and about what nobody has.
async fn answers(divided: bool) -> [[[String; 5]; 3]; 2] {
    let place = Place::new();
    let (store, grants) = (place.store(), place.grants());
    let views = if divided { Views::divided(store, grants) } else { Views::whole(store) };
    let ([mut one, mut other], _) = serve(&place, &views);
    let [leaf, root] = tree();
    one.put(SECRET).await;
    one.put_tree(&[leaf.clone(), root.clone()]).await;
    assert_eq!(one.has(&B3Digest::of(SECRET)).await, [true, false]);
    assert_eq!(one.has(&root.digest()).await, [false, true]);
    let mut all = Vec::new();
    for asked in [[B3Digest::of(SECRET), leaf.digest(), root.digest()], [b"x", b"y", b"z"].map(|of| B3Digest::of(of))] {
        let mut said_of = Vec::new();
        for digest in asked {
            said_of.push(said(other.ask(&digest).await, &digest));
        }
        all.push(said_of.try_into().unwrap());
    }
    all.try_into().unwrap()
}

#[tokio::test]
async fn what_another_tenant_has_is_answered_word_for_word_like_what_nobody_has() {
    let [theirs, nobodys] = answers(true).await;
    assert_eq!(theirs, nobodys);
    assert!(theirs[0][0].starts_with("NotFound: the blob X is not in the store"), "{theirs:?}");
}

/// Without a division, the same questions are answered with what the other tenant has put.
#[tokio::test]
async fn an_undivided_store_answers_everybody() {
    let [[blob, leaf, root], nobodys] = answers(false).await;
    assert_eq!((blob[0].as_str(), blob[2].as_str()), ("found 0", "found 10"));
    assert_eq!((leaf[4].as_str(), root[4].as_str()), ("found 1", "found 2"));
    assert_ne!([blob, leaf, root], nobodys);
}

#[tokio::test]
async fn who_puts_the_same_bytes_has_them_and_they_are_stored_once() {
    let place = Place::new();
    let (store, grants) = (place.store(), place.grants());
    let ([mut one, mut other], names) = serve(&place, &Views::divided(store, grants.clone()));
    let digest = one.put(SECRET).await;
    let files = place.blob_files();
    assert_eq!(other.has(&digest).await, [false, false]);
    assert_eq!(other.put(SECRET).await, digest);
    assert_eq!(other.has(&digest).await, [true, false]);
    other.put(SECRET).await;
    assert_eq!(place.blob_files(), files);
    let usage = Usage { bytes: SECRET.len() as u64, objects: 1 };
    for name in names {
        assert_eq!(grants.usage(&name).unwrap(), usage);
    }
    assert_eq!(grants.usage("nobody").unwrap(), Usage::default());
}

#[tokio::test]
async fn naming_a_digest_gains_nothing() {
    let place = Place::new();
    let (store, grants) = (place.store(), place.grants());
    let ([mut one, mut other], _) = serve(&place, &Views::divided(store, grants));
    let digest = one.put(SECRET).await;
    let [leaf, root] = tree();
    assert_eq!(other.put_tree(&[leaf.clone(), root.clone()]).await, root.digest());
    // It has all directories that it put, and no blob.
    assert_eq!(other.has(&leaf.digest()).await, [false, true]);
    assert_eq!(other.has(&root.digest()).await, [false, true]);
    assert_eq!(other.has(&digest).await, [false, false]);
}

#[tokio::test]
async fn a_put_that_breaks_off_grants_nothing() {
    let place = Place::new();
    let (store, grants) = (place.store(), place.grants());
    let ([mut one, mut other], names) = serve(&place, &Views::divided(store, grants.clone()));
    one.put(SECRET).await;
    // All bytes have come, but not their end.
    let (mut chunks, stream) = futures::channel::mpsc::channel(1);
    let mut blobs = other.blobs.clone();
    let putting = RUNTIME.spawn(async move { blobs.put(stream).await });
    futures::SinkExt::send(&mut chunks, BlobChunk { data: SECRET.into() }).await.unwrap();
    putting.abort();
    assert!(putting.await.unwrap_err().is_cancelled());
    assert_eq!(other.has(&B3Digest::of(SECRET)).await, [false, false]);
    assert_eq!(grants.usage(&names[1]).unwrap(), Usage::default());
}

#[tokio::test]
async fn what_was_collected_is_granted_to_nobody_even_if_it_comes_back() {
    let place = Place::new();
    let (store, grants) = (place.store(), place.grants());
    let ([mut one, mut other], names) = serve(&place, &Views::divided(store, grants.clone()));
    let kept = one.put(ABSENT).await;
    place.local().add_root("kept", &file(ABSENT, false)).unwrap();
    let [leaf, root] = tree();
    let digest = one.put(SECRET).await;
    one.put_tree(&[leaf.clone(), root.clone()]).await;
    place.collect();
    assert_eq!(one.has(&digest).await, [false, false]);
    assert_eq!(other.put(SECRET).await, digest);
    other.put_tree(&[leaf, root.clone()]).await;
    assert_eq!((other.has(&digest).await, other.has(&root.digest()).await), ([true, false], [false, true]));
    // The first tenant can't tell that somebody else has put the same.
    assert_eq!((one.has(&digest).await, one.has(&root.digest()).await), ([false, false], [false, false]));
    assert_eq!(one.has(&kept).await, [true, false]);
    assert_eq!(grants.usage(&names[0]).unwrap(), Usage { bytes: ABSENT.len() as u64, objects: 1 });
}

#[tokio::test]
async fn what_is_shared_is_seen_by_all_until_it_is_not() {
    let place = Place::new();
    let (store, local) = (place.store(), place.local());
    let views = Views::divided(store.clone(), place.grants());
    let ([mut one, mut other], _) = serve(&place, &views);
    let [leaf, root] = tree();
    let mut writer = store.blobs.open_write().await;
    tokio::io::AsyncWriteExt::write_all(&mut writer, SECRET).await.unwrap();
    let digest = writer.close().await.unwrap();
    store.blobs.commit().await.unwrap();
    let mut putter = store.directories.put_multiple_start();
    for directory in [&leaf, &root] {
        putter.put(directory.clone()).await.unwrap();
    }
    putter.close().await.unwrap();
    assert_eq!(one.has(&digest).await, [false, false]);
    let (shared, missing) = local.everything_below(&[root.to_node()]).unwrap();
    assert_eq!(missing, None);
    views.share(shared);
    for tenant in [&mut one, &mut other] {
        assert_eq!(tenant.has(&digest).await, [true, false]);
        assert_eq!(tenant.has(&leaf.digest()).await, [false, true]);
        assert_eq!(tenant.has(&root.digest()).await, [false, true]);
    }
    views.share(Shared::new());
    assert_eq!(other.has(&root.digest()).await, [false, false]);
}

#[tokio::test]
async fn granted_trees_are_granted_whole_and_nothing_of_others() {
    let place = Place::new();
    let views = Views::divided(place.store(), place.grants());
    let [leaf, root] = tree();
    let owner = views.of("owner");
    let mut writer = owner.blobs.open_write().await;
    tokio::io::AsyncWriteExt::write_all(&mut writer, SECRET).await.unwrap();
    let digest = writer.close().await.unwrap();
    assert!(owner.blobs.has(&digest).await.unwrap());
    owner.blobs.commit().await.unwrap();
    let mut putter = owner.directories.put_multiple_start();
    for directory in [&leaf, &root] {
        putter.put(directory.clone()).await.unwrap();
    }
    putter.close().await.unwrap();
    let joined = views.of("joined");
    assert!(!joined.blobs.has(&digest).await.unwrap());
    views.grant("joined", &[root.to_node()], &DirectoryMemory::unlimited()).await.unwrap();
    assert!(joined.blobs.has(&digest).await.unwrap());
    assert_eq!(joined.directories.get(&leaf.digest()).await.unwrap(), Some(leaf));
    assert!(!views.of("stranger").blobs.has(&digest).await.unwrap());
    let unknown = Node::Directory { digest: B3Digest::of(ABSENT), size: 0 };
    assert_eq!(
        views.grant("joined", &[unknown], &DirectoryMemory::unlimited()).await.unwrap_err().kind(),
        io::ErrorKind::NotFound
    );
}

/// Whether few of many grants are removed or most of them.
#[test]
fn what_was_collected_leaves_the_sums_of_all_who_had_it() {
    let place = Place::new();
    let grants = place.grants();
    let object = |of: u8| Object { kind: Kind::Blob, digest: B3Digest::of(&[of]), bytes: u64::from(of) };
    for tenant in ["one", "other"] {
        grants.add(tenant, (1..=100).map(object).collect(), false).unwrap();
    }
    grants.add("one", vec![Object { kind: Kind::Directory, ..object(1) }], false).unwrap();
    let usage = || ["one", "other"].map(|tenant| grants.usage(tenant).unwrap());
    let note = |kind, of: Vec<u8>| {
        let digests: Vec<_> = of.into_iter().map(|of| object(of).digest).collect();
        note_collected(&place.path("blobs"), kind, &digests).unwrap();
    };
    note(Kind::Blob, vec![1, 2, 200]);
    let expected = Usage { bytes: 5050 - 3, objects: 98 };
    assert_eq!(usage(), [Usage { bytes: expected.bytes + 1, objects: 99 }, expected]);
    note(Kind::Blob, (1..=99).collect());
    note(Kind::Directory, (1..=99).collect());
    assert_eq!(usage(), [Usage { bytes: 100, objects: 1 }; 2]);
    assert!(grants.has("one", Kind::Blob, &object(100).digest).unwrap());
}

#[test]
fn grants_outlive_their_process_and_tenants_keep_their_ids() {
    let place = Place::new();
    let object = |of: &[u8]| Object { kind: Kind::Blob, digest: B3Digest::of(of), bytes: 1 };
    for (round, tenant) in ["one", "other", "one"].into_iter().enumerate() {
        let grants = place.grants();
        grants.add(tenant, vec![object(&[1]), object(&[2]), object(&[1])], false).unwrap();
        grants.add(tenant, vec![object(&[2]), object(&[3 + u8::try_from(round).unwrap()])], false).unwrap();
    }
    let grants = place.grants();
    let expected = [("one", [true, true, true, false, true], 4), ("other", [true, true, false, true, false], 3)];
    for (tenant, has, objects) in expected {
        let found = [1, 2, 3, 4, 5].map(|of| grants.has(tenant, Kind::Blob, &B3Digest::of(&[of])).unwrap());
        assert_eq!((found, grants.usage(tenant).unwrap()), (has, Usage { bytes: objects, objects }));
        assert!(!grants.has(tenant, Kind::Directory, &B3Digest::of(&[1])).unwrap());
    }
    // Only one process may decide.
    let error = Grants::open(&place.path("grants.redb"), None).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
}
