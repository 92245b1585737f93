//! `store copy`: from one store to another.

use std::{path::Path, sync::Arc, time::Instant};

use clap::Args;
use cofferdam_castore::{
    LocalStore,
    copy::{Copied, CopyError, CopyObserver, copy, everything},
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::find;
use crate::cli::{
    CliError, ClientArgs, StoreAddrs,
    interrupt::blocking,
    node_text::Reference,
    progress::{Progress, with_rate},
    quantity::show_size,
};

/// The argument that means the store of the flags and the environment.
const DEFAULT: &str = "default";

const EXAMPLES: &str = "\
Examples:
  cofferdam store copy default /mnt/backup
  cofferdam store copy default file:///mnt/blobs,redb:///mnt/directories.redb dir:blake3-…:62

Addresses:
  default              the store of --blob-service-addr and --directory-service-addr, or the daemon's
  BLOBS,DIRECTORIES    the addresses of both
  SCHEME://…           one address of both
  DIR                  a store of cofferdam's own: DIR/blobs and DIR/directories.redb";

/// Copies nodes from one store to another
///
/// Blobs that the other store has are skipped. Without nodes it copies everything in a local store. With --json stdout gets
/// an object: blobs, directories, and the blobs and bytes that were copied.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct CopyArgs {
    /// The store to copy from
    #[arg(value_name = "FROM")]
    from: String,
    /// The store to copy to
    #[arg(value_name = "TO")]
    to: String,
    /// What to copy, with everything below it [default: the whole store]
    #[arg(value_name = "NODE|DIGEST")]
    references: Vec<Reference>,
}

impl CopyArgs {
    pub(super) async fn execute(self, client: &ClientArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        let (from_addrs, to_addrs) = (named(&self.from, client)?, named(&self.to, client)?);
        let from = from_addrs.open()?;
        let mut nodes = Vec::new();
        for reference in &self.references {
            nodes.push(find(&from, reference, client).await?);
        }
        let all = self.references.is_empty().then(|| local(&from_addrs)).transpose()?;
        let to = to_addrs.open()?;
        let watch = Watch::new("copying", &Arc::new(client.progress()), cancel);
        let work = move || {
            if let Some(local) = all {
                watch.progress.step("comparing the stores");
                nodes = everything(&local).map_err(|error| CliError::failed("the store can't be read", error))?;
            }
            let copied = copy(&from, &to, &nodes, &watch);
            watch.progress.clear();
            Ok::<_, CliError>(copied?)
        };
        // Waited for, even if interrupted: it ends in order.
        let copied = blocking(&CancellationToken::new(), work).await?;
        let Copied { blobs, blobs_copied, bytes_copied, directories, .. } = copied;
        let bytes = show_size(bytes_copied);
        let text = format!("copied {blobs_copied} of {blobs} blobs ({bytes}), and {directories} directories\n");
        let copied = json!({ "blobs": blobs_copied, "bytes": bytes_copied });
        client.print(&text, &json!({ "blobs": blobs, "directories": directories, "copied": copied }))
    }
}

/// The store that an argument names.
fn named(text: &str, client: &ClientArgs) -> Result<StoreAddrs, CliError> {
    if text == DEFAULT {
        return Ok(client.store_addrs());
    }
    let pair = |blobs: &str, directories: &str| {
        Ok(StoreAddrs { blobs: Some(blobs.to_owned()), directories: Some(directories.to_owned()) })
    };
    let both = text.rsplit_once(',').filter(|(one, other)| one.contains("://") && other.contains("://"));
    if let Some((blobs, directories)) = both {
        return pair(blobs, directories);
    }
    if text.contains("://") {
        return pair(text, text);
    }
    let path = std::path::absolute(Path::new(text));
    let path = path.map_err(|error| CliError::wrong_because(format!("{text:?} is no path"), error))?;
    let path = path.to_str().ok_or_else(|| CliError::wrong(format!("the path {path:?} is not UTF-8")))?;
    pair(&format!("file://{path}/blobs"), &format!("redb://{path}/directories.redb"))
}

/// A store whose contents can be listed.
fn local(addrs: &StoreAddrs) -> Result<LocalStore, CliError> {
    match addrs.open_local()? {
        Some(local) => Ok(local),
        None => Err(CliError::wrong(format!("the store at {} can't be listed", addrs.resolve()?.0))
            .try_this("name the nodes that are to be copied")),
    }
}

/// Shows how far a copy has come, until it is interrupted.
pub(in crate::cli) struct Watch {
    step: &'static str,
    progress: Arc<Progress>,
    begun: Instant,
    cancel: CancellationToken,
}

impl Watch {
    /// The step is what is done, as in "copying".
    pub(in crate::cli) fn new(step: &'static str, progress: &Arc<Progress>, cancel: &CancellationToken) -> Self {
        Self { step, progress: Arc::clone(progress), begun: Instant::now(), cancel: cancel.clone() }
    }
}

impl CopyObserver for Watch {
    fn progress(&self, copied: &Copied) {
        let bytes = with_rate(copied.bytes_copied, self.begun.elapsed());
        let Copied { blobs_done, blobs, .. } = copied;
        self.progress.update(&format!("{}: {blobs_done} of {blobs} blobs, {bytes}", self.step));
    }

    fn interrupted(&self) -> bool {
        self.cancel.is_cancelled()
    }
}

impl From<CopyError> for CliError {
    fn from(error: CopyError) -> Self {
        match error {
            CopyError::Interrupted => Self::interrupted(),
            error => Self::failed("the copy failed", error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::StoreArgs;

    #[test]
    fn addresses_have_four_forms() {
        let store = StoreArgs { blob_service_addr: Some("b".to_owned()), directory_service_addr: Some("d".to_owned()) };
        let client = ClientArgs { store, ..ClientArgs::default() };
        let named = |text: &str| named(text, &client).unwrap().resolve().unwrap();
        let pair = |blobs: &str, directories: &str| (blobs.to_owned(), directories.to_owned());
        assert_eq!(named("default"), pair("b", "d"));
        assert_eq!(named("memory://,redb:///d"), pair("memory://", "redb:///d"));
        assert_eq!(named("grpc+http://h:1"), pair("grpc+http://h:1", "grpc+http://h:1"));
        assert_eq!(named("/a,b"), pair("file:///a,b/blobs", "redb:///a,b/directories.redb"));
        let (blobs, _) = named("a");
        assert!(blobs.starts_with("file:///") && blobs.ends_with("/a/blobs"), "{blobs}");
    }
}
