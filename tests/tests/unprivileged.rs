//! The daemon without privileges, as its systemd unit runs it.

use std::{fs, os::unix::fs::MetadataExt as _};

use cofferdam_tests::{Cofferdam, Daemon, vmm};
use nix::{sys::signal::Signal, unistd::geteuid};

#[test]
fn a_daemon_and_its_builds_need_no_privileges() {
    let cofferdam = Cofferdam::unprivileged();
    let daemon = Daemon::start(&cofferdam, "");
    let input = cofferdam.file("input", "from here\n");
    let build = cofferdam.build().on(&daemon).input("in", &input).output("build/out").exported();
    let built = build.shell("cat /inputs/in | tee out; sleep 1000 & echo begun").succeeds().says("begun");
    assert_eq!(built.read("build/out"), "from here\n");

    let running = cofferdam.build().on(&daemon).start_shell("echo begun; sleep 1000");
    running.wait_for("begun");
    let by_root = geteuid().is_root();
    let processes = cofferdam.processes();
    for (_, name) in vmm::processes() {
        assert!(processes.iter().any(|process| process.command_line.contains(name)), "no {name} in {processes:#?}");
    }
    for process in processes {
        let status = fs::read_to_string(format!("/proc/{}/status", process.pid)).unwrap();
        let has = |key: &str, value: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
            line.is_some_and(|line| line.split_whitespace().all(|word| word == value))
        };
        assert!(!has("Uid", "0") && has("CapEff", "0000000000000000"), "{process:?}:\n{status}");
        let is_helper = !process.command_line.contains(" run ") && !process.command_line.contains(" daemon ");
        assert_eq!(process.is_walled, is_helper, "{process:?}");
        assert!(!by_root || has("NoNewPrivs", "1"), "{process:?}:\n{status}");
    }
    let state = fs::metadata(cofferdam.run_directory()).unwrap();
    assert_ne!(state.uid(), 0);
    running.signal(Signal::SIGINT);
    running.end().executor_fails("interrupted");
    daemon.end().succeeds();
}
