//! `completions` and `man`: what a shell and `man` know of the command line.

use std::{fs, path::PathBuf};

use clap::{Args, CommandFactory as _};
use clap_complete::{Shell, generate};

use super::{Cli, CliError, print};

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  cofferdam completions bash > ~/.local/share/bash-completion/completions/cofferdam
  cofferdam completions zsh > ~/.zfunc/_cofferdam
  cofferdam completions fish > ~/.config/fish/completions/cofferdam.fish";

/// Prints the script by which a shell completes this command line
#[derive(Debug, Args)]
#[command(after_help = COMPLETIONS_EXAMPLES)]
pub(super) struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

impl CompletionsArgs {
    pub(super) fn execute(self) -> Result<(), CliError> {
        let mut script = Vec::new();
        generate(self.shell, &mut Cli::command(), "cofferdam", &mut script);
        print(&String::from_utf8_lossy(&script))
    }
}

const MAN_EXAMPLES: &str = "\
Examples:
  cofferdam man ~/.local/share/man/man1 && man cofferdam-run";

/// Writes the manual pages of all commands into a directory
#[derive(Debug, Args)]
#[command(after_help = MAN_EXAMPLES)]
pub(super) struct ManArgs {
    /// The directory, made if it is missing
    directory: PathBuf,
}

impl ManArgs {
    pub(super) fn execute(self) -> Result<(), CliError> {
        let Self { directory } = self;
        fs::create_dir_all(&directory)
            .and_then(|()| clap_mangen::generate_to(Cli::command(), &directory))
            .map_err(|error| CliError::at_path(format!("can't write manual pages into {}", directory.display()), error))
    }
}
