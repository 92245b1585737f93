//! What a server does with a client that is hostile or broken.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use futures::{StreamExt as _, stream};
use prost::Message as _;
use tempfile::TempDir;
use tokio::{
    io::{AsyncRead, AsyncSeek, AsyncWrite, ReadBuf},
    sync::Notify,
};
use tonic::{
    Code, Request, Status,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_prost::ProstCodec;
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest,
};

use super::{
    super::{
        EncodedDirectory, GrpcBlobService, MAX_DIRECTORY_ENTRIES, ServeOptions, message,
        testing::{peer, serve_with},
    },
    IDLE_TIMEOUT, above, bytes, chunk, directory_entry, file_entry, get, leaf, put, symlink_entry,
};
use crate::{
    B3Digest, BlobReader, BlobService, BlobWriter, Directory, MemoryBlobService, Store,
    proto::{
        self, GetDirectoryRequest, ReadBlobRequest, StatBlobRequest, StatBlobResponse,
        blob_service_client::BlobServiceClient, directory_service_client::DirectoryServiceClient,
        stat_blob_response::ChunkMeta,
    },
};

/// A connection to a server of this store.
fn connect(store: &Store, options: &ServeOptions) -> (Channel, TempDir) {
    let (addr, dir) = serve_with(store, options);
    let endpoint = Endpoint::from_shared(addr.replace("grpc+", "")).unwrap();
    (endpoint.connect_lazy(), dir)
}

fn serve_options(rpc: cofferdam_rpc::ServeOptions) -> ServeOptions {
    ServeOptions { rpc, ..ServeOptions::default() }
}

fn impatient() -> ServeOptions {
    serve_options(cofferdam_rpc::ServeOptions { idle_timeout: IDLE_TIMEOUT, ..Default::default() })
}

fn refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, part: &str) {
    let status = result.unwrap_err();
    assert_eq!(status.code(), code, "{status}");
    assert!(status.message().contains(part), "{status}");
}

#[tokio::test]
async fn digests_of_another_length_are_refused() {
    let (channel, _dir) = connect(&Store::memory(), &ServeOptions::default());
    let mut blobs = BlobServiceClient::new(channel.clone());
    let mut directories = DirectoryServiceClient::new(channel);
    for length in [0, 31, 33, 1_000] {
        let digest: bytes::Bytes = vec![0; length].into();
        let rule = format!("digest: a digest has 32 bytes, not {length}");
        let stat = StatBlobRequest { digest: digest.clone(), ..Default::default() };
        refused(blobs.stat(stat).await, Code::InvalidArgument, &rule);
        refused(blobs.read(ReadBlobRequest { digest: digest.clone() }).await, Code::InvalidArgument, &rule);
        for recursive in [false, true] {
            refused(directories.get(get(digest.clone(), recursive)).await, Code::InvalidArgument, &rule);
        }
    }
    let unset = GetDirectoryRequest { by_what: None, recursive: true };
    refused(directories.get(unset).await, Code::InvalidArgument, "by_what: not set");
}

#[tokio::test]
async fn a_question_that_is_too_large_is_refused_unread() {
    let (channel, _dir) = connect(&Store::memory(), &ServeOptions::default());
    let digest: bytes::Bytes = vec![0; 100_000].into();
    let mut blobs = BlobServiceClient::new(channel.clone());
    let stat = StatBlobRequest { digest: digest.clone(), ..Default::default() };
    refused(blobs.stat(stat).await, Code::OutOfRange, "too large");
    refused(blobs.read(ReadBlobRequest { digest: digest.clone() }).await, Code::OutOfRange, "too large");
    let asked = DirectoryServiceClient::new(channel.clone()).get(get(digest, true)).await;
    refused(asked, Code::OutOfRange, "too large");
    let text = "s".repeat(100_000);
    let checked = HealthClient::new(channel.clone()).check(HealthCheckRequest { service: text.clone() }).await;
    refused(checked, Code::OutOfRange, "too large");
    let list = Some(MessageRequest::ListServices(String::new()));
    let request = stream::iter([ServerReflectionRequest { host: text, message_request: list }]);
    let mut client = ServerReflectionClient::new(channel);
    let mut answers = client.server_reflection_info(request).await.unwrap().into_inner();
    // It has no word for why it ends.
    assert_eq!(answers.message().await.unwrap(), None);
}

