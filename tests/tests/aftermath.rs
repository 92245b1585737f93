//! After a failed build: its remains, and a shell in its machine.

use std::{fs, thread, time::Duration};

use cofferdam_tests::{Build, Cofferdam, Outcome, Running, guest, stretched};
use nix::sys::signal::Signal;

/// The node of the remains, from the object on stdout.
#[track_caller]
fn kept(ended: &Outcome) -> String {
    let json = ended.json();
    json["fields"]["kept"].as_str().unwrap_or_else(|| panic!("nothing was kept: {ended}")).to_owned()
}

#[test]
fn remains_of_a_failed_build_can_be_exported() {
    let cofferdam = Cofferdam::new();
    let input = cofferdam.file("input", "not the build's own");
    let build = cofferdam.build().switch("--keep-failed").input("stays", &input).input("goes", &input);
    let build = build.flag("--scratch", "inputs").output("build/out");
    let failed = build
        .shell(
            "mkdir -p out/deep; echo half > out/deep/file; ln -s deep out/link; chmod 700 out/deep/file
             mkfifo out/pipe; echo temporary > /tmp/file
             echo new > /inputs/new; rm -f /inputs/goes; test ! -e /inputs/goes && exit 7",
        )
        .build_fails("exit_code");
    let node = kept(&failed);
    let failed = failed.says(&format!("kept: {node}, 1 left out")).says("try: cofferdam export dir:");
    assert_eq!(failed.json()["fields"]["kept_skipped"], 1, "{failed}");
    assert_eq!(failed.json()["fields"]["exit_code"], 7, "{failed}");
    let root = cofferdam.export(&node);
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    assert_eq!(read("build/out/deep/file"), "half\n");
    assert_eq!(read("build/out/link/file"), "half\n");
    assert_eq!(read("tmp/file"), "temporary\n");
    let names: Vec<_> = fs::read_dir(root.join("inputs")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["new"]);
}

#[test]
fn every_kind_of_failure_has_remains() {
    let cofferdam = Cofferdam::new();
    let limit = |time| format!("{}s", stretched(Duration::from_secs(time)).as_secs());
    let keeping = || cofferdam.build().switch("--keep-failed").output("build/out");
    let cases = [
        (keeping(), "echo here > trace; kill -SEGV $$; sleep 5", "signal"),
        (keeping().memory("200M"), "echo here > trace; tail /dev/zero", "out_of_memory"),
        (keeping().flag("--scratch-size", "64M"), "echo here > trace; cat /dev/zero > big", "scratch_full"),
        (keeping(), "echo here > trace", "output_missing"),
        (keeping(), "echo here > trace; mkfifo out", "output_unsupported"),
        (keeping().flag("--silence", limit(10)), "echo here > trace; sleep 1000", "silence"),
        (keeping().flag("--timeout", limit(45)), "echo here > trace; while sleep 1; do echo x; done", "timeout"),
        (keeping().flag("--log-limit", "64K"), "echo here > trace; yes", "limit_reached"),
    ];
    // Some builds only wait.
    thread::scope(|scope| {
        for (build, script, reason) in cases {
            scope.spawn(|| {
                let failed = build.shell(script).build_fails(reason);
                let root = cofferdam.export(&kept(&failed));
                assert_eq!(fs::read_to_string(root.join("build/trace")).unwrap(), "here\n", "{failed}");
            });
        }
    });
}

#[test]
fn remains_stay_within_the_output_limits() {
    let cofferdam = Cofferdam::new();
    let build = cofferdam.build().switch("--keep-failed").flag("--output-limit", "1M");
    let failed = build.shell("echo small > a; head -c 2097152 /dev/zero > b; echo small > c; exit 1");
    let failed = failed.build_fails("exit_code");
    let root = cofferdam.export(&kept(&failed));
    assert!(root.join("build/a").exists() && root.join("build/c").exists() && !root.join("build/b").exists());
    assert_eq!(failed.json()["fields"]["kept_skipped"], 1, "{failed}");
}

/// A failed build with a shell in its machine.
fn in_shell(build: Build<'_>, script: &str) -> Running {
    let running = build.switch("--shell-on-failure").on_terminal((30, 100)).start_shell(script);
    running.wait_for("the machine ends with it").wait_for("$ ");
    running
}

#[test]
fn a_shell_has_the_failed_builds_environment() {
    let cofferdam = Cofferdam::new();
    let build = cofferdam.build().flag("--env", "GREETING=hello").switch("--keep-failed");
    let running = in_shell(build, "echo left > trace; exit 7");
    running.types("stty size; pwd; cat trace; echo $GREETING $TERM; echo $(id -u) $(id -g)\n");
    for answer in ["30 100", "/build", "left", "hello dumb", "1000 100"] {
        running.wait_for(&format!("{answer}\r\n"));
    }
    running.resizes((40, 120)).types("until stty size | grep 40; do sleep 0.1; done; echo now $(stty size)\n");
    running.wait_for("now 40 120\r\n");
    // The terminal controls the shell: Ctrl-C ends the foreground command, and the shell stays.
    running.types("sh -c 'echo in front; sleep 1000'\n").wait_for("in front\r\n").types("\x03");
    running.types("tty; echo still $((6 * 7))\n").wait_for("/dev/pts/0\r\n").wait_for("still 42\r\n");
    // The shell is confined as the build was.
    running.types("grep -c . /proc/net/dev; mount -t tmpfs x /build || echo nothing is mounted\n");
    running.wait_for("nothing is mounted\r\n");
    running.types("echo afterwards > trace; exit\n");
    let ended = running.end().build_fails("exit_code");
    assert_eq!(ended.json()["fields"]["exit_code"], 7, "{ended}");
    // The remains were kept before the shell could change them.
    assert_eq!(fs::read_to_string(cofferdam.export(&kept(&ended)).join("build/trace")).unwrap(), "left\n");
}

#[test]
fn a_build_without_a_shell_of_its_own_gets_one() {
    let cofferdam = Cofferdam::new();
    let build = cofferdam.build().input("probe", guest::probe()).switch("--shell-on-failure").on_terminal((24, 80));
    let running = build.start(["/inputs/probe", "nonsense"]);
    running.wait_for("the machine ends with it").wait_for("$ ");
    running.types("ls /bin/sh; ls -d /inputs/*; exit\n").wait_for("/inputs/probe\r\n");
    running.end().build_fails("exit_code").says("/bin/sh: No such file");
}

#[test]
fn a_shell_ends_at_its_time_limit_and_on_an_interrupt() {
    let cofferdam = Cofferdam::new();
    let limit = stretched(Duration::from_secs(5));
    let running = in_shell(cofferdam.build().flag("--shell-timeout", format!("{}s", limit.as_secs())), "exit 3");
    running.types("yes\n");
    running.end().build_fails("exit_code").says("y\r\ny\r\n");

    let running = in_shell(cofferdam.build(), "exit 3");
    running.types("sleep 1000\n").wait_for("sleep 1000\r\n").signal(Signal::SIGTERM);
    running.end().build_fails("exit_code");
}

#[test]
fn a_shell_needs_a_terminal() {
    let cofferdam = Cofferdam::new();
    let refused = cofferdam.build().switch("--shell-on-failure").without_slot().shell("true");
    refused.is_refused("command_line").says("--shell-on-failure needs a terminal").says("--keep-failed");
}
