//! Failed builds: each reason has its own message, JSON and exit code.

use std::{fs, os::unix::fs::PermissionsExt as _, time::Duration};

use cofferdam_tests::{Cofferdam, SmallDisk, guest, stretched};

#[test]
fn an_exit_code_is_reported() {
    let cofferdam = Cofferdam::new();
    let failed = cofferdam.build().shell("echo last words; exit 7").build_fails("exit_code").says("last words");
    let failed = failed.says("the command exited with status 7");
    assert_eq!(failed.json()["fields"]["exit_code"], 7, "{failed}");
}

#[test]
fn a_signal_is_reported_by_number_and_name() {
    let cofferdam = Cofferdam::new();
    let failed = cofferdam.build().shell("kill -SEGV $$; sleep 5").build_fails("signal").says("signal 11 (SIGSEGV)");
    assert_eq!(failed.json()["fields"]["signal"], 11, "{failed}");
}

#[test]
fn a_missing_command_is_named() {
    let cofferdam = Cofferdam::new();
    let failed = cofferdam.build().run(["/inputs/missing", "argument"]).build_fails("command_not_found");
    let failed = failed.says("\"/inputs/missing\" was not found");
    assert_eq!(failed.json()["fields"]["command"], "/inputs/missing", "{failed}");
}

#[test]
fn an_unexecutable_command_is_named() {
    let cofferdam = Cofferdam::new();
    let text = cofferdam.file("text", "just text");
    let build = cofferdam.build().input("text", &text);
    build
        .run(["/inputs/text"])
        .build_fails("command_not_executable")
        .says("\"/inputs/text\"")
        .says("Permission denied");
}

#[test]
fn a_missing_working_directory_is_named() {
    let cofferdam = Cofferdam::new();
    let build = cofferdam.build().flag("--workdir", "inputs/nowhere");
    build.shell("true").build_fails("no_working_dir").says("\"inputs/nowhere\"").says("No such file");
}

#[test]
fn running_out_of_memory_is_reported_as_such() {
    let cofferdam = Cofferdam::new();
    let failed = cofferdam.build().memory("200M").shell("tail /dev/zero").build_fails("out_of_memory");
    let failed = failed.says("ran out of memory").says("--memory");
    assert_eq!(failed.json()["fields"]["memory_bytes"], 200 << 20, "{failed}");
}

#[test]
fn a_full_scratch_disk_is_reported_as_such() {
    let cofferdam = Cofferdam::new();
    let build = cofferdam.build().flag("--scratch-size", "64M");
    let failed = build.shell("dd if=/dev/zero of=big bs=1M count=100 || exit 4").build_fails("scratch_full");
    let failed = failed.says("filled its scratch disk").says("--scratch-size");
    assert_eq!(failed.json()["fields"]["scratch_bytes"], 64 << 20, "{failed}");
}

#[test]
fn a_build_that_takes_too_long_is_stopped() {
    let cofferdam = Cofferdam::new();
    // A guest that hangs while it boots is tried once more after a minute.
    let limit = stretched(Duration::from_secs(90));
    let build = cofferdam.build().flag("--timeout", format!("{}s", limit.as_secs()));
    let failed = build
        .shell("echo started; sleep 1000")
        .build_fails("timeout")
        .says("started")
        .says(&format!("within {} seconds", limit.as_secs()));
    assert!(failed.took >= limit && failed.took < limit + stretched(Duration::from_secs(60)), "{failed}");
    assert_eq!(failed.json()["fields"]["limit_seconds"], limit.as_secs_f64(), "{failed}");
}

#[test]
fn only_a_silent_command_is_stopped() {
    let cofferdam = Cofferdam::new();
    let limit = stretched(Duration::from_secs(8));
    let build = cofferdam.build().flag("--silence", format!("{}s", limit.as_secs()));
    let failed = build
        .shell("for n in 1 2 3 4 5 6 7 8 9 10; do echo spoke $n; sleep 1; done; sleep 1000")
        .build_fails("silence")
        .says("spoke 10")
        .says(&format!("wrote nothing for {} seconds", limit.as_secs()));
    assert_eq!(failed.json()["fields"]["limit_seconds"], limit.as_secs_f64(), "{failed}");
}

