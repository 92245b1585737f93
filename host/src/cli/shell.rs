//! `completions` and `man`: what a shell and `man` know of the command line.

use std::{fs, path::PathBuf};

use clap::{ArgGroup, Args, Command, CommandFactory as _};
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
        print(&script(self.shell))
    }
}

fn script(shell: Shell) -> String {
    let mut script = Vec::new();
    generate(shell, &mut visible(&Cli::command()), "cofferdam", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// A command without what is hidden in it: `clap_complete` 4.6 would offer that.
fn visible(command: &Command) -> Command {
    let arguments: Vec<_> = command.get_arguments().filter(|argument| !argument.is_hide_set()).collect();
    let is_visible = |id| arguments.iter().any(|argument| argument.get_id() == id);
    // Arguments may refer to groups.
    let groups = command.get_groups().map(|group| {
        ArgGroup::new(group.get_id().clone()).args(group.get_args().filter(|id| is_visible(*id)).cloned())
    });
    let subcommands = command.get_subcommands().filter(|command| !command.is_hide_set()).map(visible);
    let mut shown = Command::new(command.get_name().to_owned())
        .args(arguments.iter().copied())
        .groups(groups)
        .subcommands(subcommands);
    if let Some(about) = command.get_about() {
        shown = shown.about(about.clone());
    }
    match command.get_version() {
        Some(version) => shown.version(version.to_owned()),
        None => shown,
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

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, process};

    use super::*;

    /// The names of subcommands and of long options, hidden ones or the others.
    fn names(command: &Command, hidden: bool) -> BTreeSet<String> {
        let options = command.get_arguments().filter(|argument| argument.is_hide_set() == hidden);
        let options = options.filter_map(|argument| argument.get_long()).map(|name| format!("--{name}"));
        let mut names: BTreeSet<_> = options.collect();
        for subcommand in command.get_subcommands() {
            match (subcommand.is_hide_set(), hidden) {
                (true, true) => names.extend([subcommand.get_name().to_owned()]),
                (true, false) => {}
                (false, _) => {
                    names.extend((!hidden).then(|| subcommand.get_name().to_owned()));
                    names.extend(self::names(subcommand, hidden));
                }
            }
        }
        names
    }

    /// Words of a script: fish writes `-l name` for `--name`.
    fn words(script: &str) -> BTreeSet<String> {
        let script = script.replace(" -l ", " --");
        let words = script.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').map(str::to_owned);
        words.collect()
    }

    #[test]
    fn completions_have_all_that_is_visible_and_nothing_that_is_hidden() {
        let command = Cli::command();
        let hidden = names(&command, true);
        assert!(hidden.contains("device") && hidden.contains("--worker-of"), "{hidden:?}");
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let words = words(&script(shell));
            let lacking: Vec<_> = names(&command, false).difference(&words).cloned().collect();
            assert_eq!(lacking, [""; 0], "{shell}");
            // "device" is a word of a help text, too.
            let options: Vec<_> =
                hidden.iter().filter(|name| name.starts_with("--") && words.contains(*name)).collect();
            assert_eq!(options, [""; 0], "{shell}");
        }
    }

    #[test]
    fn bash_offers_the_visible_subcommands() {
        let asked = format!(
            "{}\nCOMP_WORDS=(cofferdam ''); COMP_CWORD=1; _cofferdam cofferdam '' cofferdam; echo \"${{COMPREPLY[*]}}\"",
            script(Shell::Bash)
        );
        let answer = process::Command::new("bash").args(["--norc", "-c", &asked]).output().unwrap();
        let offered = String::from_utf8(answer.stdout).unwrap();
        let offered: BTreeSet<_> = offered.split_whitespace().filter(|word| !word.starts_with('-')).collect();
        let command = Cli::command();
        let visible = command.get_subcommands().filter(|command| !command.is_hide_set()).map(Command::get_name);
        assert_eq!(offered, visible.chain(["help"]).collect());
    }

    #[test]
    fn manual_pages_are_of_what_is_visible() {
        let directory = tempfile::tempdir().unwrap();
        ManArgs { directory: directory.path().to_owned() }.execute().unwrap();
        for entry in fs::read_dir(directory.path()).unwrap() {
            let path = entry.unwrap().path();
            assert!(!path.ends_with("cofferdam-device.1"));
            let page = fs::read_to_string(&path).unwrap().replace("\\-", "-");
            for name in ["cofferdam-device", "--worker-of", "--enabled-early"] {
                assert!(!page.contains(name), "{name} in {}", path.display());
            }
        }
        assert!(directory.path().join("cofferdam-store-gc.1").exists());
    }
}
