//! `store root`: names for nodes that `store gc` must keep.

use clap::{Args, Subcommand};
use cofferdam_castore::{Node, RootError};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{find, local};
use crate::cli::{
    CliError, ClientArgs,
    interrupt::blocking,
    node_text::{self, Reference},
};

const EXAMPLES: &str = "\
Examples:
  cofferdam store root add lua dir:blake3-…:62
  cofferdam store root list
  cofferdam store root remove lua";

/// Names nodes that `store gc` must keep
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct RootArgs {
    #[command(subcommand)]
    command: RootCommand,
}

#[derive(Debug, Subcommand)]
enum RootCommand {
    /// Keeps a node, and everything below it, under a name; replaces a root of the same name
    Add {
        /// Any name without a slash
        name: String,
        /// What to keep, as `import` and `run` print it
        #[arg(value_name = "NODE|DIGEST")]
        reference: Reference,
    },
    /// Prints one line for each root: its node and its name, with a tab between; with --json an object: name and node
    List,
    /// Removes a root; `store gc` may then remove its contents
    Remove {
        /// The root's name
        name: String,
    },
}

impl RootArgs {
    pub(super) async fn execute(self, client: &ClientArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        let local = local(client)?;
        let object = |name: &str, node: &Node| json!({ "name": name, "node": node_text::format(node) });
        match self.command {
            RootCommand::Add { name, reference } => {
                let node = find(&client.open_store()?, &reference, client).await?;
                let added = object(&name, &node);
                blocking(cancel, move || local.add_root(&name, &node)).await?;
                client.print("", &added)
            }
            RootCommand::List => {
                let roots = local.roots().map_err(|error| CliError::failed("can't read the roots", error))?;
                roots.into_iter().try_for_each(|(name, node)| {
                    let line = format!("{}\t{name}\n", node_text::format(&node));
                    client.print(&line, &object(&name.to_string(), &node))
                })
            }
            RootCommand::Remove { name } => {
                local.remove_root(&name)?;
                client.print("", &json!({ "name": name }))
            }
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
