//! Builds whose command runs on a person's terminal.

use std::{os::fd::AsFd, process::Command};

use cofferdam_tests::{Build, Cofferdam, Daemon, Running};
use nix::{pty::openpty, sys::signal::Signal};

/// A shell in a machine, on a terminal of 30 rows and 100 columns.
fn in_shell(build: Build<'_>) -> Running {
    let running = build.switch("-it").switch("--bin-sh").on_terminal((30, 100)).start(["/bin/sh"]);
    running.wait_for("$ ");
    running
}

/// The settings of a program's terminal.
fn settings(running: &Running) -> String {
    stty(running.terminal())
}

/// The settings of a new terminal, as each program finds its own here.
fn as_new() -> String {
    stty(openpty(None, None).expect("a pseudo-terminal can be made").master)
}

fn stty(terminal: impl AsFd) -> String {
    let terminal = terminal.as_fd().try_clone_to_owned().expect("descriptors can be copied");
    let stty = Command::new("stty").arg("-g").stdin(terminal).output().expect("stty is there");
    String::from_utf8(stty.stdout).expect("it prints numbers")
}

/// Uses a shell as a person does.
fn use_shell(running: &Running) {
    running.types("tty; stty size; pwd; echo $TERM $(id -u) $(id -g)\n");
    for answer in ["/dev/pts/0", "30 100", "/build", "dumb 1000 100"] {
        running.wait_for(&format!("{answer}\r\n"));
    }
    // The terminal controls what runs in front: it learns of a new size, and Ctrl-C ends it, while the shell stays.
    let in_front =
        r#"sh -c 'trap "echo now \$(stty size)" WINCH; echo trap is set$((1 + 1)); while :; do sleep 0.1; done'"#;
    running.types(&format!("{in_front}\n")).wait_for("trap is set2\r\n");
    running.resizes((40, 120)).wait_for("now 40 120\r\n").types("\x03");
    running.types("echo still $((6 * 7))\n").wait_for("still 42\r\n");
}

#[test]
fn a_command_has_the_persons_terminal_and_gives_its_status_and_outputs() {
    let cofferdam = Cofferdam::new();
    let running = in_shell(cofferdam.build().output("build/out").exported());
    use_shell(&running);
    running.types("echo made > out; exit\n");
    assert_eq!(running.end().succeeds().read("build/out"), "made\n");

    let running = in_shell(cofferdam.build());
    let within = settings(&running);
    running.types("exit 7\n");
    let (ended, after) = running.end_with(settings);
    let ended = ended.exits_with(7);
    assert_eq!(ended.json()["fields"]["exit_code"], 7, "{ended}");
    assert!(!ended.stderr.contains("error:"), "{ended}");
    assert_ne!(within, as_new(), "it is in raw mode while the command runs");
    assert_eq!(after, as_new());

    let running = in_shell(cofferdam.build());
    running.types("kill -KILL $$\n");
    running.end().exits_with(128 + 9).says("signal 9");
}

#[test]
fn pasted_input_that_nobody_reads_holds_up_no_outputs() {
    let cofferdam = Cofferdam::new();
    let build = cofferdam.build().switch("-i").switch("--bin-sh").output("build/out").on_terminal((24, 80));
    let script = "stty raw; head -c 300000 /dev/zero > out; echo ready; head -c 1 > /dev/null";
    let running = build.start(["/bin/sh", "-c", script]);
    running.wait_for("ready").types(&"x".repeat(3000));
    running.end().succeeds();
}

#[test]
fn an_interrupt_gives_the_terminal_back() {
    let cofferdam = Cofferdam::new();
    let running = in_shell(cofferdam.build());
    let within = settings(&running);
    running.types("sleep 1000\n").wait_for("sleep 1000\r\n").signal(Signal::SIGTERM);
    let (ended, after) = running.end_with(settings);
    ended.exits_with(3);
    assert!(within != after && after == as_new());
}

#[test]
fn a_daemon_lends_its_builds_the_clients_terminal() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "[build]\nsilence = \"1s\"");
    let running = in_shell(cofferdam.build().on(&daemon).output("build/out").exported());
    use_shell(&running);
    running.types("sleep 3; echo made > out; exit\n");
    let first = running.end().succeeds();
    assert_eq!(first.read("build/out"), "made\n");
    // The same again runs again.
    let running = in_shell(cofferdam.build().on(&daemon).output("build/out"));
    running.types("exit 5\n");
    let second = running.end().exits_with(5);
    assert_ne!(first.build_id(), second.build_id());

    let running = in_shell(cofferdam.build().on(&daemon));
    let within = settings(&running);
    daemon.running().signal(Signal::SIGKILL);
    let (ended, after) = running.end_with(settings);
    ended.exits_with(3).says("went away");
    assert!(within != after && after == as_new());
    daemon.end_of();
    let again = Daemon::start(&cofferdam, "");
    again.end().succeeds();
}

#[test]
fn an_interactive_build_needs_a_terminal() {
    let cofferdam = Cofferdam::new();
    for flag in ["-it", "-i", "-t", "--interactive"] {
        let refused = cofferdam.build().switch(flag).without_slot().shell("true");
        refused.is_refused("command_line").says("--interactive needs a terminal for stdin and stderr");
    }
}
