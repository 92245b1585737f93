//! Targets for the store's decoders.

use std::{io::Write as _, path::Path};

use cofferdam_castore::{
    B3Digest, Directory, Node, PathComponent, Store, SymlinkTarget,
    archive::{Compression, Compressor, Limits, decompress},
    fuzzing, is_addr, nar,
    proto::{self, Entry, EntryExt as _},
    tar,
};
use futures::executor::block_on;
use prost::Message as _;
use tokio::io::AsyncWriteExt as _;

/// Small, so that an archive that unpacks to more is refused soon.
const LIMITS: Limits = Limits { entries: 1_000, bytes: 1 << 20 };

fn name(name: &str) -> PathComponent {
    name.try_into().expect("seeds have good names")
}

fn file(contents: &[u8], executable: bool) -> Node {
    Node::File { digest: B3Digest::of(contents), size: contents.len() as u64, executable }
}

fn link(target: &str) -> Node {
    Node::Symlink { target: SymlinkTarget::try_from(target).expect("seeds have good targets") }
}

/// A directory in a directory.
fn tree() -> [Directory; 2] {
    let entries = [(name("f"), file(b"contents", true)), (name("l"), link("../x")), (name("z"), file(b"", false))];
    let below = Directory::try_from_iter(entries).expect("seeds have unique names");
    let root = Directory::try_from_iter([(name("d"), below.to_node()), (name("e"), below.to_node())]);
    [below, root.expect("seeds have unique names")]
}

/// The same directory, with its blobs.
fn store() -> (Store, Node) {
    let store = Store::memory();
    let [below, root] = tree();
    let node = root.to_node();
    block_on(async {
        let mut writer = store.blobs.open_write().await;
        writer.write_all(b"contents").await.expect("memory has room");
        writer.close().await.expect("memory has room");
        for directory in [below, root] {
            store.directories.put(directory).await.expect("memory has room");
        }
    });
    (store, node)
}

/// A directory decodes to the same value through both entry points, and encodes to the same bytes again.
pub fn directory(bytes: &[u8]) -> bool {
    let decoded = Directory::decode(bytes);
    assert_eq!(fuzzing::message(bytes), decoded.as_ref().ok().cloned(), "the two decoders differ");
    if let Ok(message) = Entry::decode(bytes) {
        let again = |node: &Node| Entry::unnamed(node.clone()).try_into_unnamed();
        if let Ok(node) = message.clone().try_into_unnamed() {
            assert_eq!(again(&node).ok(), Some(node));
        } else if let Ok((name, node)) = message.try_into_named() {
            assert_eq!(Entry::named(name.clone(), node.clone()).try_into_named().ok(), Some((name, node)));
        }
    }
    let Ok(directory) = decoded else { return false };
    assert_eq!(directory.encode(), bytes, "what is taken is canonical");
    assert_eq!(directory.digest(), B3Digest::of(bytes));
    assert!(directory.size() >= directory.len() as u64);
    true
}

pub(crate) fn directory_seeds() -> Vec<Vec<u8>> {
    tree().iter().map(Directory::encode).chain([Vec::new()]).collect()
}

/// A chunk list has chunks, and none of them is empty.
pub fn chunk_list(bytes: &[u8]) -> bool {
    let Some(sizes) = fuzzing::chunk_list(bytes) else { return false };
    assert!(!sizes.is_empty() && sizes.iter().all(|size| *size > 0));
    true
}

pub(crate) fn chunk_list_seeds() -> Vec<Vec<u8>> {
    let chunk =
        |size| proto::stat_blob_response::ChunkMeta { digest: B3Digest::of(b"x").as_ref().to_vec().into(), size };
    let list = |chunks| proto::StatBlobResponse { chunks, ..Default::default() }.encode_to_vec();
    vec![list(vec![chunk(1)]), list(vec![chunk(200_000), chunk(300_000), chunk(7)])]
}

/// A stored chunk.
pub fn chunk(bytes: &[u8]) -> bool {
    fuzzing::chunk(bytes)
}

pub(crate) fn chunk_seeds() -> Vec<Vec<u8>> {
    [b"x".as_slice(), &[7; 100_000]].map(|contents| packed(contents, Compression::Zstd)).into()
}

/// A stored tree of directories. The first byte says whether the rest is compressed.
pub fn tree_object(bytes: &[u8]) -> bool {
    match bytes.split_first() {
        Some((0, packed)) => fuzzing::tree_object(packed),
        Some((_, plain)) => fuzzing::tree_object(&packed(plain, Compression::Zstd)),
        None => false,
    }
}

