//! Transfers over gRPC, against a raw copy, a redb file, and a cache.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use cofferdam_castore::{
    B3Digest, Directory, Node, Store, SymlinkTarget, WritePolicy,
    blobservice::{BlobService, CacheBlobService},
    directoryservice::DirectoryService,
    grpc::{ServeOptions, serve},
};
use cofferdam_rpc::Listener;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    runtime::Runtime,
};
use tokio_util::sync::CancellationToken;

use super::{
    measure::{LARGE_ROUNDS, ROUNDS, Series, report},
    store::local_store,
    tree::noise,
};

const PUT_MIB: u64 = 1024;

const PIECE_BYTES: usize = 256 * 1024;

const DIRECTORIES_A_DIRECTORY: usize = 100;

const CACHE_FILES: usize = 2_000;
const CACHE_FILE_BYTES: usize = 13_000;
const CACHE_LARGE_BYTES: usize = 256 * 1024 * 1024;

/// Readers of a remote store.
const CONCURRENT_READS: usize = 8;

/// A store that is served on a port of its own, and a client of it.
struct Served {
    runtime: Runtime,
    client: Store,
}

impl Served {
    fn new(store: &Store) -> Result<Self> {
        let runtime = Runtime::new()?;
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
        let addr = format!("grpc+http://{}", listener.local_addr()?);
        let store = store.clone();
        runtime.spawn(async move {
            let never = CancellationToken::new();
            serve(&store, vec![Listener::Tcp(listener)], &ServeOptions::default(), never).await
        });
        Ok(Self { runtime, client: Store::from_addrs(&addr, &addr)? })
    }
}

/// The same bytes for both sides: `PUT_MIB` pieces. All pieces of all rounds differ.
fn pieces(round: usize) -> impl FnMut(u64) -> Vec<u8> {
    let mut piece = noise(1024 * 1024);
    move |number| {
        piece[..8].copy_from_slice(&number.to_le_bytes());
        piece[8..16].copy_from_slice(&(round as u64).to_le_bytes());
        piece.clone()
    }
}

pub(crate) fn grpc(dir: &TempDir) -> Result<()> {
    let [mut put, mut get, mut raw_put, mut raw_get] = [(); 4].map(|()| Series::default());
    for round in 0..LARGE_ROUNDS {
        let state = dir.path().join("state");
        let served = Served::new(&local_store(&state)?)?;
        let blobs = &served.client.blobs;
        let digest: B3Digest = put.work(|| {
            served.runtime.block_on(async {
                let (mut writer, mut piece) = (blobs.open_write().await, pieces(round));
                for number in 0..PUT_MIB {
                    writer.write_all(&piece(number)).await?;
                }
                Ok(writer.close().await?)
            })
        })?;
        get.work(|| served.runtime.block_on(async { read(&**blobs, &digest).await }))?;
        drop(served);
        fs::remove_dir_all(state)?;

        let path = dir.path().join("raw");
        raw_put.work(|| send_raw(&path, pieces(round)))?;
        raw_get.work(|| receive_raw(&path))?;
        fs::remove_file(path)?;
    }
    report("put 1 GiB over gRPC : TCP to a file", &put, &raw_put, "");
    report("get 1 GiB over gRPC : TCP from a file", &get, &raw_get, "");
    Ok(())
}

/// Reads a blob to its end, and returns its size.
async fn read(blobs: &dyn BlobService, digest: &B3Digest) -> Result<u64> {
    let mut reader = blobs.open_read(digest).await?.with_context(|| format!("the blob {digest} is lost"))?;
    let (mut buffer, mut bytes) = (vec![0; PIECE_BYTES], 0);
    loop {
        match reader.read(&mut buffer).await? {
            0 => return Ok(bytes),
            read => bytes += read as u64,
        }
    }
}

fn send_raw(path: &Path, mut piece: impl FnMut(u64) -> Vec<u8>) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let addr = listener.local_addr()?;
    let path = path.to_owned();
    let receiver = thread::spawn(move || -> io::Result<()> {
        let (mut from, _) = listener.accept()?;
        let (mut file, mut buffer) = (File::create(path)?, vec![0; PIECE_BYTES]);
        loop {
            match from.read(&mut buffer)? {
                0 => return file.sync_all(),
                read => file.write_all(&buffer[..read])?,
            }
        }
    });
    let mut to = TcpStream::connect(addr)?;
    for number in 0..PUT_MIB {
        to.write_all(&piece(number))?;
    }
    drop(to);
    Ok(receiver.join().map_err(|_| anyhow!("the receiver has panicked"))??)
}

