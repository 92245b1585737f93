//! The subcommands of `store`, and the lookup of nodes by their digest.

mod copy;
mod gc;
mod look;
mod root;
mod verbs;
mod verify;

use std::io::{self, SeekFrom};

use cofferdam_castore::{B3Digest, LocalStore, Node, Store};
use tokio::io::AsyncSeekExt;

use super::{CliError, ClientArgs, node_text::Reference};
pub(super) use copy::Watch;
pub(super) use look::print_blob;
pub(super) use verbs::StoreCommandArgs;

/// The store, which must be in files of this machine.
fn local(client: &ClientArgs) -> Result<LocalStore, CliError> {
    let addrs = client.store_addrs();
    if let Some(local) = addrs.open_local()? {
        return Ok(local);
    }
    Err(match client.daemon_of_store() {
        Some(addr) => CliError::wrong(format!("the store of the daemon at {addr} can't be reached by its files"))
            .try_this(
                "run this on the daemon's host, as its user and with its COFFERDAM_STATE_DIR, without --daemon and \
                 COFFERDAM_DAEMON; or give the daemon's own addresses with --blob-service-addr and --directory-service-addr",
            ),
        None => {
            let (blobs, directories) = addrs.resolve()?;
            CliError::wrong(format!("the store at {blobs} and {directories} is not a local one"))
                .try_this("file:///DIRECTORY for --blob-service-addr and redb:///FILE for --directory-service-addr")
        }
    })
}

/// The node of a reference. A digest alone must be in the store.
pub(super) async fn find(store: &Store, reference: &Reference, client: &ClientArgs) -> Result<Node, CliError> {
    let node = resolve(store, reference).await;
    let node = node.map_err(|error| CliError::failed("can't read from the store", error))?;
    node.ok_or_else(|| missing(reference, client))
}

/// The node of a reference; `None` if the store has nothing with its digest.
async fn resolve(store: &Store, reference: &Reference) -> io::Result<Option<Node>> {
    match reference {
        Reference::Node(node) => Ok(Some(node.clone())),
        Reference::Digest(digest) => look_up(store, *digest).await,
    }
}

async fn look_up(store: &Store, digest: B3Digest) -> io::Result<Option<Node>> {
    // The empty directory's encoding and the empty file have the same digest. A store has both without storing them.
    if digest != B3Digest::EMPTY
        && let Some(directory) = store.directories.get(&digest).await?
    {
        return Ok(Some(directory.to_node()));
    }
    let Some(mut blob) = store.blobs.open_read(&digest).await? else {
        return Ok(None);
    };
    let size = blob.seek(SeekFrom::End(0)).await?;
    Ok(Some(Node::File { digest, size, executable: false }))
}

/// Advice for a node that a daemon's store lacks: a command to copy.
pub(super) fn advise_import(daemon: &str) -> String {
    format!("import it with `cofferdam import --daemon {daemon} PATH`")
}

/// The error for a digest that the store doesn't have.
fn missing(reference: &Reference, client: &ClientArgs) -> CliError {
    let text = match reference {
        Reference::Digest(digest) => digest.to_string(),
        Reference::Node(node) => super::node_text::format(node),
    };
    let error = CliError::wrong(format!("the store has neither a directory nor a file {text}"));
    error.try_this(match client.daemon_of_store() {
        Some(addr) => advise_import(addr),
        None => "import it with `cofferdam import PATH`, or name the store that has it with --daemon, or with \
                 --blob-service-addr and --directory-service-addr"
            .to_owned(),
    })
}
