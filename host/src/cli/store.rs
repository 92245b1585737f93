//! The subcommands of `store`, and looking up what a command names.

mod copy;
mod gc;
mod look;
mod root;
mod verbs;
mod verify;

use std::io::{self, SeekFrom};

use cofferdam_castore::{B3Digest, LocalStore, Node, Store};
use tokio::io::AsyncSeekExt;

use super::{CliError, StoreArgs, node_text::Reference};
pub(super) use verbs::StoreCommandArgs;

/// The store as one in files of this machine.
fn local(store: &StoreArgs) -> Result<LocalStore, CliError> {
    let addrs = store.addrs();
    match addrs.open_local()? {
        Some(local) => Ok(local),
        None => {
            let (blobs, directories) = addrs.resolve()?;
            Err(CliError::wrong(format!("the store at {blobs} and {directories} is not a local one"))
                .try_this("file:///DIRECTORY for --blob-service-addr and redb:///FILE for --directory-service-addr"))
        }
    }
}

/// What a reference stands for: itself, or what the store has by its digest; `None` if it has nothing.
pub(super) async fn resolve(store: &Store, reference: &Reference) -> io::Result<Option<Node>> {
    match reference {
        Reference::Node(node) => Ok(Some(node.clone())),
        Reference::Digest(digest) => look_up(store, *digest).await,
    }
}

async fn look_up(store: &Store, digest: B3Digest) -> io::Result<Option<Node>> {
    // No bytes are the empty directory's encoding as well as the empty file's contents. Every store has both.
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

/// The store has nothing by this digest.
pub(super) fn missing(reference: &Reference) -> CliError {
    let text = match reference {
        Reference::Digest(digest) => digest.to_string(),
        Reference::Node(node) => super::node_text::format(node),
    };
    CliError::wrong(format!("the store has neither a directory nor a file {text}")).try_this(
        "import it with `cofferdam import`, or name the store that has it with --blob-service-addr and \
         --directory-service-addr",
    )
}
