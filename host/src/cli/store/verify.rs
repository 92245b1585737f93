//! `store verify`: every blob and directory against its digest.

use std::path::Path;

use clap::Args;
use cofferdam_castore::verify::{Fault, verify, verify_node};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{local, missing, resolve};
use crate::cli::{
    CliError, StoreArgs,
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
/// Prints one line for each that is damaged or missing, and exits with 3 if there is one. Without nodes it verifies all
/// that is in a local store; a collection of garbage waits for it.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct VerifyArgs {
    /// What to verify, with all below it [default: all that is there]
    #[arg(value_name = "NODE|DIGEST")]
    references: Vec<Reference>,
    /// Print one JSON object: blobs, bytes, directories and the list of faults
    #[arg(long)]
    json: bool,
}

impl VerifyArgs {
    pub(super) fn json(&self) -> bool {
        self.json
    }

    pub(super) async fn execute(self, store: &StoreArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        let progress = Progress::new();
        if !self.references.is_empty() {
            return self.nodes(store, &progress, cancel).await;
        }
        let local = local(store)?;
        progress.step("verifying");
        let work = move || verify(&local).map_err(|error| CliError::failed("the store can't be read", error));
        let verified = blocking(cancel, work).await;
        progress.clear();
        let verified = verified?;
        let (blobs, bytes, directories) = (verified.blobs, verified.bytes, verified.directories);
        if self.json {
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
                let damaged = CliError::damaged(format!("what is in the store is not whole; faults: {faults}"))
                    .try_this("remove damaged files, then import or build again what they belong to");
                Err(CliError::AfterResult(Box::new(damaged)))
            }
        }
    }

    async fn nodes(self, store: &StoreArgs, progress: &Progress, cancel: &CancellationToken) -> Result<(), CliError> {
        let store = store.addrs().open()?;
        for reference in &self.references {
            let node = resolve(&store, reference).await;
            let node = node.map_err(|error| CliError::failed("can't read from the store", error))?;
            let node = node.ok_or_else(|| missing(reference))?;
            let (name, store) = (node_text::format(&node), store.clone());
            progress.step("verifying");
            let work = move || verify_node(&store, &node, Path::new(&name), &|| false);
            let verified = blocking(cancel, move || {
                work().map_err(|error| CliError::failed("what is in the store is not whole", error))
            });
            let verified = verified.await;
            progress.clear();
            verified?;
        }
        if self.json { print("{\"faults\":[]}\n") } else { Ok(()) }
    }
}
