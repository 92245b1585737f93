//! `store root`: names for what `store gc` must keep.

use clap::{Args, Subcommand};
use cofferdam_castore::RootError;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{local, missing, resolve};
use crate::cli::{
    CliError, StoreArgs,
    interrupt::blocking,
    node_text::{self, Reference},
    print,
};

const EXAMPLES: &str = "\
Examples:
  cofferdam store root add lua dir:blake3-…:62
  cofferdam store root list
  cofferdam store root remove lua";

/// Names what must stay when garbage is collected
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct RootArgs {
    #[command(subcommand)]
    command: RootCommand,
}

#[derive(Debug, Subcommand)]
enum RootCommand {
    /// Keeps a node, and all below it, under a name; it takes the place of what had the name
    Add {
        /// Any name without a slash
        name: String,
        /// What to keep, as `import` and `run` print it
        #[arg(value_name = "NODE|DIGEST")]
        reference: Reference,
    },
    /// Prints one line a root: its node and its name, with a tab between
    List {
        /// Print one JSON object a line: name and node
        #[arg(long)]
        json: bool,
    },
    /// Keeps what has this name no longer
    Remove {
        /// The root's name
        name: String,
    },
}

impl RootArgs {
    pub(super) fn json(&self) -> bool {
        matches!(self.command, RootCommand::List { json: true })
    }

    pub(super) async fn execute(self, store: &StoreArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        let local = local(store)?;
        match self.command {
            RootCommand::Add { name, reference } => {
                let node = resolve(&store.addrs().open()?, &reference).await;
                let node = node.map_err(|error| CliError::failed("can't read from the store", error))?;
                let node = node.ok_or_else(|| missing(&reference))?;
                blocking(cancel, move || local.add_root(&name, &node)).await
            }
            RootCommand::List { json } => {
                let roots = local.roots().map_err(|error| CliError::failed("can't read the roots", error))?;
                for (name, node) in roots {
                    let node = node_text::format(&node);
                    print(&match json {
                        true => format!("{}\n", json!({ "name": name.to_string(), "node": node })),
                        false => format!("{node}\t{name}\n"),
                    })?;
                }
                Ok(())
            }
            RootCommand::Remove { name } => Ok(local.remove_root(&name)?),
        }
    }
}

impl From<RootError> for CliError {
    fn from(error: RootError) -> Self {
        match error {
            RootError::Store { .. } => Self::failed("the roots can't be changed", error),
            RootError::Missing { .. } => {
                Self::wrong_because("this can't be a root", error).try_this("import it again, whole")
            }
            RootError::Unknown(_) => {
                Self::wrong_because("there is nothing to remove", error).try_this("cofferdam store root list")
            }
            _ => Self::wrong_because("this can't be a root", error),
        }
    }
}
