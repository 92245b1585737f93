//! What a client does with a server that is hostile or broken.

use std::{io, time::Duration};

use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream};
use tokio::{
    io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _},
    net::UnixListener,
};
use tonic::Status;

use super::{
    super::{
        EncodedDirectory, GrpcBlobService, GrpcDirectoryService, Peer, PeerOptions, ServeOptions, message,
        testing::{RUNTIME, peer, serve_with},
    },
    above, bytes, chunk, directory_entry,
    fakes::{Answers, FakeBlobs, FakeDirectories, all, for_ever, hang_after},
    file_entry, impatient, leaf, put, symlink_entry,
};
use crate::{
    B3Digest, BlobService as _, Directory, DirectoryService as _, Store,
    proto::{self, BlobChunk, PutBlobResponse, PutDirectoryResponse, StatBlobResponse, stat_blob_response::ChunkMeta},
    testing::too_large_tree,
};

const CONTENTS: &[u8] = b"what the blob should hold";

fn digest() -> B3Digest {
    B3Digest::of(CONTENTS)
}

/// The error of reading the blob from such a server: the same from a file, from a reader and after a seek; and what the
/// reader gave before it.
async fn read_error(read: fn() -> Answers<BlobChunk>, connect: fn(&str) -> Peer) -> (io::Error, Vec<u8>) {
    let (addr, _dir) = FakeBlobs::reading(read).serve();
    let blobs = GrpcBlobService::new(connect(&addr));
    let of_file = blobs.open_file(&digest()).await.unwrap_err();
    let mut contents = Vec::new();
    let of_reader = match blobs.open_read(&digest()).await {
        Err(error) => error,
        Ok(reader) => {
            let mut reader = reader.unwrap();
            let error = reader.read_to_end(&mut contents).await.unwrap_err();
            // Not taken for the end afterwards either.
            reader.read(&mut [0]).await.unwrap_err();
            error
        }
    };
    if let Ok(reader) = blobs.open_read(&digest()).await {
        let of_seek = reader.unwrap().seek(io::SeekFrom::End(0)).await.unwrap_err();
        assert_eq!(of_seek.kind(), of_file.kind());
    }
    assert_eq!((of_file.kind(), of_file.to_string()), (of_reader.kind(), of_reader.to_string()));
    assert!(of_file.to_string().contains(&addr), "{of_file}");
    (of_file, contents)
}

#[tokio::test]
async fn a_damaged_blob_is_an_error_before_its_end() {
    let (error, given) = read_error(|| all(vec![chunk(&b"something else"[..])]), peer).await;
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    assert!(error.to_string().contains("has the digest"), "{error}");
    // What comes in one piece is checked before any of it is given.
    assert_eq!(given, b"");
    let (error, given) = read_error(|| all(vec![chunk(&CONTENTS[..4]), chunk(&CONTENTS[5..])]), peer).await;
    assert_eq!((error.kind(), given.as_slice()), (io::ErrorKind::InvalidData, &CONTENTS[..4]));
    let (error, _) = read_error(|| all(vec![chunk(&CONTENTS[..4])]), peer).await;
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    let (error, _) = read_error(|| all(vec![chunk(CONTENTS), chunk(&b"!"[..])]), peer).await;
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    let (error, _) = read_error(|| all(Vec::new()), peer).await;
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
}

#[tokio::test]
async fn a_server_that_hangs_is_given_up() {
    for read in [
        || hang_after(Vec::new()),
        || hang_after(vec![chunk(CONTENTS)]),
        // Messages without a byte are no sign of life.
        || for_ever(chunk(Vec::new())),
    ] {
        let (error, _) = read_error(read, impatient).await;
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(error.to_string().contains("silent for 400ms"), "{error}");
    }
}

#[tokio::test]
async fn a_server_that_fails_in_mid_stream_is_an_error() {
    let (error, _) = read_error(
        || {
            all(vec![chunk(&CONTENTS[..4])])
                .chain(stream::once(async { Err(Status::internal("disk\x1b[31m on fire")) }))
                .boxed()
        },
        peer,
    )
    .await;
    assert!(error.to_string().contains("disk\\u{1b}[31m on fire"), "{error}");
    // The stream breaks off, as when the server's process dies.
    let (error, _) =
        read_error(|| all(vec![chunk(&CONTENTS[..4])]).chain(stream::poll_fn(|_| panic!("on purpose"))).boxed(), peer)
            .await;
    assert_ne!(error.kind(), io::ErrorKind::NotFound);
}

