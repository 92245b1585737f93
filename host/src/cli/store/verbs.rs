//! `store`: what can be done with a store beside importing and exporting.

use clap::{Args, Subcommand};
use tokio_util::sync::CancellationToken;

use super::{
    copy::CopyArgs,
    gc::GcArgs,
    look::{CatArgs, LsArgs, StatArgs},
    root::RootArgs,
    verify::VerifyArgs,
};
use crate::cli::{CliError, StoreArgs};

const EXAMPLES: &str = "\
Examples:
  cofferdam store ls dir:blake3-…:62 bin
  cofferdam store verify
  cofferdam store root add lua dir:blake3-…:62 && cofferdam store gc";

/// Looks into the store, verifies it, copies from it and frees its space
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
    pub(in crate::cli) fn json(&self) -> bool {
        match &self.command {
            StoreCommand::Ls(args) => args.json(),
            StoreCommand::Cat(_) => false,
            StoreCommand::Stat(args) => args.json(),
            StoreCommand::Verify(args) => args.json(),
            StoreCommand::Gc(args) => args.json(),
            StoreCommand::Root(args) => args.json(),
            StoreCommand::Copy(args) => args.json(),
        }
    }

    pub(in crate::cli) async fn execute(self, store: &StoreArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        match self.command {
            StoreCommand::Ls(args) => args.execute(store).await,
            StoreCommand::Cat(args) => args.execute(store, cancel).await,
            StoreCommand::Stat(args) => args.execute(store, cancel).await,
            StoreCommand::Verify(args) => args.execute(store, cancel).await,
            StoreCommand::Gc(args) => args.execute(store, cancel).await,
            StoreCommand::Root(args) => args.execute(store, cancel).await,
            StoreCommand::Copy(args) => args.execute(store, cancel).await,
        }
    }
}
