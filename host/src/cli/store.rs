//! Which store a command works on, and where this user's state is; below it the subcommands of `store`.

mod copy;
mod gc;
mod look;
mod root;
mod verbs;
mod verify;

use std::{
    env,
    io::{self, SeekFrom},
    path::PathBuf,
};

use cofferdam_castore::{AddrError, B3Digest, LocalStore, Node, Store};
use tokio::io::AsyncSeekExt;

use super::{CliError, StoreArgs, node_text::Reference};
pub(super) use verbs::StoreCommandArgs;

/// Where this user's store and run directories are: `$COFFERDAM_STATE_DIR`, `$XDG_STATE_HOME/cofferdam` or
/// `~/.local/state/cofferdam`.
pub(super) fn state_dir() -> Result<PathBuf, CliError> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let state = set("COFFERDAM_STATE_DIR")
        .or_else(|| set("XDG_STATE_HOME").map(|home| home.join("cofferdam")))
        .or_else(|| set("HOME").map(|home| home.join(".local/state/cofferdam")));
    match state.map(std::path::absolute) {
        Some(Ok(path)) => Ok(path),
        Some(Err(error)) => Err(CliError::wrong_because("the state directory can't be made absolute", error)),
        None => Err(CliError::wrong("there is no place for the store")
            .try_this("set COFFERDAM_STATE_DIR, XDG_STATE_HOME or HOME")),
    }
}

impl StoreArgs {
    /// The addresses of blobs and directories.
    pub(super) fn addresses(&self) -> Result<(String, String), CliError> {
        let default = |scheme: &str, name: &str| -> Result<String, CliError> {
            let path = state_dir()?.join("store").join(name);
            let text = path.to_str().ok_or_else(|| {
                CliError::wrong(format!("the state directory's path {path:?} is not UTF-8"))
                    .try_this("name another one in COFFERDAM_STATE_DIR")
            })?;
            Ok(format!("{scheme}://{text}"))
        };
        let given = |address: &Option<String>| address.clone().filter(|address| !address.is_empty()).map(Ok);
        Ok((
            given(&self.blob_service_addr).unwrap_or_else(|| default("file", "blobs"))?,
            given(&self.directory_service_addr).unwrap_or_else(|| default("redb", "directories.redb"))?,
        ))
    }

    /// The same, or what a daemon serves where nothing is said.
    pub(super) fn or_at(&self, daemon: &str) -> Self {
        let or_daemon = |address: &Option<String>| {
            Some(address.clone().filter(|address| !address.is_empty()).unwrap_or_else(|| daemon.to_owned()))
        };
        Self {
            blob_service_addr: or_daemon(&self.blob_service_addr),
            directory_service_addr: or_daemon(&self.directory_service_addr),
        }
    }

    /// Opens the store.
    pub(super) fn open(&self) -> Result<Store, CliError> {
        let (blobs, directories) = self.addresses()?;
        open(&blobs, &directories)
    }
}

fn open(blobs: &str, directories: &str) -> Result<Store, CliError> {
    Store::from_addrs(blobs, directories).map_err(|error| match error {
        AddrError::Open { .. } => CliError::failed("can't open the store", error),
        _ => CliError::wrong_because("the store's address is wrong", error),
    })
}

/// The store as one in files of this machine.
fn local(store: &StoreArgs) -> Result<LocalStore, CliError> {
    let (blobs, directories) = store.addresses()?;
    match LocalStore::from_addr(&blobs, &directories) {
        Err(error) => Err(CliError::failed("can't open the store", error)),
        Ok(Some(local)) => Ok(local),
        Ok(None) => Err(CliError::wrong(format!("the store at {blobs} and {directories} is not a local one"))
            .try_this("file:///DIRECTORY for --blob-service-addr and redb:///FILE for --directory-service-addr")),
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