#[tokio::test]
async fn a_blob_that_goes_on_for_ever_is_cut_off() {
    let (addr, _dir) = FakeBlobs::reading(|| for_ever(chunk(vec![0; 1000]))).serve();
    let options = PeerOptions { max_blob_bytes: 1_000_000, ..PeerOptions::default() };
    let blobs = GrpcBlobService::new(Peer::from_addr(&addr, &options).unwrap());
    let error = blobs.open_file(&digest()).await.unwrap_err();
    assert!(error.to_string().contains("goes on after 1000000 bytes"), "{error}");
}

#[tokio::test]
async fn a_message_that_is_too_large_is_refused() {
    let (addr, _dir) = FakeBlobs::reading(|| all(vec![chunk(vec![0; 5 * 1024 * 1024])])).serve();
    let error = GrpcBlobService::new(peer(&addr)).open_file(&digest()).await.unwrap_err();
    assert!(error.to_string().contains("too large"), "{error}");
}

#[tokio::test]
async fn a_list_of_chunks_keeps_its_rules() {
    let refused = async |chunks: Vec<ChunkMeta>| {
        let stat = Box::new(move |_| Ok(StatBlobResponse { chunks: chunks.clone(), ..Default::default() }));
        let (addr, _dir) = FakeBlobs { stat, ..FakeBlobs::default() }.serve();
        GrpcBlobService::new(peer(&addr)).chunks(&digest()).await.unwrap_err().to_string()
    };
    let meta = |digest: Vec<u8>, size| ChunkMeta { digest: digest.into(), size };
    let short = refused(vec![meta(vec![0; 32], 1), meta(vec![0; 31], 1)]).await;
    assert!(short.contains("chunks[1].digest: a digest has 32 bytes, not 31"), "{short}");
    let large = refused(vec![meta(vec![0; 32], u64::MAX), meta(vec![0; 32], 1)]).await;
    assert!(large.contains("chunks[1].size"), "{large}");
}

#[tokio::test]
async fn a_server_that_names_another_digest_has_not_taken_the_blob() {
    for answer in [vec![0; 32], vec![0; 31], Vec::new(), vec![0; 100_000]] {
        let put_blob = move |mut chunks: tonic::Streaming<BlobChunk>| {
            let digest = answer.clone().into();
            async move {
                while chunks.message().await?.is_some() {}
                Ok(PutBlobResponse { digest })
            }
            .boxed()
        };
        let (addr, _dir) = FakeBlobs { put: Box::new(put_blob), ..FakeBlobs::default() }.serve();
        let error = put(&GrpcBlobService::new(peer(&addr)), CONTENTS).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(error.to_string().contains("the digest of the blob"), "{error}");
    }
}

