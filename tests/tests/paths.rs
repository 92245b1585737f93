//! Paths of the host: builds see only allowed ones, read-only.

use std::{
    ffi::OsStr,
    fs, io,
    os::unix::fs::{PermissionsExt, symlink},
};

use cofferdam::{
    machine::vmm::{Accelerator, kvm_nests},
    request::SYSTEM,
};
use cofferdam_tests::{Cofferdam, Daemon, Outcome, guest, image, vmm};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Files on the host: `data` and `file` are allowed, `secret` isn't.
fn host() -> io::Result<TempDir> {
    let host = tempfile::tempdir()?;
    let at = |path: &str| host.path().join(path);
    fs::create_dir_all(at("data/sub"))?;
    fs::write(at("data/sub/file"), "from the host\n")?;
    fs::write(at("data/private"), "for root alone\n")?;
    fs::set_permissions(at("data/private"), PermissionsExt::from_mode(0o600))?;
    fs::write(at("file"), "a file alone\n")?;
    fs::write(at("secret"), "secret\n")?;
    symlink("../secret", at("data/out"))?;
    symlink(at("secret"), at("data/absolute"))?;
    symlink("sub/file", at("data/link"))?;
    Ok(host)
}

/// A daemon that allows `data` and `file`.
fn start(cofferdam: &Cofferdam, host: &TempDir) -> Daemon {
    let [data, file] = ["data", "file"].map(|name| host.path().join(name));
    Daemon::start(cofferdam, &format!("[host_paths]\n'/opt/data' = {data:?}\n'/etc/key' = {file:?}"))
}

/// Runs a script that makes `build/out` on a daemon that allows the paths.
fn build(cofferdam: &Cofferdam, host: &TempDir, asked: &[&str], script: &str) -> Outcome {
    build_on(start(cofferdam, host), cofferdam, asked, script)
}

fn build_on(daemon: Daemon, cofferdam: &Cofferdam, asked: &[&str], script: &str) -> Outcome {
    let outcome = cofferdam.build().on(&daemon).exported().request(&request(asked, script));
    daemon.end().succeeds();
    assert_eq!(cofferdam.processes(), []);
    outcome
}

fn request(asked: &[&str], script: &str) -> Value {
    json!({
        "commandArgs": ["/bin/sh", "-c", script],
        "workingDir": "build",
        "scratchPaths": ["build"],
        "inputsDir": "inputs",
        "outputs": ["build/out"],
        "constraints": { "system": SYSTEM, "provideBinSh": true, "availableRoPaths": asked },
    })
}

