//! The command line: one file a subcommand.
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
mod daemon;
mod doctor;
mod error;
mod execute;
mod export;
mod import;
mod interrupt;
pub(crate) mod plain_text;
mod progress;
mod remote;
mod run;
mod store;
mod terminal;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::{
    devices, quantity,
    request::node_text,
    state::{StoreAddrs, state_dir},
};
pub use error::{CliError, Exit};
use interrupt::until_interrupted;

/// The whole command line.
#[derive(Debug, Parser)]
#[command(name = "cofferdam", version, about = "Runs one build inside one microVM", after_long_help = AFTER_HELP)]
pub struct Cli {
    #[command(flatten)]
    store: StoreArgs,
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Exit codes:
  0  built (or: done)
  1  the build failed
  2  the request or the command line was wrong
  3  the executor failed, or was interrupted

Environment:
  COFFERDAM_STATE_DIR  store and run directories [default: $XDG_STATE_HOME/cofferdam, or
                       ~/.local/state/cofferdam]
  COFFERDAM_IMAGE      the guest image [default: ~/.cache/cofferdam/image]
  COFFERDAM_DAEMON     the daemon that builds, for `run`, `build` and `builds`
  COFFERDAM_TLS_CERTIFICATE, COFFERDAM_TLS_KEY
                       this client's certificate and key (PEM), for grpc+https:// that asks for one
  COFFERDAM_LOG        what to log on stderr, such as debug or cofferdam::machine=trace [default: warn]
  COFFERDAM_LOG_FORMAT json for one object a line";

/// Which store.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Store")]
pub struct StoreArgs {
    /// Where blobs are: memory://, file:///DIRECTORY, objectstore+URL (file, s3, gs, az, https, …),
    /// cache:///DIRECTORY?size=SIZE&remote=ADDR, a cache in front of the store ADDR, or grpc+http://HOST:PORT,
    /// grpc+https://HOST:PORT or grpc+unix:///SOCKET; by default in the state directory
    #[arg(long, global = true, env = "BLOB_SERVICE_ADDR", value_name = "ADDR")]
    blob_service_addr: Option<String>,
    /// Where directories are: memory://, redb:///FILE, objectstore+URL, cache:///DIRECTORY?size=SIZE&remote=ADDR or over
    /// gRPC as blobs; by default in the state directory
    #[arg(long, global = true, env = "DIRECTORY_SERVICE_ADDR", value_name = "ADDR")]
    directory_service_addr: Option<String>,
}

impl StoreArgs {
    fn addrs(&self) -> StoreAddrs {
        StoreAddrs { blobs: self.blob_service_addr.clone(), directories: self.directory_service_addr.clone() }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::RunArgs>),
    Build(build::BuildArgs),
    Import(import::ImportArgs),
    Export(export::ExportArgs),
    Daemon(daemon::DaemonArgs),
    Builds(builds::BuildsArgs),
    Store(store::StoreCommandArgs),
    Doctor(doctor::DoctorArgs),
    /// Serves a device of one VM; started by a build, of no use to anyone else
    #[command(name = devices::SUBCOMMAND, hide = true)]
    Device {
        device: devices::Kind,
    },
}

impl Cli {
    /// Reads this process's arguments. Help and mistakes are told here, and what is returned is the exit code.
    ///
    /// # Errors
    ///
    /// There is nothing to execute.
    pub fn from_arguments() -> Result<Self, ExitCode> {
        Self::try_parse().map_err(|error| {
            // Nobody is left to tell when this fails.
            let _ = error.print();
            let before_command = || std::env::args_os().take_while(|argument| argument != "--");
            if error.use_stderr() && before_command().any(|argument| argument == "--json") {
                CliError::from(&error).report_json();
            }
            u8::try_from(error.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from)
        })
    }

    /// Whether failures are to be told on stdout as JSON, too.
    pub fn json(&self) -> bool {
        match &self.command {
            Command::Run(args) => args.json(),
            Command::Build(args) => args.json(),
            Command::Import(args) => args.json(),
            Command::Doctor(args) => args.json(),
            Command::Store(args) => args.json(),
            Command::Builds(args) => args.json(),
            Command::Export(_) | Command::Daemon(_) | Command::Device { .. } => false,
        }
    }

    /// Does what is asked for.
    ///
    /// # Errors
    ///
    /// What to tell the user, and the exit code.
    pub fn execute(self) -> Result<(), CliError> {
        let Self { store, command } = self;
        match command {
            Command::Run(args) => until_interrupted(|cancel| async move { args.execute(&store, &cancel).await }),
            Command::Build(args) => until_interrupted(|cancel| async move { args.execute(&store, &cancel).await }),
            Command::Import(args) => until_interrupted(|cancel| async move { args.execute(&store, &cancel).await }),
            Command::Export(args) => until_interrupted(|cancel| async move { args.execute(&store, &cancel).await }),
            Command::Daemon(args) => until_interrupted(|cancel| async move { args.execute(&store, &cancel).await }),
            Command::Store(args) => until_interrupted(|cancel| async move { args.execute(&store, &cancel).await }),
            Command::Builds(args) => until_interrupted(|cancel| async move { args.execute(&cancel).await }),
            Command::Doctor(args) => args.execute(&store),
            // Confines its own thread, so no runtime and no other thread may be there before it.
            Command::Device { device } => {
                devices::run(device).map_err(|error| CliError::failed(format!("the {device} failed"), error))
            }
        }
    }
}

/// Writes results; a reader that has gone is no error of ours to speak of.
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
