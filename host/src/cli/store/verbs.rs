//! `store`: operations on a store other than import and export.

use clap::{Args, Subcommand};
use tokio_util::sync::CancellationToken;

use super::{
    copy::CopyArgs,
    gc::GcArgs,
    look::{CatArgs, LsArgs, StatArgs},
    root::RootArgs,
    verify::VerifyArgs,
};
use crate::cli::{CliError, ClientArgs};

const EXAMPLES: &str = "\
Examples:
  cofferdam store ls dir:blake3-…:62 bin
  cofferdam store verify
  cofferdam store root add lua dir:blake3-…:62 && cofferdam store gc";

/// Lists, verifies, copies and cleans up the store
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(in crate::cli) struct StoreCommandArgs {
    #[command(subcommand)]
    command: StoreCommand,
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    Ls(LsArgs),
    Cat(CatArgs),
    Stat(StatArgs),
    Verify(VerifyArgs),
    Gc(GcArgs),
    Root(RootArgs),
    Copy(CopyArgs),
}

impl StoreCommandArgs {
    pub(in crate::cli) async fn execute(self, client: &ClientArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        match self.command {
            StoreCommand::Ls(args) => args.execute(client).await,
            StoreCommand::Cat(args) => args.execute(client, cancel).await,
            StoreCommand::Stat(args) => args.execute(client, cancel).await,
            StoreCommand::Verify(args) => args.execute(client, cancel).await,
            StoreCommand::Gc(args) => args.execute(client, cancel).await,
            StoreCommand::Root(args) => args.execute(client, cancel).await,
            StoreCommand::Copy(args) => args.execute(client, cancel).await,
        }
    }
}
