//! `export`: writes a node of the store to a new path.

use std::path::{Path, PathBuf};

use clap::Args;
use cofferdam_castore::{
    Node, Store,
    export::{Existing, ExportError, export_unless},
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{
    CliError, ClientArgs,
    archive::{self, ExportFormat},
    interrupt::blocking,
    node_text::{self, Reference},
    store,
};
use crate::build::failure::blames_path;

const EXAMPLES: &str = "\
Examples:
  cofferdam export dir:blake3-…:62 ./lua
  An executable file needs its node, a digest alone has no execute bit:
    cofferdam export file:blake3-…:280112:x ./lua
  As an archive, to a file or to another program:
    cofferdam export --format tar.zst dir:blake3-…:62 lua.tar.zst
    cofferdam export --format nar dir:blake3-…:62 - | nix-store --restore ./lua";

/// Writes a node of the store to a new path
///
/// Files get mode 0644, executable files and directories 0755, less the umask. Nothing is overwritten. Archives of equal
/// nodes are equal. With --json stdout gets an object: node and path.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, after_long_help = format!("{}\n\n{EXAMPLES}", node_text::HELP))]
pub(super) struct ExportArgs {
    /// What to export, as `import` and `run` print it
    #[arg(value_name = "NODE|DIGEST")]
    reference: Reference,
    /// The destination, which must not exist; - is stdout, for archives and single files
    #[arg(value_name = "DEST")]
    dest: PathBuf,
    /// Replace what is at DEST, whatever it is
    #[arg(long)]
    force: bool,
    /// The kind of export
    #[arg(long, value_enum, default_value_t = ExportFormat::Path)]
    format: ExportFormat,
}

impl ExportArgs {
    pub(super) async fn execute(self, client: &ClientArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        let to_stdout = self.dest == Path::new("-");
        if to_stdout {
            client.refuse_json("the export")?;
        }
        let store = client.open_store()?;
        let node = store::find(&store, &self.reference, client).await?;
        if to_stdout && self.format == ExportFormat::Path {
            let Node::File { digest, size, .. } = node else {
                return Err(CliError::wrong(format!(
                    "{} is not a file, so it can't be written to stdout",
                    node_text::format(&node)
                ))
                .try_this("--format tar, or another archive"));
            };
            return store::print_blob(&store, digest, size, "the file".into(), cancel).await;
        }
        let object = json!({ "node": node_text::format(&node), "path": self.dest.to_string_lossy() });
        let progress = client.progress();
        progress.step("exporting");
        let dest = self.dest;
        let exported = match self.format {
            ExportFormat::Path => write(&store, &node, dest, existing(self.force), cancel).await,
            format => {
                let cancel = cancel.clone();
                let existing = existing(self.force);
                let work = move || archive::export(&store, &node, format, &dest, existing, &|| cancel.is_cancelled());
                // Waited for even if interrupted, as in `write`.
                blocking(&CancellationToken::new(), work).await
            }
        };
        progress.clear();
        exported?;
        if to_stdout { Ok(()) } else { client.print("", &object) }
    }
}

/// What `--force` does.
pub(super) fn existing(force: bool) -> Existing {
    if force { Existing::Replaced } else { Existing::Refused }
}

/// Writes one node. When interrupted, it waits until the export has removed what it has written so far.
pub(super) async fn write(
    store: &Store,
    node: &Node,
    dest: PathBuf,
    existing: Existing,
    cancel: &CancellationToken,
) -> Result<(), CliError> {
    let (store, node, cancel) = (store.clone(), node.clone(), cancel.clone());
    let work = move || export_unless(&store, &node, &dest, existing, &|| cancel.is_cancelled());
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
