//! The layout, as other programs see it, and what happens when it is broken. What every service must do is in the
//! conformance suites.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, SeekFrom, Write as _},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use futures::{FutureExt as _, TryStreamExt as _};
use object_store::{
    memory::InMemory,
    throttle::{ThrottleConfig, ThrottledStore},
};
use prost::Message as _;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _};

use super::{
    chunks::{MAX_CHUNK_BYTES, MAX_READ_CHUNK_BYTES},
    testing::S3Server,
    *,
};
use crate::{
    BlobService, Directory, Node, Store, export, import,
    proto::{StatBlobResponse, stat_blob_response::ChunkMeta},
    testing::{file, name, splitmix, symlink, too_large_tree},
};

/// A store of plain objects.
struct Fixture {
    dir: TempDir,
    store: Store,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let addr = format!("objectstore+file://{}", dir.path().display());
        Self { store: Store::from_addrs(&addr, &addr).unwrap(), dir }
    }

    /// The file of an object, in a directory that is there.
    fn path(&self, kind: &str, digest: &B3Digest) -> PathBuf {
        let hex = digest.to_hex();
        let path = self.dir.path().join(kind).join("b3").join(&hex[..4]).join(&hex);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }

    fn put_chunk(&self, digest: &B3Digest, contents: &[u8]) {
        fs::write(self.path("chunks", digest), zstd::encode_all(contents, 19).unwrap()).unwrap();
    }

    fn put_list(&self, digest: &B3Digest, chunks: &[(B3Digest, u64)]) {
        let chunks =
            chunks.iter().map(|(digest, size)| ChunkMeta { digest: digest.as_slice().to_vec().into(), size: *size });
        let list = StatBlobResponse { chunks: chunks.collect(), ..Default::default() };
        fs::write(self.path("blobs", digest), list.encode_to_vec()).unwrap();
    }

    fn put_tree(&self, root: &B3Digest, messages: &[Vec<u8>]) {
        let framed: Vec<u8> = messages
            .iter()
            .flat_map(|message| [&(message.len() as u32).to_be_bytes(), message.as_slice()].concat())
            .collect();
        fs::write(self.path("dirs", root), zstd::encode_all(&framed[..], 1).unwrap()).unwrap();
    }

    async fn read(&self, digest: &B3Digest) -> io::Result<Vec<u8>> {
        let mut contents = Vec::new();
        let Some(mut reader) = self.store.blobs.open_read(digest).await? else {
            return Err(io::ErrorKind::NotFound.into());
        };
        reader.read_to_end(&mut contents).await?;
        Ok(contents)
    }

    /// The error that both ways of reading a blob whole give, which is that it is damaged.
    async fn refused(&self, digest: &B3Digest) -> String {
        let error = self.read(digest).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
        assert_eq!(self.store.blobs.open_file(digest).await.unwrap_err().to_string(), error.to_string());
        error.to_string()
    }

    async fn walk(&self, root: &B3Digest) -> io::Result<Vec<Directory>> {
        self.store.directories.get_recursive(root).try_collect().await
    }

    async fn refused_tree(&self, root: &B3Digest) -> String {
        let error = self.walk(root).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
        error.to_string()
    }
}

async fn write(blobs: &dyn BlobService, contents: &[u8]) -> B3Digest {
    let mut writer = blobs.open_write().await;
    // Not the sizes of chunks.
    for piece in contents.chunks(100_003) {
        writer.write_all(piece).await.unwrap();
    }
    writer.close().await.unwrap()
}

