//! `usage`: what clients have of a daemon's disk.

use clap::Args;
use cofferdam_proto::cofferdam::v1::{ClientUsage, UsageRequest};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{CliError, ClientArgs, quantity::show_size, remote};
use crate::machine::jail::one_line;

const EXAMPLES: &str = "\
Examples:
  cofferdam usage
  user:1001\t2.40 GiB of 50.00 GiB in 31240 blobs and directories\t35.00 GiB for 1 running build\t9.10 MiB in 74 records

What makes room:
  in the store          the daemon's garbage collection removes what isn't used for long enough, see [gc] in its configuration
  for running builds    wait for their end or `cofferdam builds cancel` them; what a build may grow to is its --scratch-size,
                        --output-limit and --log-limit together
  in records            the oldest of a tenant beyond its quota are deleted, each with its log, see [records]";

/// Shows what you have of a daemon's disk: in its store, for your running builds, and in the records of those that have ended
///
/// Operators see what each client has. One line a client, with tabs between; with --json an object. Quotas are set by [tenants] in the
/// daemon's configuration.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct UsageArgs {}

impl UsageArgs {
    pub(super) async fn execute(self, client: &ClientArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        let daemon = remote::Daemon::at_or_own(client.daemon())?;
        for usage in daemon.answer(daemon.client().usage(UsageRequest {}), cancel).await?.clients {
            client.print(&(line(&usage) + "\n"), &object(&usage))?;
        }
        Ok(())
    }
}

fn line(usage: &ClientUsage) -> String {
    let of = |bytes: u64, limit: u64| match limit {
        0 => show_size(bytes),
        limit => format!("{} of {}", show_size(bytes), show_size(limit)),
    };
    let stored = usage.counts_stored.then(|| {
        let bytes = of(usage.stored_bytes, usage.stored_limit_bytes);
        format!("{bytes} in {} blobs and directories", usage.stored_objects)
    });
    let running = of(usage.running_bytes, usage.running_limit_bytes);
    let recorded = of(usage.recorded_bytes, usage.recorded_limit_bytes);
    let columns = [
        Some(one_line(&usage.client)),
        stored,
        Some(format!("{running} for {} running builds", usage.running)),
        Some(format!("{recorded} in {} records", usage.recorded)),
    ];
    columns.into_iter().flatten().collect::<Vec<_>>().join("\t")
}

fn object(usage: &ClientUsage) -> Value {
    let limit = |bytes: u64| Some(bytes).filter(|bytes| *bytes > 0);
    json!({
        "client": one_line(&usage.client),
        "stored_bytes": usage.counts_stored.then_some(usage.stored_bytes),
        "stored_objects": usage.counts_stored.then_some(usage.stored_objects),
        "stored_limit_bytes": limit(usage.stored_limit_bytes),
        "running": usage.running,
        "running_bytes": usage.running_bytes,
        "running_limit_bytes": limit(usage.running_limit_bytes),
        "recorded": usage.recorded,
        "recorded_bytes": usage.recorded_bytes,
        "recorded_limit_bytes": limit(usage.recorded_limit_bytes),
    })
}
