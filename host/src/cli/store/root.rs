//! `store root`: names for nodes that `store gc` must keep, and that builds can have as their root.

use std::{ffi::OsString, sync::Arc};

use clap::{Args, Subcommand};
use cofferdam_castore::{Node, RootError};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::local;
use crate::cli::{
    CliError, ClientArgs,
    interrupt::blocking,
    node_text,
    roots::{ImageArgs, Roots, Source},
};

const EXAMPLES: &str = "\
Examples:
  cofferdam store root add lua dir:blake3-…:62
  cofferdam store root add debian-12 oci://registry.example/debian:12
  cofferdam store root list
  cofferdam store root remove lua";

/// Names nodes that `store gc` must keep, and that `run --root` can use
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
        /// What to keep: a node or digest, as `import` and `run` print it, or anything else that `run --root` takes
        #[arg(value_name = "NODE|DIGEST|ROOT", value_parser = clap::value_parser!(OsString))]
        root: OsString,
        #[command(flatten)]
        images: ImageArgs,
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
            RootCommand::Add { name, root, images } => {
                let (store, progress) = (client.open_store()?, Arc::new(client.progress()));
                let roots = Roots { args: &images, client, store: &store, progress: &progress, cancel };
                let node = roots.load(&Source::parse(&root)?).await?;
                progress.clear();
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
