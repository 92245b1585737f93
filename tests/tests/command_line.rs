//! What `run` says, when, and to whom.

use cofferdam_tests::{Cofferdam, Daemon};

/// A line's time, as in 2026-01-31T12:00:00.000Z, and the rest.
fn stamped(line: &str) -> (&str, &str) {
    let (time, rest) = line.split_once(' ').unwrap_or_else(|| panic!("{line:?} has no time"));
    assert!(time.len() == 24 && time.starts_with("20") && time.ends_with('Z'), "{time:?} is no time");
    (time, rest)
}

#[test]
fn a_quiet_build_says_nothing_but_its_log_with_times_and_the_error() {
    let cofferdam = Cofferdam::new();
    let build = cofferdam.build().plain().switch("--quiet").switch("--timestamps").output("build/x").switch("--bin-sh");
    let script = "echo one; echo two >&2; exit 3";
    let failed = build.run(["/bin/sh", "-c", script, "sh", "--out", "result"]).exits_with(1);
    let lines: Vec<_> = failed.stderr.lines().collect();
    let [first, second, error, cause, hint] = lines[..] else { panic!("there are other lines: {failed}") };
    let ((first_time, first), (second_time, second)) = (stamped(first), stamped(second));
    assert_eq!((first, second), ("one", "two"), "{failed}");
    assert!(first_time <= second_time, "{failed}");
    assert_eq!((error, cause), ("error: the build failed", "  caused by: the command exited with status 3"));
    assert!(hint.starts_with("  hint: --out comes after `--`"), "{failed}");
    assert_eq!(failed.stdout, "");
}

#[test]
fn a_detached_build_goes_on_and_can_be_followed() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "");
    let detached = cofferdam.build().on(&daemon).plain().switch("--detach").output("build/out");
    let detached = detached.shell("echo made | tee out; echo late").succeeds();
    let id = detached.stdout.trim_end();
    assert_eq!(detached.stdout.lines().count(), 1, "{detached}");
    let builds = |arguments: &[&str]| {
        let address = daemon.addr();
        let daemon = ["builds", "--daemon", &address];
        cofferdam.command(daemon.iter().chain(arguments)).succeeds()
    };
    assert_eq!(builds(&["log", "--follow", id]).stdout, "made\nlate\n");
    // The log keeps no times.
    assert_eq!(builds(&["log", "--follow", "--timestamps", id]).stdout, "- made\n- late\n");
    let shown = builds(&["show", id]);
    assert!(shown.stdout.contains("state\tsucceeded\n") && shown.stdout.contains("output\tfile:"), "{shown}");
    daemon.end();

    let refused = cofferdam.build().switch("--detach").shell("true").is_refused("command_line");
    refused.says("--detach is for daemons").says("name a daemon with --daemon");
}