#[tokio::test]
async fn missing_objects_are_not_found() {
    let (channel, _dir) = connect(&Store::memory(), &ServeOptions::default());
    let mut blobs = BlobServiceClient::new(channel.clone());
    let mut directories = DirectoryServiceClient::new(channel);
    let digest = B3Digest::of(b"never put");
    for send_chunks in [false, true] {
        let stat = StatBlobRequest { digest: bytes(&digest), send_chunks, ..Default::default() };
        refused(blobs.stat(stat).await, Code::NotFound, &digest.to_string());
    }
    refused(blobs.read(ReadBlobRequest { digest: bytes(&digest) }).await, Code::NotFound, &digest.to_string());
    refused(directories.get(get(bytes(&digest), false)).await, Code::NotFound, &digest.to_string());
    // A tree that is not there has no directories.
    let mut tree = directories.get(get(bytes(&digest), true)).await.unwrap().into_inner();
    assert_eq!(tree.message().await.unwrap(), None);
}

#[tokio::test]
async fn a_hole_in_a_tree_is_an_error_that_names_it() {
    let store = Store::memory();
    let root = above(&leaf("missing"));
    store.directories.put(root.clone()).await.unwrap();
    let (channel, _dir) = connect(&store, &ServeOptions::default());
    let answered = DirectoryServiceClient::new(channel).get(get(bytes(&root.digest()), true)).await;
    let mut tree = answered.unwrap().into_inner();
    assert_eq!(B3Digest::of(tree.message().await.unwrap().unwrap().as_bytes()), root.digest());
    refused(tree.message().await, Code::NotFound, &leaf("missing").digest().to_string());
}

/// What a server says to a stream of these directories, and its store afterwards.
async fn put_all(messages: Vec<EncodedDirectory>) -> (Result<B3Digest, Status>, Store) {
    let store = Store::memory();
    let (channel, _dir) = connect(&store, &ServeOptions::default());
    let answered = DirectoryServiceClient::new(channel).put(stream::iter(messages)).await;
    (answered.map(|answer| answer.into_inner().root_digest.as_ref().try_into().unwrap()), store)
}

fn encoded(directories: &[&Directory]) -> Vec<EncodedDirectory> {
    directories.iter().map(|directory| message::encode(directory).unwrap()).collect()
}

fn raw(bytes: &[u8]) -> EncodedDirectory {
    bytes.to_vec().into()
}

#[tokio::test]
async fn trees_are_taken_leaves_first_and_root_last() {
    let (child, other) = (leaf("child"), leaf("other"));
    let root = above(&child);
    let (answered, store) = put_all(encoded(&[&child, &child, &root])).await;
    assert_eq!(answered.unwrap(), root.digest());
    assert_eq!(store.directories.get(&child.digest()).await.unwrap(), Some(child.clone()));
    for (tree, rule) in [
        (&[&root, &child][..], "put leaves first"),
        (&[&root], "put leaves first"),
        (&[&other, &child, &root], "is not below the root"),
        (&[&child, &root, &child], "put the root last"),
        (&[], "at least one directory"),
    ] {
        refused(put_all(encoded(tree)).await.0, Code::InvalidArgument, rule);
    }
}