/// Every file below, by its path.
fn objects_below(dir: &std::path::Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![dir.to_owned()];
    while let Some(next) = waiting.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                waiting.push(path);
            } else {
                found.insert(path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// The chunks of `splitmix(2_000_003)`, by the program of another version of FastCDC, the one that snix has.
const SPLITMIX_CHUNKS: [(&str, u64); 6] = [
    ("a3f894d77cbba9172cb8aae8c1827b0227d6c436fc7aef2335b40e534acc2ec5", 263_641),
    ("7b57942a0c869b50d4108ccefc36da974f0d6d08476285276f292b0c9e44c14d", 459_576),
    ("011656bebdc7520ea290fc6220581dd6017b2080b21a1825c7d4fdc487484251", 320_113),
    ("5597b3d5198d8376ce6dd92b698030faed9a672f12ab50a0aedf6409e57da93c", 418_623),
    ("e0542ff86909ec6a4332f71ef1ea64000bc02615de586b8f5937355746464000", 266_975),
    ("1607e5aa740991f13af2e2353c195ca7d5ae6bcf5291193d1edfb8122e7a0c0d", 271_075),
];
const SPLITMIX_BLOB: &str = "3604da189186f0978907270dcbfbe2aac4a41b876886a4f71a5c35d6f2385ef5";

fn from_hex(hex: &str) -> B3Digest {
    data_encoding::HEXLOWER.decode(hex.as_bytes()).unwrap().as_slice().try_into().unwrap()
}

#[tokio::test]
async fn a_blob_is_cut_and_laid_out_as_snix_does_it() {
    let fixture = Fixture::new();
    let contents = splitmix(2_000_003);
    let digest = write(&*fixture.store.blobs, &contents).await;
    assert_eq!(digest.to_hex(), SPLITMIX_BLOB);
    let mut objects = objects_below(fixture.dir.path());
    // The message, written by hand.
    let list = objects.remove(&format!("blobs/b3/{}/{SPLITMIX_BLOB}", &SPLITMIX_BLOB[..4])).unwrap();
    let mut expected = Vec::new();
    for (hex, size) in SPLITMIX_CHUNKS {
        let varint = [(size & 127) as u8 | 128, (size >> 7 & 127) as u8 | 128, (size >> 14) as u8];
        expected.extend([b"\x12\x26\x0a\x20", from_hex(hex).as_slice(), b"\x10", &varint].concat());
    }
    assert_eq!(list, expected);
    let mut rest = &contents[..];
    for (hex, size) in SPLITMIX_CHUNKS {
        let chunk = objects.remove(&format!("chunks/b3/{}/{hex}", &hex[..4])).unwrap();
        let (expected, after) = rest.split_at(size as usize);
        assert!(zstd::decode_all(&chunk[..]).unwrap() == expected);
        rest = after;
    }
    assert_eq!(objects.keys().next(), None);
}

#[tokio::test]
async fn equal_chunks_are_stored_once() {
    let fixture = Fixture::new();
    let digest = write(&*fixture.store.blobs, &vec![0; 1_200_001]).await;
    assert_eq!(digest.to_hex(), "d291b5c6bb5eb97e6dae5b01eb04f1576084bb2728683cfe6bc4e68251a5c788");
    let objects = objects_below(fixture.dir.path());
    let chunks: Vec<_> = objects.keys().filter(|path| path.starts_with("chunks/")).collect();
    let whole = "chunks/b3/934d/934d6b7aea5a339a9e858430cca7ac455d3537e70fd2b302931cc93b25e1df9a";
    let last = "chunks/b3/22db/22db2f518a16115f0f239009c2ed6720f9887a5578280ee7358569b080f48852";
    assert_eq!(chunks, [last, whole]);
    assert_eq!(fixture.read(&digest).await.unwrap(), vec![0; 1_200_001]);
}

#[tokio::test]
async fn a_small_blob_is_one_object_and_the_empty_one_none() {
    let fixture = Fixture::new();
    let digest = write(&*fixture.store.blobs, b"Hello World").await;
    write(&*fixture.store.blobs, b"").await;
    let hex = "41f8394111eb713a22165c46c90ab8f0fd9399c92028fd6d288944b23ff5bf76";
    assert_eq!(digest.to_hex(), hex);
    let objects = objects_below(fixture.dir.path());
    assert_eq!(objects.keys().collect::<Vec<_>>(), [&format!("chunks/b3/41f8/{hex}")]);
    assert_eq!(zstd::decode_all(&objects.values().next().unwrap()[..]).unwrap(), b"Hello World");
}

#[tokio::test]
async fn what_others_have_written_is_read() {
    let fixture = Fixture::new();
    // snix writes an empty list for a blob of one chunk, and for the empty blob too.
    let one = B3Digest::of(b"one chunk");
    fixture.put_list(&one, &[]);
    fixture.put_list(&B3Digest::EMPTY, &[]);
    fixture.put_chunk(&one, b"one chunk");
    assert_eq!(fixture.read(&one).await.unwrap(), b"one chunk");
    assert_eq!(fixture.read(&B3Digest::EMPTY).await.unwrap(), b"");
    // Other parameters, some bao, and chunks that come several times.
    let (small, large) = (b"abc", splitmix(3 * MAX_CHUNK_BYTES));
    let blob = [&small[..], &large, small, small].concat();
    let [small_digest, large_digest, digest] = [small, &large[..], &blob[..]].map(B3Digest::of);
    fixture.put_chunk(&small_digest, small);
    fixture.put_chunk(&large_digest, &large);
    let small = (small_digest, 3);
    fixture.put_list(&digest, &[small, (large_digest, large.len() as u64), small, small]);
    let path = fixture.path("blobs", &digest);
    fs::write(&path, [&fs::read(&path).unwrap()[..], b"\x1a\x03bao"].concat()).unwrap();
    assert!(fixture.read(&digest).await.unwrap() == blob);
    assert!(fixture.store.blobs.has(&digest).await.unwrap());
}

#[tokio::test]
async fn readers_seek_to_any_chunk_verified() {
    let fixture = Fixture::new();
    let contents = splitmix(2_000_003);
    let digest = write(&*fixture.store.blobs, &contents).await;
    let mut reader = fixture.store.blobs.open_read(&digest).await.unwrap().unwrap();
    for position in [263_640, 263_641, 0, 1_999_999, 723_000, 723_216, 2_000_003] {
        reader.seek(SeekFrom::Start(position)).await.unwrap();
        let mut piece = Vec::new();
        (&mut reader).take(50_000).read_to_end(&mut piece).await.unwrap();
        let start = position as usize;
        assert!(piece == contents[start..contents.len().min(start + 50_000)], "{position}");
    }
    assert!(reader.seek(SeekFrom::Current(-2_000_004)).await.is_err());
}

#[tokio::test]
async fn a_tree_is_one_object_root_first() {
    let fixture = Fixture::new();
    let leaf = Directory::try_from_iter([(name("f"), file(b"x", true))]).unwrap();
    let empty = Directory::new();
    let middle = Directory::try_from_iter([(name("leaf"), leaf.to_node())]).unwrap();
    let nodes = [("a", &middle), ("b", &empty), ("c", &leaf)].map(|(at, child)| (name(at), child.to_node()));
    let root = Directory::try_from_iter(nodes).unwrap();
    let mut putter = fixture.store.directories.put_multiple_start();
    for directory in [&leaf, &middle, &empty, &root] {
        putter.put(directory.clone()).await.unwrap();
    }
    putter.close().await.unwrap();
    let objects = objects_below(fixture.dir.path());
    let hex = root.digest().to_hex();
    assert_eq!(objects.keys().collect::<Vec<_>>(), [&format!("dirs/b3/{}/{hex}", &hex[..4])]);
    // Breadth first, each once, after its length in 32 bits, big-endian.
    let expected: Vec<u8> = [&root, &middle, &empty, &leaf]
        .into_iter()
        .flat_map(|directory| [&(directory.encode().len() as u32).to_be_bytes()[..], &directory.encode()].concat())
        .collect();
    assert_eq!(zstd::decode_all(&objects.values().next().unwrap()[..]).unwrap(), expected);
}

#[tokio::test]
async fn a_directory_is_put_once_those_in_it_are_there() {
    let fixture = Fixture::new();
    let leaf = Directory::try_from_iter([(name("l"), symlink("t"))]).unwrap();
    let middle = Directory::try_from_iter([(name("leaf"), leaf.to_node())]).unwrap();
    let root = Directory::try_from_iter([(name("a"), middle.to_node()), (name("b"), middle.to_node())]).unwrap();
    let directories = &fixture.store.directories;
    let error = directories.put(root.clone()).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    assert!(error.to_string().ends_with("put the whole tree"), "{error}");
    for directory in [&leaf, &middle, &root] {
        directories.put(directory.clone()).await.unwrap();
    }
    assert_eq!(fixture.walk(&root.digest()).await.unwrap(), [root, middle, leaf]);
}

#[tokio::test]
async fn a_tree_of_any_order_is_read_up_to_its_end() {
    let fixture = Fixture::new();
    let leaf = Directory::try_from_iter([(name("l"), symlink("t"))]).unwrap();
    let middle = Directory::try_from_iter([(name("leaf"), leaf.to_node())]).unwrap();
    let root = Directory::try_from_iter([(name("a"), middle.to_node()), (name("b"), leaf.to_node())]).unwrap();
    let [root_bytes, middle_bytes, leaf_bytes] = [&root, &middle, &leaf].map(Directory::encode);
    fixture.put_tree(&root.digest(), &[root_bytes.clone(), leaf_bytes, middle_bytes, root_bytes]);
    assert_eq!(fixture.walk(&root.digest()).await.unwrap(), [root, leaf, middle]);
}

#[tokio::test]
async fn damaged_chunks_are_refused() {
    let fixture = Fixture::new();
    let digest = B3Digest::of(b"contents");
    fixture.put_chunk(&digest, b"CONTENTS");
    assert!(fixture.refused(&digest).await.contains("has the digest"));
    fs::write(fixture.path("chunks", &digest), b"contents").unwrap();
    assert!(fixture.refused(&digest).await.contains("can't be decompressed"));
    let whole = zstd::encode_all(&b"contents"[..], 3).unwrap();
    fs::write(fixture.path("chunks", &digest), &whole[..whole.len() - 1]).unwrap();
    assert!(fixture.refused(&digest).await.contains("can't be decompressed"));
}

#[tokio::test]
async fn a_chunk_that_never_ends_is_refused() {
    let fixture = Fixture::new();
    let mut bomb = zstd::Encoder::new(Vec::new(), 19).unwrap();
    for _ in 0..2 * MAX_READ_CHUNK_BYTES / (1 << 20) {
        bomb.write_all(&vec![0; 1 << 20]).unwrap();
    }
    let digest = B3Digest::of(b"bomb");
    fs::write(fixture.path("chunks", &digest), bomb.finish().unwrap()).unwrap();
    assert!(fixture.refused(&digest).await.contains("is larger than 16777216 bytes"));
    // Without any compression.
    let file = fs::File::create(fixture.path("chunks", &digest)).unwrap();
    file.set_len(1 << 40).unwrap();
    assert!(fixture.refused(&digest).await.contains("is larger than"));
}

#[tokio::test]
async fn lists_that_lie_are_refused() {
    let fixture = Fixture::new();
    let parts: Vec<Vec<u8>> = (0..20).map(|at| vec![at; 10]).collect();
    let blob = B3Digest::of(&parts.concat());
    let chunks: Vec<_> = parts.iter().map(|part| (B3Digest::of(part), 10)).collect();
    for part in &parts {
        fixture.put_chunk(&B3Digest::of(part), part);
    }
    fixture.put_list(&blob, &chunks);
    assert_eq!(fixture.read(&blob).await.unwrap(), parts.concat());

    for size in [9, 11, MAX_READ_CHUNK_BYTES as u64] {
        let mut wrong = chunks.clone();
        wrong[3].1 = size;
        fixture.put_list(&blob, &wrong);
        assert!(fixture.refused(&blob).await.contains(&format!("has 10 bytes, not {size} as listed")));
    }
    for size in [0, MAX_READ_CHUNK_BYTES as u64 + 1, u64::MAX] {
        let mut wrong = chunks.clone();
        wrong[3].1 = size;
        fixture.put_list(&blob, &wrong);
        assert!(fixture.refused(&blob).await.contains(&format!("chunks[3] of the blob {blob}: size: {size}")));
    }
    let mut missing = chunks.clone();
    missing[5].0 = B3Digest::of(b"missing");
    fixture.put_list(&blob, &missing);
    assert!(fixture.refused(&blob).await.contains("is missing"));

    for list in [&chunks[1..], &chunks[..19], &[chunks[0], chunks[0]], &chunks[..1]] {
        fixture.put_list(&blob, list);
        assert!(fixture.refused(&blob).await.contains("give the digest"));
    }
    let path = fixture.path("blobs", &blob);
    for garbage in [&b"\xff"[..], b"\x12\x03\x0a\x01a", b"\x12\x7f", b"\x10\x00"] {
        fs::write(&path, garbage).unwrap();
        assert!(fixture.refused(&blob).await.contains("chunks[0] of the blob"), "{garbage:?}");
    }
    fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    assert!(fixture.refused(&blob).await.contains("is larger than"));
}

#[tokio::test]
async fn a_list_that_lies_gives_neither_the_end_nor_a_piece() {
    let fixture = Fixture::new();
    let blob = B3Digest::of(b"something else");
    let parts = [b"first", b"other", b"third"];
    for part in parts {
        fixture.put_chunk(&B3Digest::of(part), part);
    }
    fixture.put_list(&blob, &parts.map(|part| (B3Digest::of(part), 5)));
    let mut reader = fixture.store.blobs.open_read(&blob).await.unwrap().unwrap();
    let mut contents = Vec::new();
    reader.read_to_end(&mut contents).await.unwrap_err();
    assert_eq!(contents, b"firstother");
    for position in [5, 14, 0] {
        reader.seek(SeekFrom::Start(position)).await.unwrap();
        let mut piece = Vec::new();
        reader.read_to_end(&mut piece).await.unwrap_err();
        assert!(position == 0 || piece.is_empty());
    }
}

#[tokio::test]
async fn damaged_trees_are_refused() {
    let fixture = Fixture::new();
    let leaf = Directory::try_from_iter([(name("l"), symlink("t"))]).unwrap();
    let stranger = Directory::try_from_iter([(name("s"), symlink("t"))]).unwrap();
    let root = Directory::try_from_iter([(name("leaf"), leaf.to_node())]).unwrap();
    let (digest, root, leaf) = (root.digest(), root.encode(), leaf.encode());
    for messages in
        [&[leaf.clone(), root.clone()][..], &[root.clone(), stranger.encode()], &[root.clone(), root.clone()]]
    {
        fixture.put_tree(&digest, messages);
        assert!(fixture.refused_tree(&digest).await.contains("which is out of place"));
    }
    fixture.put_tree(&digest, &[]);
    let error = fixture.walk(&digest).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);

    let put_raw =
        |framed: &[u8]| fs::write(fixture.path("dirs", &digest), zstd::encode_all(framed, 3).unwrap()).unwrap();
    put_raw(b"\0\0");
    assert!(fixture.refused_tree(&digest).await.contains("ends within a length"));
    put_raw(b"\0\0\0\x09abc");
    assert!(fixture.refused_tree(&digest).await.contains("ends within a directory"));
    put_raw(b"\xff\xff\xff\xffabc");
    assert!(fixture.refused_tree(&digest).await.contains("has a directory of 4294967295 bytes"));
    fs::write(fixture.path("dirs", &digest), b"no frame at all").unwrap();
    assert!(fixture.refused_tree(&digest).await.contains("can't be decompressed"));

    // It has the right digest, and a name of 256 bytes.
    let link = [b"\x0a\x80\x02".as_slice(), &[b'a'; 256], b"\x12\x01t"].concat();
    let long = [&[0x1a, link.len() as u8 & 127 | 128, (link.len() >> 7) as u8], &link[..]].concat();
    let digest = B3Digest::of(&long);
    fixture.put_tree(&digest, &[long]);
    fixture.refused_tree(&digest).await;
}

#[tokio::test]
async fn a_tree_with_too_many_bytes_is_neither_got_nor_put() {
    let fixture = Fixture::new();
    let tree = too_large_tree();
    let root = tree[0].digest();
    let mut putter = fixture.store.directories.put_multiple_start();
    for directory in tree.iter().rev() {
        putter.put(directory.clone()).await.unwrap();
    }
    let rule = "a tree has at most 1048576 directories and 268435456 bytes";
    let error = putter.close().await.unwrap_err();
    assert!(error.to_string().contains(rule), "{error}");
    assert!(objects_below(fixture.dir.path()).is_empty());

    let mut object = zstd::Encoder::new(fs::File::create(fixture.path("dirs", &root)).unwrap(), 1).unwrap();
    for encoded in tree.iter().map(Directory::encode) {
        object.write_all(&(encoded.len() as u32).to_be_bytes()).unwrap();
        object.write_all(&encoded).unwrap();
    }
    object.finish().unwrap();
    let error = fixture.walk(&root).await.map(drop).unwrap_err();
    assert!(error.to_string().contains(rule), "{error}");
}

#[tokio::test]
async fn a_directory_of_a_hundred_thousand_entries_comes_back() {
    let fixture = Fixture::new();
    let node = file(b"", false);
    let nodes = (0..100_000).map(|at| (name(&format!("{at:05}")), node.clone()));
    let directory = Directory::try_from_iter(nodes).unwrap();
    let digest = fixture.store.directories.put(directory).await.unwrap();
    assert_eq!(fixture.store.directories.get(&digest).await.unwrap().unwrap().len(), 100_000);
}

#[tokio::test]
async fn a_writer_waits_for_a_slow_store_with_few_chunks_in_memory() {
    let config = ThrottleConfig { wait_put_per_call: Duration::from_secs(3600), ..ThrottleConfig::default() };
    let store = Arc::new(ThrottledStore::new(InMemory::new(), config));
    let service = ObjectStoreBlobService::new(Objects { store, base: "".into(), local: None }.into());
    let mut writer = service.open_write().await;
    let piece = vec![0; MAX_CHUNK_BYTES];
    let mut taken = 0;
    while let Some(count) = writer.write(&piece).now_or_never() {
        taken += count.unwrap();
        assert!(taken <= (CONCURRENT_REQUESTS + 1) * MAX_CHUNK_BYTES);
    }
    assert_eq!(taken, (CONCURRENT_REQUESTS + 1) * MAX_CHUNK_BYTES);
}

#[test]
fn a_tree_goes_through_a_server_and_back() {
    let server = S3Server::start();
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir_all(source.join("a/b")).unwrap();
    fs::write(source.join("a/b/large"), splitmix(2_000_003)).unwrap();
    fs::write(source.join("a/small"), "small").unwrap();
    std::os::unix::fs::symlink("a/small", source.join("link")).unwrap();
    let open = || Store::from_addrs(&server.address("p"), &server.address("p")).unwrap();
    let node = import::import_path(&open(), &source).unwrap();
    assert!(matches!(node, Node::Directory { size: 10, .. }));
    let target = dir.path().join("target");
    export::export(&open(), &node, &target).unwrap();
    assert_eq!(objects_below(&source), objects_below(&target));
}