fn receive_raw(path: &Path) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let addr = listener.local_addr()?;
    let path = path.to_owned();
    let sender = thread::spawn(move || -> io::Result<()> {
        let (mut to, _) = listener.accept()?;
        let (mut file, mut buffer) = (File::open(path)?, vec![0; PIECE_BYTES]);
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(()),
                read => to.write_all(&buffer[..read])?,
            }
        }
    });
    let (mut from, mut buffer) = (TcpStream::connect(addr)?, vec![0; PIECE_BYTES]);
    while from.read(&mut buffer)? > 0 {}
    Ok(sender.join().map_err(|_| anyhow!("the sender has panicked"))??)
}

pub(crate) fn directories(dir: &TempDir) -> Result<()> {
    let store = local_store(dir.path())?;
    let served = Served::new(&store)?;
    let root = served.runtime.block_on(put_directories(&*store.directories))?;
    let (mut ours, mut peer) = (Series::default(), Series::default());
    for _ in 0..ROUNDS {
        for (series, directories) in [(&mut ours, &served.client.directories), (&mut peer, &store.directories)] {
            let count = series.work(|| {
                let all = directories.get_recursive(&root).try_fold(0, async |count, _| Ok(count + 1));
                Ok(served.runtime.block_on(all)?)
            })?;
            ensure!(count == 1 + DIRECTORIES_A_DIRECTORY * (1 + DIRECTORIES_A_DIRECTORY), "{count} directories came");
        }
    }
    report("get 10,000 directories over gRPC : redb", &ours, &peer, "");
    Ok(())
}

/// A tree of two levels, in which no two directories are the same.
async fn put_directories(to: &dyn DirectoryService) -> Result<B3Digest> {
    let mut putter = to.put_multiple_start();
    let mut root = Directory::new();
    for one in 0..DIRECTORIES_A_DIRECTORY {
        let mut middle = Directory::new();
        for other in 0..DIRECTORIES_A_DIRECTORY {
            let target = SymlinkTarget::try_from(format!("{one}/{other}").into_bytes())?;
            let leaf = Directory::try_from_iter([("link".try_into()?, Node::Symlink { target })])?;
            middle.add(format!("{other:03}").as_str().try_into()?, leaf.to_node())?;
            putter.put(leaf).await?;
        }
        root.add(format!("{one:03}").as_str().try_into()?, middle.to_node())?;
        putter.put(middle).await?;
    }
    putter.put(root).await?;
    Ok(putter.close().await?)
}

pub(crate) fn cache(dir: &TempDir) -> Result<()> {
    let remote_dir = dir.path().join("remote");
    let remote = local_store(&remote_dir)?;
    let served = Served::new(&remote)?;
    let contents = noise(CACHE_LARGE_BYTES);
    let small = contents.chunks_exact(CACHE_FILE_BYTES).take(CACHE_FILES);
    let digests = served.runtime.block_on(async {
        let mut digests = Vec::new();
        for contents in small.chain([contents.as_slice()]) {
            let mut writer = remote.blobs.open_write().await;
            writer.write_all(contents).await?;
            digests.push(writer.close().await?);
        }
        remote.blobs.commit().await?;
        anyhow::Ok(digests)
    })?;
    drop(contents);
    let [mut cold, mut warm, mut direct, mut plain] = [(); 4].map(|()| Series::default());
    for _ in 0..LARGE_ROUNDS {
        let cache_dir = dir.path().join("cache");
        let open = || CacheBlobService::open(&cache_dir, u64::MAX, WritePolicy::Through, served.client.blobs.clone());
        let cache = open()?;
        cold.work(|| served.runtime.block_on(read_all(&cache, &digests)))?;
        direct.work(|| served.runtime.block_on(read_all(&*served.client.blobs, &digests)))?;
        // What was downloaded is written to the disk meanwhile, and would be for the first round of reads.
        nix::unistd::sync();
        for _ in 0..ROUNDS {
            warm.work(|| served.runtime.block_on(read_all(&cache, &digests)))?;
            plain.work(|| digests.iter().try_for_each(|digest| read_plain(&remote_dir, digest)))?;
        }
        drop(cache);
        fs::remove_dir_all(cache_dir)?;
    }
    report("read 2,001 blobs cold : without cache", &cold, &direct, "");
    report("read 2,001 blobs warm : plain files", &warm, &plain, "");
    Ok(())
}

async fn read_all(blobs: &dyn BlobService, digests: &[B3Digest]) -> Result<()> {
    let reads = digests.iter().map(|digest| read(blobs, digest));
    stream::iter(reads).buffer_unordered(CONCURRENT_READS).try_for_each(async |_| Ok(())).await
}

fn read_plain(remote_dir: &Path, digest: &B3Digest) -> Result<()> {
    let hex = digest.to_hex();
    let path: PathBuf = remote_dir.join("blobs/b3").join(&hex[..2]).join(hex);
    let (mut file, mut buffer) = (File::open(path)?, vec![0; PIECE_BYTES]);
    while file.read(&mut buffer)? > 0 {}
    Ok(())
}