#[tokio::test]
async fn a_server_that_takes_nothing_is_given_up_and_fills_no_memory() {
    let (addr, _dir) = FakeBlobs::default().serve();
    let blobs = GrpcBlobService::new(impatient(&addr));
    let mut writer = blobs.open_write().await;
    let mut taken = 0;
    let error = loop {
        match writer.write(&[0; 100_000]).await {
            Ok(more) => taken += more,
            Err(error) => break error,
        }
        assert!(taken < 8 * 1024 * 1024);
    };
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert!(writer.close().await.unwrap_err().to_string().contains("write it again"));
    // And one that takes it all but has no answer.
    assert_eq!(put(&blobs, CONTENTS).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
}

#[tokio::test]
async fn a_server_that_refuses_a_blob_in_mid_stream_is_quoted() {
    let put_blob = |mut chunks: tonic::Streaming<BlobChunk>| {
        async move {
            chunks.message().await?;
            Err(Status::resource_exhausted("no space left"))
        }
        .boxed()
    };
    let (addr, _dir) = FakeBlobs { put: Box::new(put_blob), ..FakeBlobs::default() }.serve();
    let error = put(&GrpcBlobService::new(peer(&addr)), &vec![0; 8 * 1024 * 1024]).await.unwrap_err();
    assert!(error.to_string().contains("no space left"), "{error}");
}

#[tokio::test]
async fn a_slow_writer_does_not_count_as_a_hanging_server() {
    const PATIENCE: Duration = Duration::from_secs(2);
    let (addr, _dir) = serve_with(&Store::memory(), &ServeOptions::default());
    let options = PeerOptions { idle_timeout: PATIENCE, ..PeerOptions::default() };
    let blobs = GrpcBlobService::new(Peer::from_addr(&addr, &options).unwrap());
    let mut writer = blobs.open_write().await;
    writer.write_all(&CONTENTS[..4]).await.unwrap();
    writer.flush().await.unwrap();
    tokio::time::sleep(PATIENCE * 3 / 2).await;
    writer.write_all(&CONTENTS[4..]).await.unwrap();
    assert_eq!(writer.close().await.unwrap(), digest());
}

#[tokio::test]
async fn something_that_speaks_no_http_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let addr = format!("grpc+unix://{}", path.display());
    let listener = {
        let _inside = RUNTIME.enter();
        UnixListener::bind(&path).unwrap()
    };
    // Nobody accepts: connections wait in the queue.
    let blobs = GrpcBlobService::new(impatient(&addr));
    assert_eq!(blobs.has(&digest()).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    // Every connection is closed at once.
    let closing = RUNTIME.spawn(async move { while listener.accept().await.is_ok() {} });
    blobs.has(&digest()).await.unwrap_err();
    put(&blobs, CONTENTS).await.unwrap_err();
    closing.abort();
    let _ = closing.await;
    // Nothing is there any more.
    std::fs::remove_file(&path).unwrap();
    let error = loop {
        // A connection from before may be found closed first.
        let error = blobs.has(&digest()).await.unwrap_err();
        if error.kind() == io::ErrorKind::NotConnected {
            break error;
        }
    };
    assert!(error.to_string().contains("No such file"), "{error}");
    let error = put(&blobs, CONTENTS).await.unwrap_err();
    assert!(error.to_string().contains("No such file"), "{error}");
    let error = GrpcDirectoryService::new(impatient(&addr)).put(leaf("x")).await.unwrap_err();
    assert!(error.to_string().contains("No such file"), "{error}");
}

/// How the tree under `root` comes out of such a server, by `get_recursive`.
async fn walk(
    root: &Directory,
    connect: fn(&str) -> Peer,
    get: impl Fn() -> Answers<EncodedDirectory> + Send + Sync + 'static,
) -> io::Result<Vec<Directory>> {
    let (addr, _dir) = FakeDirectories::getting(get).serve();
    GrpcDirectoryService::new(connect(&addr)).get_recursive(&root.digest()).try_collect().await
}

fn encoded(directories: &[&Directory]) -> Vec<EncodedDirectory> {
    directories.iter().map(|directory| message::encode(directory).unwrap()).collect()
}

/// A message that breaks a rule, maybe, and the digest of its bytes.
fn raw(message: &proto::Directory) -> (B3Digest, EncodedDirectory) {
    let message = EncodedDirectory::from(message);
    (B3Digest::of(message.as_bytes()), message)
}

#[tokio::test]
async fn a_tree_is_taken_in_its_order_only() {
    let (child, other) = (leaf("child"), leaf("other"));
    let root = above(&child);
    let walked = async |directories: &[&Directory]| {
        let messages = encoded(directories);
        walk(&root, peer, move || all(messages.clone())).await
    };
    assert_eq!(walked(&[&root, &child]).await.unwrap(), [root.clone(), child.clone()]);
    // Repeats are left out.
    assert_eq!(walked(&[&root, &root, &child, &child, &root]).await.unwrap(), [root.clone(), child.clone()]);
    assert_eq!(walked(&[]).await.unwrap(), []);
    for wrong in [&[&child, &root][..], &[&other], &[&root, &other], &[&root, &child, &other]] {
        let error = walked(wrong).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(error.to_string().contains("none before it refers to it"), "{error}");
    }
    let error = walked(&[&root]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    assert!(error.to_string().contains(&child.digest().to_string()), "{error}");
}

#[tokio::test]
async fn the_sizes_in_a_tree_must_be_right() {
    let child = leaf("child");
    let wrong = proto::Directory {
        directories: vec![proto::DirectoryEntry { size: 7, ..directory_entry("d", &child) }],
        ..Default::default()
    };
    let root = Directory::try_from(wrong).unwrap();
    let messages = encoded(&[&root, &child]);
    let error = walk(&root, peer, move || all(messages.clone())).await.unwrap_err();
    assert!(error.to_string().contains("should have size 7, but it has size 2"), "{error}");
    let twice = proto::Directory {
        directories: vec![
            proto::DirectoryEntry { size: 7, ..directory_entry("d", &child) },
            directory_entry("e", &child),
        ],
        ..Default::default()
    };
    let root = Directory::try_from(twice).unwrap();
    let messages = encoded(&[&root]);
    let error = walk(&root, peer, move || all(messages.clone())).await.unwrap_err();
    assert!(error.to_string().contains("is said to have size 7, and also size 2"), "{error}");
}

#[tokio::test]
async fn a_tree_with_too_many_bytes_is_refused() {
    let tree = too_large_tree();
    let messages = encoded(&tree.iter().collect::<Vec<_>>());
    let error = walk(&tree[0], peer, move || all(messages.clone())).await.map(drop).unwrap_err();
    assert!(error.to_string().contains("a tree has at most 1048576 directories and 268435456 bytes"), "{error}");
}

#[tokio::test]
async fn directories_for_ever_end() {
    let root = above(&leaf("child"));
    let message = encoded(&[&root])[0].clone();
    let error = walk(&root, impatient, move || for_ever(message.clone())).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    let new_ones = move || {
        let ever_new = stream::iter(0..).map(|at| Ok(encoded(&[&leaf(&format!("{at}"))])[0].clone()));
        all(encoded(&[&above(&leaf("child"))])).chain(ever_new).boxed()
    };
    assert_eq!(walk(&root, peer, new_ones).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    let message = encoded(&[&root])[0].clone();
    let error = walk(&root, impatient, move || hang_after(vec![message.clone()])).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
}

#[tokio::test]
async fn a_directory_that_does_not_match_its_digest_is_never_given() {
    let (asked, other) = (leaf("asked"), leaf("other"));
    let gotten = async |directories: &[&Directory]| {
        let messages = encoded(directories);
        let (addr, _dir) = FakeDirectories::getting(move || all(messages.clone())).serve();
        GrpcDirectoryService::new(peer(&addr)).get(&asked.digest()).await
    };
    assert_eq!(gotten(&[&asked]).await.unwrap(), Some(asked.clone()));
    assert_eq!(gotten(&[]).await.unwrap(), None);
    let error = gotten(&[&other]).await.unwrap_err();
    assert!(error.to_string().contains("has the digest"), "{error}");
    let error = gotten(&[&asked, &asked]).await.unwrap_err();
    assert!(error.to_string().contains("more than one directory"), "{error}");
}

#[tokio::test]
async fn an_invalid_directory_is_an_error_despite_its_digest() {
    let long = "n".repeat(256);
    let cases = [
        (proto::Directory { files: vec![file_entry("b"), file_entry("a")], ..Default::default() }, "files[1].name"),
        (proto::Directory { files: vec![file_entry("a"), file_entry("a")], ..Default::default() }, "two entries have"),
        (proto::Directory { files: vec![file_entry("..")], ..Default::default() }, "is reserved"),
        (proto::Directory { files: vec![file_entry(&long)], ..Default::default() }, "is longer than 255 bytes"),
        (
            proto::Directory { symlinks: vec![symlink_entry("l", &"t".repeat(4096))], ..Default::default() },
            "is longer than 4095 bytes",
        ),
        (
            proto::Directory {
                files: vec![proto::FileEntry { digest: vec![0; 31].into(), ..file_entry("a") }],
                ..Default::default()
            },
            "a digest has 32 bytes, not 31",
        ),
    ];
    for (message, rule) in cases {
        let (digest, message) = raw(&message);
        let messages = vec![message];
        let (addr, _dir) = FakeDirectories::getting(move || all(messages.clone())).serve();
        let directories = GrpcDirectoryService::new(peer(&addr));
        let error = directories.get(&digest).await.unwrap_err();
        assert!(error.to_string().contains(rule), "{error}");
        let walked: io::Result<Vec<_>> = directories.get_recursive(&digest).try_collect().await;
        assert!(walked.unwrap_err().to_string().contains(rule));
    }
}

#[tokio::test]
async fn a_server_that_names_another_root_has_not_taken_the_tree() {
    let put_tree = |mut messages: tonic::Streaming<EncodedDirectory>| {
        async move {
            while messages.message().await?.is_some() {}
            Ok(PutDirectoryResponse { root_digest: bytes(&B3Digest::EMPTY) })
        }
        .boxed()
    };
    let fake = FakeDirectories { put: Box::new(put_tree), ..FakeDirectories::getting(|| all(Vec::new())) };
    let (addr, _dir) = fake.serve();
    let error = GrpcDirectoryService::new(peer(&addr)).put(leaf("x")).await.unwrap_err();
    assert!(error.to_string().contains("is the root of the tree"), "{error}");
}

#[tokio::test]
async fn a_server_that_takes_no_directories_is_given_up() {
    let (addr, _dir) = FakeDirectories::getting(|| all(Vec::new())).serve();
    let directories = GrpcDirectoryService::new(impatient(&addr));
    let mut putter = directories.put_multiple_start();
    let wide = |at: usize| {
        Directory::try_from_iter(
            (0..2000).map(|entry| (super::numbered(entry), crate::testing::symlink(&format!("{at}")))),
        )
    };
    let mut put = 0;
    let error = loop {
        match putter.put(wide(put).unwrap()).await {
            Ok(()) => put += 1,
            Err(error) => break error,
        }
        assert!(put < 500);
    };
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert!(putter.put(leaf("x")).await.unwrap_err().to_string().contains("put it again"));
}