pub(crate) fn tree_object_seeds() -> Vec<Vec<u8>> {
    let [below, root] = tree();
    let mut frames = vec![1];
    for directory in [root, below] {
        let encoded = directory.encode();
        frames.extend(u32::try_from(encoded.len()).expect("seeds are small").to_be_bytes());
        frames.extend(encoded);
    }
    vec![frames, vec![1, 0, 0, 0, 0]]
}

/// An accepted NAR exports to the same bytes.
pub fn nar(bytes: &[u8]) -> bool {
    let store = Store::memory();
    let Ok(node) = nar::import(&store, bytes, LIMITS) else { return false };
    let mut again = Vec::new();
    nar::write(&store, &node, Path::new("nar"), &mut again, &|| false).expect("what was taken can be given");
    assert_eq!(again, bytes, "what is taken is canonical");
    true
}

pub(crate) fn nar_seeds() -> Vec<Vec<u8>> {
    let (store, node) = store();
    let nar = |node: &Node| {
        let mut nar = Vec::new();
        nar::write(&store, node, Path::new("nar"), &mut nar, &|| false).expect("memory has room");
        nar
    };
    vec![nar(&node), nar(&link("target")), nar(&file(b"contents", true))]
}

/// An accepted tar archive exports to one that imports as the same node. As a root it is the same.
pub fn tar(bytes: &[u8]) -> bool {
    let store = Store::memory();
    let root = decompress(bytes).ok().map(|plain| tar::import_root(&store, plain, LIMITS));
    let mut layers = tar::Layers::new(&store, LIMITS);
    for _ in 0..2 {
        if let Ok(plain) = decompress(bytes) {
            let _ = layers.apply(plain);
        }
    }
    let _ = layers.finish();
    let Ok(plain) = decompress(bytes) else { return false };
    // Only the import bounds the contents of a compressed archive.
    let Ok(node) = tar::import(&store, plain, LIMITS) else { return false };
    if let Some(Ok((root, lost))) = root {
        assert_eq!((root, lost.devices), (node.clone(), 0), "both read the same");
    }
    let mut again = Vec::new();
    tar::write(&store, &node, Path::new("tar"), &mut again, &|| false).expect("what was taken can be given");
    let limits = Limits { bytes: 1 << 30, ..LIMITS };
    assert_eq!(tar::import(&store, &*again, limits).expect("it is an archive of ours"), node);
    true
}

pub(crate) fn tar_seeds() -> Vec<Vec<u8>> {
    let (store, node) = store();
    let mut tar = Vec::new();
    tar::write(&store, &node, Path::new("tar"), &mut tar, &|| false).expect("memory has room");
    let packed = [Compression::Gzip, Compression::Zstd].map(|compression| packed(&tar, compression));
    packed.into_iter().chain([tar]).collect()
}

fn packed(contents: &[u8], compression: Compression) -> Vec<u8> {
    let mut compressor = Compressor::new(Vec::new(), compression).expect("memory has room");
    compressor.write_all(contents).expect("memory has room");
    compressor.finish().expect("memory has room")
}

/// A store's address.
pub fn address(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_ok_and(is_addr)
}

pub(crate) fn address_seeds() -> Vec<Vec<u8>> {
    let addresses = [
        "memory://",
        "file:///var/blobs",
        "redb:///var/directories.redb",
        "objectstore+file:///var/store",
        "objectstore+s3://bucket/path?region=eu-north-1&endpoint=http://localhost:1&allow_http=true",
        "objectstore+gs://bucket/path",
        "objectstore+https://host:1/path",
        "grpc+http://[::1]:8000?wait-connect=0",
        "grpc+unix:///run/store.sock",
        "cache:///var/cache?size=20G&write=back&remote=grpc+https://host",
    ];
    addresses.map(|address| address.as_bytes().to_vec()).into()
}

/// An accepted digest, in binary or text, prints as the same bytes.
pub fn digest(bytes: &[u8]) -> bool {
    if let Ok(digest) = B3Digest::try_from(bytes) {
        assert_eq!(digest.as_ref(), bytes);
        return true;
    }
    let Ok(Ok(digest)) = std::str::from_utf8(bytes).map(str::parse::<B3Digest>) else { return false };
    assert_eq!(digest.to_string().as_bytes(), bytes, "what is taken is canonical");
    true
}

pub(crate) fn digest_seeds() -> Vec<Vec<u8>> {
    vec![B3Digest::EMPTY.to_string().into_bytes(), B3Digest::EMPTY.as_ref().to_vec()]
}
