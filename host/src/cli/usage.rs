//! `usage`: what clients have in a daemon's store.

use clap::Args;
use cofferdam_proto::cofferdam::v1::{ClientUsage, UsageRequest};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{CliError, ClientArgs, quantity::show_size, remote};
use crate::machine::jail::one_line;

const EXAMPLES: &str = "\
Examples:
  cofferdam usage
  user:1001\t2.4 GiB of 50 GiB\t31240 blobs and directories";

/// Shows what you have in a daemon's store: what you have put there, and what your builds have made
///
/// Operators see what each client has. One line a client, with tabs between; with --json an object. What isn't used for long enough
/// is removed by the daemon's garbage collection, see [gc] in its configuration.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct UsageArgs {}

impl UsageArgs {
    pub(super) async fn execute(self, client: &ClientArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        let daemon = remote::Daemon::at_or_own(client.daemon())?;
        let mut service = daemon.client();
        let answer = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(CliError::interrupted()),
            answer = service.usage(UsageRequest {}) => answer.map_err(|status| daemon.refused(&status))?,
        };
        for usage in answer.into_inner().clients {
            let ClientUsage { client: name, stored_bytes, stored_objects, stored_limit_bytes } = usage;
            let limit = Some(stored_limit_bytes).filter(|limit| *limit > 0);
            let bound = limit.map_or_else(String::new, |limit| format!(" of {}", show_size(limit)));
            let name = one_line(&name);
            let line = format!("{name}\t{}{bound}\t{stored_objects} blobs and directories\n", show_size(stored_bytes));
            let object = json!({
                "client": name,
                "stored_bytes": stored_bytes,
                "stored_objects": stored_objects,
                "stored_limit_bytes": limit,
            });
            client.print(&line, &object)?;
        }
        Ok(())
    }
}
