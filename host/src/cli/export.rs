//! `export`: a node of the store to a new path.

use std::path::PathBuf;

use clap::Args;
use cofferdam_castore::{
    Node, Store,
    export::{ExportError, export_unless},
};
use tokio_util::sync::CancellationToken;

use super::{
    CliError, StoreArgs,
    error::blames_path,
    interrupt::blocking,
    node_text::{self, Reference},
    progress::Progress,
    store,
};

const EXAMPLES: &str = "\
Examples:
  cofferdam export dir:blake3-…:62 ./lua
  An executable file needs its node, a digest alone has no execute bit:
    cofferdam export file:blake3-…:280112:x ./lua";

/// Writes what the store has to a new path
///
/// Files get mode 0644, executable ones 0755, and directories 0755, less the umask. Nothing is ever written over.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, after_long_help = format!("{}\n\n{EXAMPLES}", node_text::HELP))]
pub(super) struct ExportArgs {
    /// What to export, as `import` and `run` print it
    #[arg(value_name = "NODE|DIGEST")]
    reference: Reference,
    /// Where to; must not exist
    #[arg(value_name = "DEST")]
    dest: PathBuf,
}

impl ExportArgs {
    pub(super) async fn execute(self, store: &StoreArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        let store = store.open()?;
        let node = store::resolve(&store, &self.reference)
            .await
            .map_err(|error| CliError::failed("can't read from the store", error))?
            .ok_or_else(|| store::missing(&self.reference))?;
        let progress = Progress::new();
        progress.step("exporting");
        let dest = self.dest;
        let exported = write(&store, &node, dest, cancel).await;
        progress.clear();
        exported
    }
}

/// Writes one node. An interruption is waited for, since the export removes what it has written so far.
pub(super) async fn write(
    store: &Store,
    node: &Node,
    dest: PathBuf,
    cancel: &CancellationToken,
) -> Result<(), CliError> {
    let (store, node, cancel) = (store.clone(), node.clone(), cancel.clone());
    let work = move || export_unless(&store, &node, &dest, &|| cancel.is_cancelled());
    blocking(&CancellationToken::new(), work).await
}

impl From<ExportError> for CliError {
    fn from(error: ExportError) -> Self {
        match &error {
            ExportError::Interrupted => Self::interrupted(),
            ExportError::Store { .. } => Self::failed("the export failed", error),
            ExportError::Write { source, .. } if !blames_path(source) => Self::failed("the export failed", error),
            _ => Self::wrong_because("this can't be exported", error),
        }
    }
}
