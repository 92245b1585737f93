//! The memory of each process of one build.

use std::{fs, thread, time::Duration};

use anyhow::{Context as _, Result};
use cofferdam::request::SYSTEM;
use cofferdam_tests::{Cofferdam, Daemon, processes::Memory};
use nix::sys::signal::Signal;
use serde_json::json;
use tempfile::TempDir;

/// The memory that the build is promised, and that of its machine, in MiB.
const PROMISED_MIB: u64 = 2048;
const MACHINE_MIB: u64 = PROMISED_MIB + PROMISED_MIB / 16 + 160;

/// How long the guest has been idle before the measurement.
const SETTLES: Duration = Duration::from_secs(2);

/// An idle build that sees its inputs and a path of the host, and so has two devices.
pub(crate) fn idle_build(directory: &TempDir) -> Result<()> {
    let shown = directory.path().join("shown");
    fs::create_dir(&shown)?;
    let cofferdam = Cofferdam::new();
    let config = format!("[build]\nmemory = \"{PROMISED_MIB}M\"\n[host_paths]\n'/opt/shown' = {shown:?}");
    let daemon = Daemon::start(&cofferdam, &config);
    let request = json!({
        "commandArgs": ["/bin/sh", "-c", "echo ready; sleep 1000"],
        "workingDir": "build",
        "scratchPaths": ["build"],
        "inputsDir": "inputs",
        "outputs": ["build/out"],
        "constraints": { "system": SYSTEM, "provideBinSh": true, "availableRoPaths": ["/opt/shown"] },
    });
    let request = cofferdam.file("request.json", request.to_string());
    let request = request.to_str().context("temporary directories are UTF-8")?;
    let build = cofferdam.start_command(["build", request, "--daemon", &daemon.addr()]);
    build.wait_for("ready");
    thread::sleep(SETTLES);
    let daemon_pid = daemon.running().pid();
    let helpers = cofferdam.processes().into_iter().filter(|process| process.parent == daemon_pid);
    let named = helpers.map(|helper| {
        let devices = ["inputs' device", "paths' device", "paths' opener"];
        let device = devices.into_iter().find(|name| helper.command_line.contains(name));
        (device.map_or(helper.name, str::to_owned), helper.pid)
    });
    let (mut own, mut shared) = (0, 0);
    for (name, pid) in named.chain([("daemon".to_owned(), daemon_pid)]) {
        let memory = Memory::of(pid).with_context(|| format!("the {name} has ended"))?;
        (own, shared) = (own + memory.own, shared + memory.shared);
        report(&format!("idle build : {name}"), memory.own);
    }
    report("idle build : all of them", own);
    report(&format!("idle build : the machine's {MACHINE_MIB} MiB, so far"), shared);
    build.signal(Signal::SIGINT);
    drop(build);
    daemon.end().succeeds();
    Ok(())
}

fn report(what: &str, bytes: u64) {
    println!("{what:<50} {:>6.1} MiB", bytes as f64 / f64::from(1 << 20));
}
