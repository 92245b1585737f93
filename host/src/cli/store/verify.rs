//! `store verify`: checks every blob and directory against its digest.

use std::path::Path;

use clap::Args;
use cofferdam_castore::verify::{Fault, verify, verify_node};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{find, local};
use crate::cli::{
    CliError, ClientArgs,
    interrupt::blocking,
    node_text::{self, Reference},
    print,
    progress::Progress,
    quantity::show_size,
};

const EXAMPLES: &str = "\
Examples:
  cofferdam store verify
  Some nodes of a store that is elsewhere:
    cofferdam store verify dir:blake3-…:62";

/// Verifies every blob and every directory against its digest
///
/// Prints one line for each that is damaged or missing, and exits with 3 if there is one. Importing or building the same
/// contents again replaces a damaged blob. Without nodes it verifies a whole local store, and `store gc` waits for it. With
/// --json stdout gets an object: blobs, bytes, directories and the list of faults.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct VerifyArgs {
    /// What to verify, with everything below it [default: the whole store]
    #[arg(value_name = "NODE|DIGEST")]
    references: Vec<Reference>,
}

impl VerifyArgs {
    pub(super) async fn execute(self, client: &ClientArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        let progress = client.progress();
        if !self.references.is_empty() {
            return self.nodes(client, &progress, cancel).await;
        }
        let local = local(client)?;
        progress.step("verifying");
        let work = move || verify(&local).map_err(|error| CliError::failed("the store can't be read", error));
        let verified = blocking(cancel, work).await;
        progress.clear();
        let verified = verified?;
        let (blobs, bytes, directories) = (verified.blobs, verified.bytes, verified.directories);
        if client.json {
            let fault = |fault: &Fault| json!({ "kind": fault.code(), "message": fault.to_string() });
            let faults: Vec<_> = verified.faults.iter().map(fault).collect();
            let object = json!({ "blobs": blobs, "bytes": bytes, "directories": directories, "faults": faults });
            print(&format!("{object}\n"))?;
        } else {
            let lines: String = verified.faults.iter().map(|fault| format!("{}\t{fault}\n", fault.code())).collect();
            print(&lines)?;
            progress.finish(&format!("verified {blobs} blobs ({}) and {directories} directories", show_size(bytes)));
        }
        match verified.faults.len() {
            0 => Ok(()),
            faults => {
                let damaged = CliError::damaged(format!("the store is damaged; faults: {faults}"))
                    .try_this("import or build the missing and damaged contents again, as the owner of the store; this replaces damaged blobs");
                Err(CliError::AfterResult(Box::new(damaged)))
            }
        }
    }

    async fn nodes(self, client: &ClientArgs, progress: &Progress, cancel: &CancellationToken) -> Result<(), CliError> {
        let store = client.open_store()?;
        for reference in &self.references {
            let node = find(&store, reference, client).await?;
            let (name, store) = (node_text::format(&node), store.clone());
            progress.step("verifying");
            let work = move || verify_node(&store, &node, Path::new(&name), &|| false);
            let verified =
                blocking(cancel, move || work().map_err(|error| CliError::failed("the store is damaged", error)));
            let verified = verified.await;
            progress.clear();
            verified?;
        }
        if client.json { print("{\"faults\":[]}\n") } else { Ok(()) }
    }
}
