//! A root's `/etc`, completed for a build.
//!
//! A build's user and group are the same in every build, and few roots know them. Without an entry, `whoami` fails and
//! programs find no home directory. A root without these files needs nothing: the guest has its own.

use std::{collections::BTreeMap, io};

use cofferdam_castore::{B3Digest, Node, PathComponent, Store};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Longest file that is completed, in bytes. A longer one stays as it is.
const MAX_BYTES: u64 = 1024 * 1024;

/// A file with a line that it needs.
struct Completed {
    name: &'static str,
    line: &'static str,
    /// Whether a line does the same.
    is_there: fn(&str) -> bool,
}

const FILES: [Completed; 3] = [
    Completed {
        name: "passwd",
        line: "nixbld:x:1000:100:build user:/build:/noshell",
        is_there: |line| line.split(':').nth(2) == Some("1000"),
    },
    Completed { name: "group", line: "nixbld:x:100:", is_there: |line| line.split(':').nth(2) == Some("100") },
    Completed {
        name: "hosts",
        line: "127.0.0.1 localhost",
        is_there: |line| line.split_whitespace().skip(1).any(|name| name == "localhost"),
    },
];

/// The file that says who answers DNS queries. A root has that of the host where it was made, and the guest its own.
const RESOLV_CONF: &str = "resolv.conf";

/// Completes the entries of `/etc`.
pub(super) async fn complete(
    store: &Store,
    mut etc: BTreeMap<PathComponent, Node>,
) -> io::Result<BTreeMap<PathComponent, Node>> {
    etc.remove(RESOLV_CONF.as_bytes());
    let batch = store.batch();
    for Completed { name, line, is_there } in FILES {
        let Some(Node::File { digest, size, executable }) = etc.get(name.as_bytes()) else { continue };
        let (size, executable) = (*size, *executable);
        if size > MAX_BYTES {
            continue;
        }
        let Some(blob) = store.blobs.open_read(digest).await? else { continue };
        let mut contents = Vec::new();
        blob.take(size).read_to_end(&mut contents).await?;
        if String::from_utf8_lossy(&contents).lines().any(is_there) {
            continue;
        }
        if contents.last().is_some_and(|&byte| byte != b'\n') {
            contents.push(b'\n');
        }
        contents.extend_from_slice(line.as_bytes());
        contents.push(b'\n');
        let node = Node::File { digest: write(&batch, &contents).await?, size: contents.len() as u64, executable };
        if let Some(there) = etc.get_mut(name.as_bytes()) {
            *there = node;
        }
    }
    batch.blobs.commit().await?;
    Ok(etc)
}

async fn write(store: &Store, contents: &[u8]) -> io::Result<B3Digest> {
    let mut writer = store.blobs.open_write().await;
    writer.write_all(contents).await?;
    writer.close().await
}
