//! The command's environment: variables, working directory, machine, files.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

use cofferdam_tests::Cofferdam;
use serde_json::json;

#[test]
fn the_environment_is_exactly_the_requested_one() {
    let cofferdam = Cofferdam::new();
    // The shell's initial environment, without its own changes.
    let script = "cat /proc/$$/environ > out; true";
    let build = cofferdam.build().output("build/out").exported();
    let built = build
        .flag("--env", "PATH=/path-not-set")
        .flag("--env", "EMPTY=")
        .flag("--env", "LINES=one\ntwo=2 ")
        .flag("--env", OsStr::from_bytes(b"BYTES=\xff\x01"))
        .flag("--env", "with space=and \"quotes\"")
        .shell(script)
        .succeeds();
    let expected = b"BYTES=\xff\x01\0EMPTY=\0LINES=one\ntwo=2 \0PATH=/path-not-set\0with space=and \"quotes\"\0";
    let found = built.read_bytes("build/out");
    assert_eq!(found.escape_ascii().to_string(), expected.escape_ascii().to_string());

    let built = cofferdam.build().output("build/out").exported().shell(script).succeeds();
    assert_eq!(built.read_bytes("build/out"), b"", "an empty environment is not empty");
}

#[test]
fn a_build_has_its_memory_and_cpus() {
    let cofferdam = Cofferdam::new();
    let asked_mib: u64 = 700;
    let built = cofferdam
        .build()
        .memory("700M")
        .flag("--cpus", "1")
        .output("build/facts")
        .exported()
        .shell(
            "sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo > facts
             nproc >> facts
             # All of it in one piece, every byte written.
             dd if=/dev/zero of=/dev/null bs=700M count=1",
        )
        .succeeds();
    let facts = built.read("build/facts");
    let [total_kib, processors] = facts.lines().collect::<Vec<_>>()[..] else { panic!("{facts}") };
    assert!(total_kib.parse::<u64>().unwrap() >= asked_mib * 1024, "{facts}");
    assert_eq!(processors, "1");
}

#[test]
fn a_build_has_its_min_memory() {
    let cofferdam = Cofferdam::new();
    let request = json!({
        "commandArgs": ["/bin/sh", "-c", "dd if=/dev/zero of=/dev/null bs=600M count=1"],
        "workingDir": "tmp",
        "constraints": { "system": "x86_64-linux", "minMemory": (600_u64 << 20).to_string(), "provideBinSh": true },
    });
    cofferdam.build().request(&request).succeeds();
}

#[test]
fn a_shell_is_provided_only_on_request() {
    let cofferdam = Cofferdam::new();
    let refused = cofferdam.build().run(["/bin/sh", "-c", "true"]).build_fails("command_not_found");
    refused.says("\"/bin/sh\"").says("--bin-sh");
}

#[test]
fn the_shell_can_be_replaced_only_where_the_build_may_write() {
    let cofferdam = Cofferdam::new();
    let replace = "cat /bin/sh > sh && chmod +x sh && mv sh /bin/sh && /bin/sh -c 'echo replaced > out'";
    cofferdam.build().shell(replace).build_fails("exit_code");
    let build = cofferdam.build().flag("--scratch", "build").flag("--scratch", "bin").output("build/out").exported();
    assert_eq!(build.shell(replace).succeeds().read("build/out"), "replaced\n");

    let request = json!({
        "commandArgs": ["/bin/sh"],
        "workingDir": "build",
        "scratchPaths": ["build"],
        "additionalFiles": [{ "path": "bin/sh", "contents": data_encoding::BASE64.encode(b"of the request") }],
        "constraints": { "system": "x86_64-linux", "provideBinSh": true },
    });
    // It isn't executable, and isn't hidden by the shell.
    cofferdam.build().request(&request).build_fails("command_not_executable");
}

#[test]
fn scratch_paths_may_be_many_and_nested() {
    let cofferdam = Cofferdam::new();
    let built = cofferdam
        .build()
        .flag("--scratch", "a")
        .flag("--scratch", "a/b/c")
        .flag("--scratch", "var/cache")
        .flag("--workdir", "var/cache")
        .output("a/b/c/out")
        .output("a/out")
        .output("var/cache/out")
        .exported()
        .shell(
            "pwd > out
             echo outer > /a/out; echo between > /a/b/file; echo inner > /a/b/c/out
             for place in / /var /etc /inputs; do
                 touch $place/new 2>/dev/null && echo $place can be written >> out
             done
             true",
        )
        .succeeds();
    assert_eq!(built.read("var/cache/out"), "/var/cache\n", "{built}");
    assert_eq!(built.read("a/out"), "outer\n");
    assert_eq!(built.read("a/b/c/out"), "inner\n");
}

#[test]
fn additional_files_are_placed_byte_for_byte() {
    let cofferdam = Cofferdam::new();
    let contents: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    let base64 = |bytes: &[u8]| data_encoding::BASE64.encode(bytes);
    let script = "cp /etc/deep/read-only out
                  echo more >> deep/writable && cat deep/writable > appended
                  touch /etc/deep/read-only 2>/dev/null && exit 9
                  cat /etc/passwd > passwd; test ! -s empty";
    let request = json!({
        "commandArgs": ["/bin/sh", "-c", script],
        "workingDir": "build",
        "scratchPaths": ["build"],
        "outputs": ["build/appended", "build/out", "build/passwd"],
        "constraints": { "system": "x86_64-linux", "provideBinSh": true },
        "additionalFiles": [
            { "path": "build/deep/writable", "contents": base64(b"some\n") },
            { "path": "build/empty" },
            { "path": "etc/deep/read-only", "contents": base64(&contents) },
            { "path": "etc/passwd", "contents": base64(b"mine") },
        ],
    });
    let built = cofferdam.build().exported().request(&request).succeeds();
    assert!(built.read_bytes("build/out") == contents, "the file has other bytes");
    assert_eq!(built.read("build/appended"), "some\nmore\n");
    assert_eq!(built.read("build/passwd"), "mine");
}

#[test]
fn background_processes_end_with_the_command() {
    let cofferdam = Cofferdam::new();
    let built = cofferdam
        .build()
        .output("build/a-growing")
        .output("build/b-large")
        .output("build/c-growing")
        .shell(
            "sleep 1000 &
             setsid sleep 1000 &
             grow='trap \"\" TERM HUP INT; while true; do echo x >> /build/a-growing; done'
             (setsid sh -c \"$grow\" > /dev/null 2>&1 &)
             while [ ! -s a-growing ]; do sleep 0.1; done
             ln a-growing c-growing; truncate -s 64M b-large
             echo the command ends",
        )
        .succeeds()
        .says("the command ends");
    // The same file is sent twice, the second time much later.
    let [first, _, second] = &built.outputs()[..] else { panic!("{built}") };
    assert_eq!(first.node, second.node, "something wrote after the command had ended");
}