#[tokio::test]
async fn directories_that_break_a_rule_are_refused() {
    let child = leaf("child");
    let files = |files| proto::Directory { files, ..Default::default() };
    let directories = |directories| proto::Directory { directories, ..Default::default() };
    let symlinks = |symlinks| proto::Directory { symlinks, ..Default::default() };
    let short = |length| vec![0; length].into();
    let cases = [
        (files(vec![file_entry("b"), file_entry("a")]), "files[1].name: \"a\" comes after \"b\""),
        (directories(vec![directory_entry("b", &child), directory_entry("a", &child)]), "directories[1].name"),
        (symlinks(vec![symlink_entry("b", "t"), symlink_entry("a", "t")]), "symlinks[1].name"),
        (files(vec![file_entry("a"), file_entry("a")]), "files[1]: two entries have the name \"a\""),
        (
            proto::Directory { files: vec![file_entry("a")], ..symlinks(vec![symlink_entry("a", "t")]) },
            "symlinks[0]: two entries have the name \"a\"",
        ),
        (files(vec![file_entry("")]), "is empty"),
        (files(vec![file_entry(".")]), "is reserved"),
        (files(vec![file_entry("a/b")]), "holds a slash"),
        (files(vec![file_entry("a\0")]), "holds a NUL"),
        (files(vec![file_entry(&"n".repeat(256))]), "is longer than 255 bytes"),
        (symlinks(vec![symlink_entry("a", &"t".repeat(4096))]), "is longer than 4095 bytes"),
        (symlinks(vec![symlink_entry("a", "")]), "is empty"),
        (files(vec![proto::FileEntry { digest: short(31), ..file_entry("a") }]), "a digest has 32 bytes, not 31"),
        (
            directories(vec![proto::DirectoryEntry { digest: short(33), ..directory_entry("a", &child) }]),
            "a digest has 32 bytes, not 33",
        ),
        (
            directories(vec![proto::DirectoryEntry { size: 3, ..directory_entry("a", &child) }]),
            "has size 3, but it has size 2",
        ),
        (
            directories(vec![proto::DirectoryEntry { size: u64::MAX, ..directory_entry("a", &child) }]),
            "a size of more than 2^64-1",
        ),
    ];
    for (message, rule) in cases {
        let mut messages = encoded(&[&child]);
        messages.push(raw(&message.encode_to_vec()));
        let (answered, store) = put_all(messages).await;
        refused(answered, Code::InvalidArgument, rule);
        assert!(store.directories.get(&B3Digest::of(&message.encode_to_vec())).await.unwrap().is_none());
    }
    let unknown_field = put_all(vec![raw(b"\x22\x00")]).await.0;
    refused(unknown_field, Code::InvalidArgument, "directory 1 of the stream");
    refused(put_all(vec![raw(b"\xff")]).await.0, Code::InvalidArgument, "not a snix.castore.v1.Directory");
}

#[tokio::test]
async fn too_large_directories_are_refused_undecoded() {
    // Two bytes an entry here, but hundreds in memory.
    let many = [0x1a, 0].repeat(MAX_DIRECTORY_ENTRIES + 1);
    refused(put_all(vec![raw(&many)]).await.0, Code::InvalidArgument, "has 1048577 entries");
    let large = put_all(vec![raw(&vec![0; crate::directory::MAX_DIRECTORY_BYTES + 1])]).await.0;
    refused(large, Code::OutOfRange, "too large");
}

#[tokio::test]
async fn a_blob_that_is_too_large_is_refused() {
    let store = Store::memory();
    let (channel, _dir) = connect(&store, &ServeOptions { max_blob_bytes: 1_000_000, ..ServeOptions::default() });
    let mut blobs = BlobServiceClient::new(channel);
    let endless = stream::repeat(chunk(vec![0; 1000]));
    refused(blobs.put(endless).await, Code::OutOfRange, "more than 1000000 bytes");
    let large_message = stream::iter([chunk(vec![0; 5 * 1024 * 1024])]);
    refused(blobs.put(large_message).await, Code::OutOfRange, "too large");
}

/// Tells when a writer is gone, and has lost the empty blob.
#[derive(Default)]
struct Telling {
    blobs: MemoryBlobService,
    gone: Arc<Notify>,
}

struct TellingWriter {
    writer: Box<dyn BlobWriter>,
    gone: Arc<Notify>,
}

impl Drop for TellingWriter {
    fn drop(&mut self) {
        self.gone.notify_one();
    }
}

#[async_trait]
impl BlobService for Telling {
    async fn has(&self, digest: &B3Digest) -> io::Result<bool> {
        match *digest {
            B3Digest::EMPTY => Err(io::Error::new(io::ErrorKind::NotFound, "the store's directory is gone")),
            _ => self.blobs.has(digest).await,
        }
    }

    async fn open_read(&self, digest: &B3Digest) -> io::Result<Option<Box<dyn BlobReader>>> {
        self.blobs.open_read(digest).await
    }

    async fn open_write(&self) -> Box<dyn BlobWriter> {
        Box::new(TellingWriter { writer: self.blobs.open_write().await, gone: self.gone.clone() })
    }

    fn batch(&self) -> Arc<dyn BlobService> {
        self.blobs.batch()
    }

    async fn commit(&self) -> io::Result<()> {
        self.blobs.commit().await
    }
}

