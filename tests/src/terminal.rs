//! A terminal, with a program on it and a test in the place of a person.

use std::{
    fs::File,
    io::Write,
    os::fd::{AsFd, OwnedFd},
    process::{Command, Stdio},
};

use nix::pty::{Winsize, openpty};

/// A pseudo-terminal.
#[derive(Debug)]
pub(crate) struct Terminal {
    person: File,
    program: OwnedFd,
}

impl Terminal {
    /// One of this many rows and columns.
    pub(crate) fn new((rows, columns): (u16, u16)) -> Self {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pair = openpty(&size, None).expect("a pseudo-terminal can be made");
        Self { person: pair.master.into(), program: pair.slave }
    }

    /// The same command, its stdin and stderr on this terminal, which controls it.
    pub(crate) fn put_on(&self, command: &Command) -> Command {
        let side = || Stdio::from(self.program.try_clone().expect("descriptors can be copied"));
        let mut this = Command::new("setsid");
        this.arg("--ctty").arg(command.get_program()).args(command.get_args()).stdin(side()).stderr(side());
        this.env("TERM", "dumb");
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => this.env(key, value),
                None => this.env_remove(key),
            };
        }
        if let Some(directory) = command.get_current_dir() {
            this.current_dir(directory);
        }
        this
    }

    /// What the person sees and types; the program's side is left to the program.
    pub(crate) fn into_person(self) -> File {
        self.person
    }
}

/// Types a text.
pub(crate) fn type_into(mut person: &File, text: &str) {
    person.write_all(text.as_bytes()).expect("the terminal is there");
}

/// Changes the size, of which whoever runs there is told.
pub(crate) fn resize(person: &File, (rows, columns): (u16, u16)) {
    let mut stty = Command::new("stty");
    stty.args(["rows", &rows.to_string(), "cols", &columns.to_string()]);
    let side = person.as_fd().try_clone_to_owned().expect("descriptors can be copied");
    assert!(stty.stdin(Stdio::from(side)).status().expect("stty is there").success());
}