#[test]
fn too_many_processes_are_reported_as_such() {
    let cofferdam = Cofferdam::new();
    let script = "n=0; while [ $n -lt 40 ]; do sleep 100 & n=$((n + 1)); done; echo started all";
    let failed = cofferdam.build().flag("--processes", "20").shell(script).build_fails("too_many_processes");
    let failed = failed.says("more than the 20 processes").says("--processes");
    assert_eq!(failed.json()["fields"]["allowed"], 20, "{failed}");
    cofferdam.build().flag("--processes", "60").shell(script).succeeds().says("started all");
}

#[test]
fn limits_on_logs_and_outputs_name_their_flag() {
    let cofferdam = Cofferdam::new();
    let before = cofferdam.verified_blobs();
    for (flag, value, script, limit, allowed) in [
        ("--log-limit", "64K", "yes", "log_bytes", 65_536),
        ("--output-limit", "1M", "head -c 1048577 /dev/zero > out", "output_bytes", 1_048_576),
        ("--output-files", "5", "mkdir out; cd out; touch 1 2 3 4 5", "output_entries", 5),
    ] {
        let build = cofferdam.build().output("build/out").flag(flag, value);
        let failed = build.shell(script).build_fails("limit_reached").says(&format!("raise the limit with {flag}"));
        assert_eq!(failed.json()["fields"]["limit"], limit, "{failed}");
        assert_eq!(failed.json()["fields"]["allowed"], allowed, "{failed}");
    }
    assert_eq!(cofferdam.verified_blobs(), before);
}

#[test]
fn a_full_disk_of_the_host_is_the_executors_failure() {
    let cofferdam = Cofferdam::new();
    let _small = SmallDisk::at(&cofferdam.run_directory(), 16);
    let build = cofferdam.build().shell("dd if=/dev/zero of=big bs=1M count=64 conv=fsync");
    build.executor_fails("host").says("No space left on device");
}

#[test]
fn missing_outputs_are_all_named() {
    let cofferdam = Cofferdam::new();
    let build = cofferdam.build().output("build/a").output("build/b").output("build/c/d").output("elsewhere");
    let failed = build.shell("echo made > b").build_fails("output_missing");
    let failed = failed.says("\"build/a\", \"build/c/d\", \"elsewhere\"");
    assert_eq!(
        failed.json()["fields"]["outputs"],
        serde_json::json!(["build/a", "build/c/d", "elsewhere"]),
        "{failed}"
    );
}

#[test]
fn outputs_with_a_fifo_or_a_socket_are_refused_by_path() {
    let cofferdam = Cofferdam::new();
    let build = cofferdam.build().output("build/out");
    let failed = build.shell("mkdir -p out/deep; mkfifo out/deep/pipe").build_fails("output_unsupported");
    let failed = failed.says("a named pipe at \"deep/pipe\"");
    assert_eq!(failed.json()["fields"]["output"], "build/out", "{failed}");

    let build = cofferdam.build().output("build/out").input("probe", guest::probe());
    build.run(["/inputs/probe", "socket", "out"]).build_fails("output_unsupported").says("a Unix socket");
}

#[test]
fn refused_outputs_leave_nothing_in_the_store() {
    let cofferdam = Cofferdam::new();
    let before = cofferdam.verified_blobs();
    let build = cofferdam.build().output("build/out");
    build.shell("mkdir out; echo secret > out/a; mkfifo out/b").build_fails("output_unsupported");
    assert_eq!(cofferdam.verified_blobs(), before);
}

#[test]
fn a_missing_interpreter_is_named() {
    let cofferdam = Cofferdam::new();
    // A dynamic program, whose loader the machine doesn't have.
    let dynamic = fs::read("/bin/true").unwrap();
    for (contents, interpreter, advice) in [
        (&b"#!/nowhere/python3 -E\n"[..], "/nowhere/python3", "first line"),
        (b"#!/bin/sh\r\necho\r\n", "/bin/sh\\r", "line ends of Windows"),
        (&dynamic, "/lib64/ld-linux-x86-64.so.2", "as an input"),
    ] {
        let program = cofferdam.file("program", contents);
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let failed =
            cofferdam.build().input("program", &program).run(["/inputs/program"]).build_fails("interpreter_not_found");
        failed.says(&format!("needs \"{interpreter}\" to run")).says(advice);
    }
}

#[test]
fn an_output_that_was_meant_below_the_working_directory_is_found_there() {
    let cofferdam = Cofferdam::new();
    let failed = cofferdam.build().output("out").shell("echo > out; ln -s /nowhere link");
    failed.build_fails("output_missing").says("did you mean \"build/out\"?");
}