impl AsyncWrite for TellingWriter {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writer).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_shutdown(cx)
    }
}

#[async_trait]
impl BlobWriter for TellingWriter {
    async fn close(&mut self) -> io::Result<B3Digest> {
        self.writer.close().await
    }
}

#[tokio::test]
async fn a_client_that_dies_in_mid_stream_leaves_nothing() {
    let blobs = Telling::default();
    let gone = blobs.gone.clone();
    let store = Store { blobs: Arc::new(blobs), ..Store::memory() };
    let (channel, _dir) = connect(&store, &ServeOptions::default());
    let contents = vec![7; 1000];
    let (told, taken) = tokio::sync::oneshot::channel();
    let mut told = Some(told);
    let half = stream::iter([chunk(contents.clone())]).chain(stream::poll_fn(move |_| {
        // The first chunk is on its way.
        told.take().map(|told| told.send(()));
        Poll::Pending
    }));
    let mut blobs = BlobServiceClient::new(channel.clone());
    let putting = tokio::spawn(async move { blobs.put(half).await });
    taken.await.unwrap();
    putting.abort();
    putting.await.unwrap_err();
    gone.notified().await;
    assert!(!store.blobs.has(&B3Digest::of(&contents)).await.unwrap());
}

#[tokio::test]
async fn a_client_that_hangs_is_given_up() {
    let (channel, _dir) = connect(&Store::memory(), &impatient());
    let mut blobs = BlobServiceClient::new(channel.clone());
    let mut directories = DirectoryServiceClient::new(channel.clone());
    let hanging = stream::iter([chunk(vec![0; 1000])]).chain(stream::pending());
    refused(blobs.put(hanging).await, Code::DeadlineExceeded, "the client has been silent for 400ms");
    let hanging = stream::iter(encoded(&[&leaf("x")])).chain(stream::pending());
    refused(directories.put(hanging).await, Code::DeadlineExceeded, "the client has been silent for 400ms");
    // A question that never comes, and one that never ends.
    let mut client = Grpc::new(channel);
    for asked in [vec![], vec![StatBlobRequest::default()]] {
        client.ready().await.unwrap();
        let codec = ProstCodec::<StatBlobRequest, StatBlobResponse>::default();
        let path = PathAndQuery::from_static("/snix.castore.v1.BlobService/Stat");
        let asked = stream::iter(asked).chain(stream::pending());
        let asked = client.client_streaming(Request::new(asked), path, codec);
        let answered = tokio::time::timeout(Duration::from_secs(60), asked).await.unwrap();
        refused(answered, Code::DeadlineExceeded, "the request was not there after 400ms");
    }
}

#[tokio::test]
async fn a_client_that_is_slow_is_given_up() {
    let options = serve_options(cofferdam_rpc::ServeOptions { request_timeout: Duration::ZERO, ..Default::default() });
    let (channel, _dir) = connect(&Store::memory(), &options);
    let hanging = stream::iter(encoded(&[&leaf("x")])).chain(stream::pending());
    let mut directories = DirectoryServiceClient::new(channel);
    let answered = tokio::time::timeout(Duration::from_secs(60), directories.put(hanging)).await.unwrap();
    refused(answered, Code::DeadlineExceeded, "the client has been slow");
}

/// An endless blob, which counts the bytes that are read.
struct Endless(Arc<AtomicUsize>);

