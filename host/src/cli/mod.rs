//! The command line: one file for each subcommand.
//!
//! ```text
//!   arguments ──▶ run ───┐ import inputs, make the request
//!                 build ─┤ read the request
//!                        ▼
//!                     execute ──▶ build::Builder ──▶ stdout: one line an output, or a BuildResponse
//!                        │  └ progress, log ──▶ stderr
//!                        ▼
//!                 --out: export
//!
//!   any error ──▶ error ──▶ stderr: error, caused by, try · stdout, with --json: one object · the exit code
//! ```

mod archive;
mod build;
mod builds;
mod common;
mod daemon;
mod doctor;
mod error;
mod execute;
mod export;
mod external_builder;
mod import;
mod interrupt;
mod network;
mod nix;
pub(crate) mod plain_text;
mod progress;
mod remote;
mod roots;
mod run;
mod secrets;
mod shell;
mod source_tree;
mod store;
mod terminal;
mod timestamps;
mod transport;
mod usage;
mod verify;
mod web_token;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::{
    devices, privacy, quantity,
    request::node_text,
    state::{StoreAddrs, state_dir},
};
use common::{ClientArgs, StoreArgs};
pub use error::{CliError, Exit};
use interrupt::until_interrupted;

/// The whole command line.
#[derive(Debug, Parser)]
#[command(name = "cofferdam", version, about = "Runs one build inside one microVM", after_long_help = AFTER_HELP)]
pub struct Cli {
    #[command(flatten)]
    client: ClientArgs,
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Exit codes:
  0  built (or: done)
  1  the build failed
  2  the request or the command line was wrong
  3  the executor failed, or was interrupted
  With run -it: the command's own, or 128 and the signal that killed it

Environment:
  COFFERDAM_STATE_DIR  store and run directories [default: $XDG_STATE_HOME/cofferdam, or
                       ~/.local/state/cofferdam]
  COFFERDAM_IMAGE      the guest image [default: ~/.cache/cofferdam/image, or the package's]
  COFFERDAM_DAEMON     the daemon that builds, and whose store is used
  COFFERDAM_TLS_CERTIFICATE, COFFERDAM_TLS_KEY
                       this client's certificate and key (PEM), for grpc+https:// that asks for one
  COFFERDAM_LOG        what to log on stderr, such as debug or cofferdam::machine=trace [default: warn]
  COFFERDAM_LOG_FORMAT json for one object a line";

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::RunArgs>),
    Build(Box<build::BuildArgs>),
    Import(import::ImportArgs),
    Export(export::ExportArgs),
    Daemon(daemon::DaemonArgs),
    NixDaemon(nix::NixDaemonArgs),
    NixStore(nix::NixStoreArgs),
    NixExternalBuilder(Box<external_builder::ExternalBuilderArgs>),
    Builds(builds::BuildsArgs),
    Store(store::StoreCommandArgs),
    Usage(usage::UsageArgs),
    Verify(verify::VerifyArgs),
    WebToken(web_token::WebTokenArgs),
    Doctor(doctor::DoctorArgs),
    Completions(shell::CompletionsArgs),
    Man(shell::ManArgs),
    /// Serves a device of one VM; only builds start it
    #[command(name = devices::SUBCOMMAND, hide = true)]
    Device {
        device: devices::Kind,
        /// See the constant of this name
        #[arg(long)]
        enabled_early: bool,
    },
}

impl Cli {
    /// Parses this process's arguments. Prints help and usage errors, and returns the exit code for them.
    ///
    /// # Errors
    ///
    /// There is no command to execute.
    pub fn from_arguments() -> Result<Self, ExitCode> {
        Self::try_parse().map_err(|error| {
            // If the output is closed, there is nowhere to report that.
            let _ = error.print();
            let before_command = || std::env::args_os().take_while(|argument| argument != "--");
            if error.use_stderr() && before_command().any(|argument| argument == "--json") {
                CliError::from(&error).report_json();
            }
            u8::try_from(error.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from)
        })
    }

    /// Whether results and failures are printed as JSON.
    pub fn json(&self) -> bool {
        self.client.json
    }

    /// Whether stderr gets errors only.
    pub fn quiet(&self) -> bool {
        self.client.quiet
    }

    /// Executes the command.
    ///
    /// # Errors
    ///
    /// The error to report, with its exit code.
    pub fn execute(self) -> Result<(), CliError> {
        let Self { client, command } = self;
        privacy::keep_memory_private()
            .map_err(|error| CliError::failed("can't keep other processes from this one's memory", error))?;
        match command {
            Command::Run(args) => until_interrupted(|cancel| async move { args.execute(&client, &cancel).await }),
            Command::Build(args) => until_interrupted(|cancel| async move { args.execute(&client, &cancel).await }),
            Command::Import(args) => until_interrupted(|cancel| async move { args.execute(&client, &cancel).await }),
            Command::Export(args) => until_interrupted(|cancel| async move { args.execute(&client, &cancel).await }),
            Command::Store(args) => until_interrupted(|cancel| async move { args.execute(&client, &cancel).await }),
            Command::Usage(args) => until_interrupted(|cancel| async move { args.execute(&client, &cancel).await }),
            Command::WebToken(args) => until_interrupted(|cancel| async move { args.execute(&client, &cancel).await }),
            Command::Verify(args) => args.execute(&client),
            Command::Builds(args) => until_interrupted(|cancel| async move { args.execute(&client, &cancel).await }),
            Command::Daemon(args) => {
                client.refuse_json("the addresses that the daemon listens on")?;
                until_interrupted(|cancel| async move { args.execute(&client.store, &cancel).await })
            }
            Command::NixDaemon(args) => {
                client.refuse_json("the bytes of Nix's protocol")?;
                until_interrupted(|cancel| async move { args.execute(&client, &cancel).await })
            }
            Command::NixStore(args) => {
                client.refuse_json("the bytes of Nix's protocol")?;
                until_interrupted(|cancel| async move { args.execute(&client, &cancel).await })
            }
            Command::NixExternalBuilder(args) => {
                client.refuse_json("nothing")?;
                args.execute(&client)
            }
            Command::Doctor(args) => args.execute(&client),
            Command::Completions(args) => {
                client.refuse_json("a script")?;
                args.execute()
            }
            Command::Man(args) => {
                client.refuse_json("manual pages")?;
                args.execute()
            }
            // It confines its own thread, so it must start before any other thread and any runtime.
            Command::Device { device, enabled_early } => devices::run(device, enabled_early)
                .map_err(|error| CliError::failed(format!("the {device} failed"), error)),
        }
    }
}

/// Prints results. A reader that has closed the pipe is not an error.
fn print(text: &str) -> Result<(), CliError> {
    use std::io::{ErrorKind, Write, stdout};
    let mut stdout = stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(CliError::failed("can't write to stdout", error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_visible_subcommand_has_examples() {
        let cli = Cli::command();
        let store = cli.find_subcommand("store").unwrap();
        let builds = cli.find_subcommand("builds").unwrap();
        let all = cli.get_subcommands().chain(store.get_subcommands()).chain(builds.get_subcommands());
        for command in all.filter(|command| !command.is_hide_set()) {
            let help = command.clone().render_long_help().to_string();
            assert!(help.contains("Examples:"), "{}", command.get_name());
        }
    }
}