#[test]
fn allowed_paths_are_readable_and_lead_nowhere_else() {
    let host = host().unwrap();
    let script = "
        try() { \"$@\" 2>/dev/null && echo \"$* succeeded\"; }
        { cat /opt/data/sub/file /opt/data/link /etc/key
          ls /opt/data /opt
          stat -c '%A %u:%g' /opt/data /opt/data/sub/file /etc/key
          head -c 1000000 /dev/zero | tr '\\0' x > big && cp big /build/big2
          for path in private out absolute ../secret sub/../../secret; do try cat /opt/data/$path; done
          try touch /opt/data/new
          try touch /opt/data/sub/file
          try rm /opt/data/sub/file
          try mkdir /opt/data/d
          try chmod 777 /opt/data/sub/file
          try ln /opt/data/sub/file /opt/data/hard
          try mv /opt/data/sub /opt/data/moved
          try sh -c 'echo x >> /etc/key'
          readlink /opt/data/out
        } > out";
    let cofferdam = Cofferdam::new();
    let built = build(&cofferdam, &host, &["/etc/key", "/opt/data"], script).succeeds();
    let expected = "from the host\nfrom the host\na file alone\n\
        /opt:\ndata\n\n/opt/data:\nabsolute\nlink\nout\nprivate\nsub\n\
        dr-xr-xr-x 0:0\n-r--r--r-- 0:0\n-r--r--r-- 0:0\n../secret\n";
    assert_eq!(built.read("build/out"), expected, "{built}");
    assert_eq!(fs::read_to_string(host.path().join("data/sub/file")).unwrap(), "from the host\n");
    assert_eq!(fs::read_dir(host.path().join("data")).unwrap().count(), 5);
}

#[test]
fn a_build_that_asks_for_none_sees_none() {
    let cofferdam = Cofferdam::new();
    let built = build(&cofferdam, &host().unwrap(), &[], "ls -d /opt /etc/key > out 2>&1; true").succeeds();
    assert_eq!(built.read("build/out").matches("No such file").count(), 2);
}

#[test]
fn forbidden_paths_are_refused_by_name() {
    for (asked, rule) in [
        ("/etc/shadow", "must have only those that the host's configuration allows (got \"/etc/shadow\")"),
        ("/opt/data/sub", "must have only those that the host's configuration allows (got \"/opt/data/sub\")"),
        ("/dev/kvm", "must not have this: builds of this host run no VMs of their own (got \"/dev/kvm\")"),
    ] {
        let refused = build(&Cofferdam::new(), &host().unwrap(), &[asked], "true").is_refused("unsupported");
        refused.says(&format!("constraints.available_ro_paths {rule}"));
    }
}

#[test]
fn a_path_removed_since_the_daemons_start_is_named() {
    let (cofferdam, host) = (Cofferdam::new(), host().unwrap());
    let daemon = start(&cofferdam, &host);
    fs::remove_file(host.path().join("file")).unwrap();
    let failed = build_on(daemon, &cofferdam, &["/etc/key"], "true").exits_with(3);
    failed.says(&format!("can't show builds the path {}", host.path().join("file").display()));
}

#[test]
fn a_dead_opener_ends_its_build_and_is_named() {
    let (cofferdam, host) = (Cofferdam::new(), host().unwrap());
    let daemon = start(&cofferdam, &host);
    let request = cofferdam.file("request.json", request(&["/etc/key"], "echo ready; sleep 1000").to_string());
    let request = request.to_str().expect("temporary directories are UTF-8");
    let running = cofferdam.start_command(["build", "--json", "--daemon", &daemon.addr(), request]);
    running.wait_for("ready");
    let opener = cofferdam.processes().into_iter().find(|process| process.command_line.contains("paths' opener"));
    opener.expect("the build sees a path").kill();
    running.end().executor_fails("process_died").says("paths' opener died").says("SIGKILL");
    daemon.end().succeeds();
    assert_eq!(cofferdam.processes(), []);
}

/// The guest's own kernel already stops a build. A guest that has been taken over can ask the device directly.
#[test]
fn a_hostile_guest_only_reads_world_readable_files() {
    let images = tempfile::tempdir().unwrap();
    guest::hostile_image(images.path(), "use paths");
    let host = host().unwrap();
    let ended = build(&Cofferdam::with_image(images.path()), &host, &["/opt/data"], "true").executor_fails("guest");
    ended.says("sub/file has 14 bytes; succeeded beside: []");
    assert_eq!(fs::read_to_string(host.path().join("data/sub/file")).unwrap(), "from the host\n");
    assert_eq!(fs::read_dir(host.path().join("data")).unwrap().count(), 5);
}

#[test]
fn builds_can_run_machines_only_with_nested() {
    let cofferdam = Cofferdam::new();
    let probe = fs::read(guest::probe()).expect("it has been compiled");
    let request = json!({
        "commandArgs": ["/bin/sh", "-c", "cp probe run && chmod +x run && ./run kvm && stat -c %A /dev/kvm"],
        "workingDir": "build",
        "scratchPaths": ["build"],
        "inputsDir": "inputs",
        "additionalFiles": [{ "path": "build/probe", "contents": data_encoding::BASE64.encode(&probe) }],
        "constraints": { "system": SYSTEM, "provideBinSh": true, "availableRoPaths": ["/dev/kvm"] },
    });
    let build = |daemon: &Daemon| cofferdam.build().on(daemon).request(&request);
    let daemon = Daemon::start(&cofferdam, "");
    build(&daemon).is_refused("unsupported").says("constraints.available_ro_paths");
    daemon.end().succeeds();
    if vmm::choice().accelerator == Accelerator::Kvm && !kvm_nests() {
        let file = cofferdam.file("nested.toml", "nested = true");
        let refused = cofferdam.command([OsStr::new("daemon"), OsStr::new("--config"), file.as_os_str()]);
        refused.exits_with(2).says("this host's KVM has `nested` off");
        return;
    }
    // With one CPU: a kernel with KVM patches its own code, and doesn't survive that on two CPUs emulated by QEMU 7.2.
    let daemon = Daemon::start(&cofferdam, "nested = true\n[build]\ncpus = 1");
    let kernel = fs::read_to_string(image().0.join("made-from")).expect("images say what they are made from");
    if kernel.contains("linux-image") {
        build(&daemon).succeeds().says("crw-rw-rw-");
    } else {
        build(&daemon).executor_fails("guest").says("provide /dev/kvm: the guest's kernel has no KVM");
    }
    daemon.end().succeeds();
}
