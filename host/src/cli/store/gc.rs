//! `store gc`: removes unused contents.

use std::time::Duration;

use clap::Args;
use cofferdam_castore::gc::{CollectError, collect};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::local;
use crate::cli::{CliError, ClientArgs, interrupt::blocking, quantity::show_size};

/// Younger contents stay.
const KEEP: &str = "1d";

const EXAMPLES: &str = "\
Examples:
  cofferdam store root add lua dir:blake3-…:62
  cofferdam store gc
  What would go, if only the last hour and the roots were kept:
    cofferdam store gc --keep 1h --dry-run";

/// Removes unused contents from a local store
///
/// It keeps named roots (see `store root`), the inputs of waiting and running builds, and anything imported, built, kept from
/// a failure or looked up within the time of --keep; each with everything below it. Builds and imports may run at the same time.
/// With --json stdout gets an object: blobs, bytes and directories removed and left.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct GcArgs {
    /// Keep younger contents, such as 90s, 12h or 7d. It must be longer than the longest upload over the network
    #[arg(long, value_name = "DUR", value_parser = age, default_value = KEEP)]
    keep: Duration,
    /// Remove nothing; print what would be removed
    #[arg(long)]
    dry_run: bool,
}

/// Unlike other durations, it may be 0.
fn age(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error}; write it with its unit: 90s, 12h, 7d"))
}

impl GcArgs {
    pub(super) async fn execute(self, client: &ClientArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        let local = local(client)?;
        let progress = client.progress();
        progress.step("collecting garbage");
        let (keep, dry_run) = (self.keep, self.dry_run);
        let collected = blocking(cancel, move || collect(&local, keep, dry_run)).await;
        progress.clear();
        let collected = collected?;
        let object = json!({
            "removed": { "blobs": collected.blobs, "bytes": collected.bytes, "directories": collected.directories },
            "left": { "blobs": collected.blobs_left, "directories": collected.directories_left },
            "dry_run": dry_run,
        });
        let (verb, bytes) = (if dry_run { "would free" } else { "freed" }, show_size(collected.bytes));
        let (blobs, directories) = (collected.blobs, collected.directories);
        client.print(&format!("{verb} {bytes}: {blobs} blobs and {directories} directories\n"), &object)
    }
}

impl From<CollectError> for CliError {
    fn from(error: CollectError) -> Self {
        match error {
            CollectError::Incomplete { .. } => Self::wrong_because("this store can't be collected", error).try_this(
                "check the addresses of blobs and directories, then `cofferdam store verify`; `cofferdam store root \
                 remove` if the root is not needed",
            ),
            CollectError::Store { .. } => Self::failed("the collection failed", error),
        }
    }
}
