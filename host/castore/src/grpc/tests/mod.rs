//! Peers that lie, hang, die or never end, on either side; and the ways to reach one.

mod clients;
mod fakes;
mod servers;
mod sizes;
mod transports;

use std::{io, time::Duration};

use bytes::Bytes;
use tokio::io::AsyncWriteExt as _;

use super::{Peer, PeerOptions};
use crate::{
    B3Digest, BlobService, Directory, PathComponent,
    proto::{BlobChunk, DirectoryEntry, FileEntry, GetDirectoryRequest, SymlinkEntry, get_directory_request::ByWhat},
    testing::{name, symlink},
};

/// How long silent peers are waited for.
const IDLE_TIMEOUT: Duration = Duration::from_millis(400);

/// A client that is soon at the end of its patience.
fn impatient(addr: &str) -> Peer {
    let options = PeerOptions { idle_timeout: IDLE_TIMEOUT, connect_timeout: IDLE_TIMEOUT, ..PeerOptions::default() };
    Peer::from_addr(addr, &options).unwrap()
}

fn leaf(target: &str) -> Directory {
    Directory::try_from_iter([(name("l"), symlink(target))]).unwrap()
}

fn above(child: &Directory) -> Directory {
    Directory::try_from_iter([(name("d"), child.to_node())]).unwrap()
}

fn chunk(data: impl Into<Bytes>) -> BlobChunk {
    BlobChunk { data: data.into() }
}

fn bytes(digest: &B3Digest) -> Bytes {
    digest.as_slice().to_vec().into()
}

fn get(digest: impl Into<Bytes>, recursive: bool) -> GetDirectoryRequest {
    GetDirectoryRequest { by_what: Some(ByWhat::Digest(digest.into())), recursive }
}

fn directory_entry(name: &str, child: &Directory) -> DirectoryEntry {
    DirectoryEntry { name: name.to_owned().into(), digest: bytes(&child.digest()), size: child.size() }
}

fn file_entry(name: &str) -> FileEntry {
    FileEntry { name: name.to_owned().into(), digest: vec![0; 32].into(), ..Default::default() }
}

fn symlink_entry(name: &str, target: &str) -> SymlinkEntry {
    SymlinkEntry { name: name.to_owned().into(), target: target.to_owned().into() }
}

fn numbered(number: usize) -> PathComponent {
    name(&format!("{number:07}"))
}

async fn put(blobs: &dyn BlobService, contents: &[u8]) -> io::Result<B3Digest> {
    let mut writer = blobs.open_write().await;
    writer.write_all(contents).await?;
    writer.close().await
}
