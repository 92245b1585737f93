//! A terminal with a program on one side. The test plays the person on the other side.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
    process::{Command, Stdio},
};

use nix::{
    fcntl::OFlag,
    pty::{grantpt, posix_openpt, ptsname_r, unlockpt},
};

/// A pseudo-terminal.
#[derive(Debug)]
pub(crate) struct Terminal {
    person: File,
    program: OwnedFd,
}

impl Terminal {
    /// Makes a terminal with this many rows and columns. Programs that other tests start at this time don't inherit it.
    pub(crate) fn new(size: (u16, u16)) -> Self {
        let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC);
        let master = master.expect("a pseudo-terminal can be made");
        grantpt(&master).and_then(|()| unlockpt(&master)).expect("it is ours");
        let program = ptsname_r(&master).expect("it has a name");
        let program = OpenOptions::new().read(true).write(true).custom_flags(OFlag::O_NOCTTY.bits()).open(program);
        let person = File::from(master.as_fd().try_clone_to_owned().expect("descriptors can be copied"));
        resize(&person, size);
        Self { person, program: program.expect("it is unlocked").into() }
    }

    /// The command with its stdin and stderr on this terminal, as its controlling terminal.
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

    /// The person's side. The program's side is closed here.
    pub(crate) fn into_person(self) -> File {
        self.person
    }
}

/// Types a text.
pub(crate) fn type_into(mut person: &File, text: &str) {
    person.write_all(text.as_bytes()).expect("the terminal is there");
}

/// Changes the size. The terminal's processes get SIGWINCH.
pub(crate) fn resize(person: &File, (rows, columns): (u16, u16)) {
    let mut stty = Command::new("stty");
    stty.args(["rows", &rows.to_string(), "cols", &columns.to_string()]);
    let side = person.as_fd().try_clone_to_owned().expect("descriptors can be copied");
    assert!(stty.stdin(Stdio::from(side)).status().expect("stty is there").success());
}