impl AsyncRead for Endless {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = buffer.initialize_unfilled().len();
        buffer.advance(read);
        self.0.fetch_add(read, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl AsyncSeek for Endless {
    fn start_seek(self: Pin<&mut Self>, _: io::SeekFrom) -> io::Result<()> {
        Ok(())
    }

    fn poll_complete(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<u64>> {
        Poll::Ready(Ok(0))
    }
}

/// Reads as [`Endless`], says that every blob has as many chunks as its digest begins with, and panics at all else.
#[derive(Default)]
struct Strange(Arc<AtomicUsize>);

#[async_trait]
impl BlobService for Strange {
    async fn has(&self, _: &B3Digest) -> io::Result<bool> {
        panic!("on purpose")
    }

    async fn chunks(&self, digest: &B3Digest) -> io::Result<Option<Vec<ChunkMeta>>> {
        let [a, b, c, d, ..] = *digest.as_bytes();
        let meta = ChunkMeta { digest: bytes(&B3Digest::EMPTY), size: 7 };
        Ok(Some(vec![meta; u32::from_be_bytes([a, b, c, d]) as usize]))
    }

    async fn open_read(&self, _: &B3Digest) -> io::Result<Option<Box<dyn BlobReader>>> {
        Ok(Some(Box::new(Endless(self.0.clone()))))
    }

    async fn open_write(&self) -> Box<dyn BlobWriter> {
        panic!("on purpose")
    }

    fn batch(&self) -> Arc<dyn BlobService> {
        panic!("on purpose")
    }

    async fn commit(&self) -> io::Result<()> {
        panic!("on purpose")
    }
}

#[tokio::test]
async fn a_client_that_stops_reading_blocks_the_server_until_a_timeout() {
    let strange = Strange::default();
    let read = strange.0.clone();
    let store = Store { blobs: Arc::new(strange), ..Store::memory() };
    let (channel, _dir) = connect(&store, &impatient());
    let request = ReadBlobRequest { digest: bytes(&B3Digest::of(b"")) };
    let mut chunks = BlobServiceClient::new(channel).read(request).await.unwrap().into_inner();
    assert!(!chunks.message().await.unwrap().unwrap().data.is_empty());
    tokio::time::sleep(IDLE_TIMEOUT * 3).await;
    assert!(read.load(Ordering::Relaxed) < 8 * 1024 * 1024);
    let end = tokio::time::timeout(Duration::from_secs(60), async {
        loop {
            match chunks.message().await {
                Ok(Some(_)) => {}
                end => break end,
            }
        }
    });
    refused(end.await.unwrap(), Code::DeadlineExceeded, "the client has been silent for 400ms");
}

#[tokio::test]
async fn chunks_are_listed_if_the_list_fits_into_a_message() {
    let store = Store { blobs: Arc::new(Strange::default()), ..Store::memory() };
    let (channel, _dir) = connect(&store, &ServeOptions::default());
    let mut blobs = BlobServiceClient::new(channel);
    for (chunks, told) in [(0_u32, 0), (3, 3), (90_000, 90_000), (120_000, 0)] {
        let digest = [chunks.to_be_bytes().as_slice(), &[0; 28]].concat();
        let stat = StatBlobRequest { digest: digest.into(), send_chunks: true, ..Default::default() };
        assert_eq!(blobs.stat(stat).await.unwrap().into_inner().chunks.len(), told);
    }
}

#[tokio::test]
async fn a_panic_of_the_store_ends_one_request() {
    let store = Store { blobs: Arc::new(Strange::default()), ..Store::memory() };
    let (channel, _dir) = connect(&store, &ServeOptions::default());
    let mut blobs = BlobServiceClient::new(channel.clone());
    let stat = StatBlobRequest { digest: bytes(&B3Digest::of(b"")), ..Default::default() };
    refused(blobs.stat(stat).await, Code::Internal, "the server failed");
    refused(blobs.put(stream::iter([chunk(vec![0])])).await, Code::Internal, "the server failed");
    let asked = DirectoryServiceClient::new(channel).get(get(bytes(&B3Digest::EMPTY), false)).await;
    refused(asked, Code::NotFound, "");
}

#[tokio::test]
async fn a_store_without_its_files_reports_no_blob_as_missing() {
    let store = Store { blobs: Arc::new(Telling::default()), ..Store::memory() };
    let (channel, _dir) = connect(&store, &ServeOptions::default());
    let stat = StatBlobRequest { digest: bytes(&B3Digest::EMPTY), ..Default::default() };
    refused(BlobServiceClient::new(channel).stat(stat).await, Code::Internal, "directory is gone");
}

#[tokio::test]
async fn acknowledged_blobs_are_durable() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = crate::LocalBlobService::open(dir.path()).unwrap();
    let store = Store { blobs: Arc::new(blobs), ..Store::memory() };
    let (addr, _socket_dir) = serve_with(&store, &ServeOptions::default());
    let digest = put(&GrpcBlobService::new(peer(&addr)), b"durable").await.unwrap();
    let hex = digest.to_hex();
    assert_eq!(std::fs::read(dir.path().join("b3").join(&hex[..2]).join(&hex)).unwrap(), b"durable");
}
