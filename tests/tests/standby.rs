//! Standby machines: which builds take one, what a build sees of its machine's time in stock, and what becomes of machines
//! that nobody takes.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::Write as _,
    time::Duration,
};

use cofferdam::request::SYSTEM;
use cofferdam_tests::{
    Build, Cofferdam, Daemon, Lab, Outcome, RESOLVER, guest, image, processes::Process, telemetry::scrape, vmm,
};
use nix::sys::signal::Signal;
use serde_json::Value;

const LAB: &str = env!("CARGO_BIN_EXE_network-lab");

/// A stock of one machine beside one build.
const CONFIG: &str = "
    reuse = \"off\"
    [budget]
    builds = 2
    cpus = 4
    memory = '4G'
    [build]
    cpus = 1
    [standby]
    machines = 1
";

/// Two machines in stock beside one build.
fn two_machines() -> String {
    CONFIG.replace("machines = 1", "machines = 2").replace("builds = 2", "builds = 3")
}

/// The same, and a server that builds may reach.
fn networked_config() -> String {
    let config = two_machines();
    format!(
        "{config}
        [network]
        allow = ['good.example']
        allow_addresses = ['93.184.215.14/32:80']
        resolvers = ['{RESOLVER}']"
    )
}

const READY: &str = "a standby machine is ready";

fn start(cofferdam: &Cofferdam, config: &str) -> Daemon {
    Daemon::start_with(cofferdam, config, &[("COFFERDAM_LOG", OsStr::new("info"))])
}

/// The daemon's shape of a build that asks for nothing.
fn build<'c>(cofferdam: &'c Cofferdam, daemon: &Daemon) -> Build<'c> {
    cofferdam.build().on(daemon)
}

/// Waits until so many machines have been ready since the start.
fn wait_until_ready(daemon: &Daemon, times: usize) {
    daemon.running().wait_for_times(READY, times);
}

/// Whether a build had a standby machine, and if it hadn't, why.
fn standby(cofferdam: &Cofferdam, daemon: &Daemon, built: &Outcome) -> String {
    let id = built.build_id().expect("the daemon names each build");
    let shown = cofferdam.command(["builds", "show", "--json", "--daemon", &daemon.addr(), &id]).succeeds();
    let Value::String(standby) = &shown.json()["standby"] else { panic!("{shown}") };
    standby.clone()
}

/// What is on record of a build's connections: name, address and verdict.
fn connections(cofferdam: &Cofferdam, daemon: &Daemon, built: &Outcome) -> Vec<String> {
    let id = built.build_id().expect("the daemon names each build");
    let shown = cofferdam.command(["builds", "show", "--json", "--daemon", &daemon.addr(), &id]).succeeds().json();
    let connections = shown["connections"].as_array().unwrap_or_else(|| panic!("{shown}"));
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let one = |one: &Value| ["name", "address", "verdict"].map(|field| text(&one[field])).join(" ");
    connections.iter().map(one).collect()
}

/// The VMMs that run now.
fn machines(cofferdam: &Cofferdam) -> Vec<Process> {
    let name = &vmm::processes()[0].0;
    let mut found = cofferdam.processes();
    found.retain(|process| process.name == *name);
    found
}

#[test]
fn a_build_takes_the_machine_in_stock_and_another_one_boots() {
    let cofferdam = Cofferdam::new();
    let daemon = start(&cofferdam, &format!("{CONFIG}\n[metrics]\nlisten = '127.0.0.1:0'"));
    let input = cofferdam.file("input/file", "an input");
    let mut random = Vec::new();
    for time in 1..=2 {
        wait_until_ready(&daemon, time);
        let built = build(&cofferdam, &daemon)
            .input("input", input.parent().expect("it is in a directory"))
            .output("build/random")
            .exported()
            .shell("read -r random </proc/sys/kernel/random/uuid; echo $random >random; read -r x </inputs/input/file; test \"$x\" = 'an input'");
        let built = built.succeeds();
        random.push(built.read("build/random"));
        assert_eq!(standby(&cofferdam, &daemon, &built), "used", "{built}");
    }
    assert_ne!(random[0], random[1], "two machines have the same randomness");
    wait_until_ready(&daemon, 3);

    let other = build(&cofferdam, &daemon).memory("300M").shell("true").succeeds();
    assert_eq!(standby(&cofferdam, &daemon, &other), "none_in_stock", "{other}");
    let metrics = scrape(&daemon.addrs(2)[1]).expect("the daemon serves them");
    for line in [
        "cofferdam_standby_machines{state=\"ready\"} 1",
        "cofferdam_builds_standby_total{standby=\"used\"} 2",
        "cofferdam_builds_standby_total{standby=\"none_in_stock\"} 1",
    ] {
        assert!(metrics.contains(line), "{line} is missing in\n{metrics}");
    }
    let id = other.build_id().expect("the daemon names each build");
    let sheet = cofferdam.command(["builds", "show", "--daemon", &daemon.addr(), &id]).succeeds();
    assert!(sheet.stdout.contains("no: there was none with its memory"), "{sheet}");
    daemon.end().succeeds();
    assert!(cofferdam.processes().is_empty(), "SIGTERM leaves machines: {:#?}", cofferdam.processes());
}

#[test]
fn a_machine_in_stock_has_the_right_time_when_it_gets_its_request() {
    let images = tempfile::tempdir().expect("a temporary directory can be made");
    guest::late_image(images.path());
    let cofferdam = Cofferdam::with_image(images.path());
    let daemon = start(&cofferdam, CONFIG);
    wait_until_ready(&daemon, 1);
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("it is later").as_secs();
    let before = now();
    let built = build(&cofferdam, &daemon).output("build/time").exported().shell("date +%s >time").succeeds();
    let time: u64 = built.read("build/time").trim().parse().expect("date prints a number");
    assert_eq!(standby(&cofferdam, &daemon, &built), "used");
    assert!((before..=now()).contains(&time), "{time} is not between {before} and now");
    daemon.end().succeeds();
}

#[test]
fn a_killed_daemon_leaves_no_standby_machine() {
    let cofferdam = Cofferdam::new();
    let daemon = start(&cofferdam, CONFIG);
    wait_until_ready(&daemon, 1);
    assert_eq!(machines(&cofferdam).len(), 1);
    daemon.running().signal(Signal::SIGKILL);
    daemon.end_of();
    cofferdam.processes_are_gone_within(Duration::from_secs(5));
    // The next start removes its files.
    start(&cofferdam, CONFIG).end().succeeds();
}

#[test]
fn a_machine_that_dies_in_stock_costs_nobody_a_build() {
    let cofferdam = Cofferdam::new();
    let daemon = start(&cofferdam, CONFIG);
    wait_until_ready(&daemon, 1);
    machines(&cofferdam)[0].kill();
    daemon.running().wait_for("lost a standby machine");
    let built = build(&cofferdam, &daemon).shell("true").succeeds();
    assert_eq!(standby(&cofferdam, &daemon, &built), "none_in_stock");
    daemon.end().succeeds();
}

/// A guest that has been taken over before it has a request. A build that gets a machine of its own gets a well-behaved one.
#[test]
fn a_hostile_machine_in_stock_harms_nobody() {
    for (job, standby_use, said) in [
        ("speak in stock", "none_in_stock", "its guest spoke without being asked"),
        ("lie in stock", "broken", "a sample instead of an answer to a ping"),
        ("hang in stock", "broken", "a standby machine does not answer"),
    ] {
        let images = tempfile::tempdir().expect("a temporary directory can be made");
        guest::hostile_image(images.path(), job);
        let cofferdam = Cofferdam::with_image(images.path());
        let daemon = start(&cofferdam, CONFIG);
        wait_until_ready(&daemon, 1);
        if standby_use == "none_in_stock" {
            daemon.running().wait_for("lost a standby machine");
        }
        let built = build(&cofferdam, &daemon).shell("true").executor_fails("guest").says("booted for its request");
        assert_eq!(standby(&cofferdam, &daemon, &built), standby_use, "{job}: {built}");
        daemon.end().succeeds().says(said);
    }
}

#[test]
fn a_build_with_a_network_takes_a_machine_in_stock_and_has_its_own_connections() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    let daemon = start(&cofferdam, &networked_config().replace("allow_addresses", "# allow_addresses"));
    let client = Cofferdam::new();
    let ask = |steps: &str| {
        let build = client.build().on(&daemon).switch("--network").input("client", guest::client());
        build.shell(&format!("/inputs/client {steps}")).succeeds()
    };
    let (resolve, get) = ("dns good.example A", "http 93.184.215.14:80 good.example");
    let first = ask(&format!("'{resolve}' '{get}'")).says(&format!("{get}: this is good.example"));
    assert_eq!(standby(&client, &daemon, &first), "none_in_stock", "{first}");
    let allowed = "good.example 93.184.215.14:80 allowed";
    assert_eq!(connections(&client, &daemon, &first), [allowed]);

    wait_until_ready(&daemon, 2);
    let seen = lab.seen();
    // What the first has resolved is no way for the second.
    let second = ask(&format!("'{get}' 'dns evil.example A' '{resolve}' '{get}' 'http 10.0.0.5:80 private.example'"));
    assert_eq!(standby(&client, &daemon, &second), "used", "{second}");
    let second = second.says(&format!("{get}: refused")).says(&format!("{get}: this is good.example"));
    let second = second.says("dns evil.example A: code 3").says("http 10.0.0.5:80 private.example: refused");
    let recorded = connections(&client, &daemon, &second);
    let denied = |line: &String| line.contains(" denied");
    assert_eq!(recorded.iter().filter(|line| *line == allowed).count(), 1, "{recorded:?}");
    assert_eq!(recorded.iter().filter(|line| denied(line)).count(), 3, "{recorded:?}");
    assert_eq!(recorded.len(), 4, "{recorded:?}");
    assert_eq!(connections(&client, &daemon, &first), [allowed], "it has connections of another build");
    assert_eq!(lab.seen()[seen.len()..], ["dns good.example 1", "93.184.215.14 80"]);
    daemon.end().succeeds();
}

/// The guest of a build reaches with the same frames what a guest in stock doesn't.
#[test]
fn a_hostile_machine_in_stock_reaches_nothing() {
    let images = tempfile::tempdir().expect("a temporary directory can be made");
    guest::framing_image(images.path(), "use the network in stock");
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam_with_image(images.path());
    let daemon = start(&cofferdam, &networked_config());
    let client = Cofferdam::new();
    let expected = ["dns good.example 1", "93.184.215.14 80"];
    for times in 1..=2 {
        let build = client.build().on(&daemon).switch("--network").shell("true");
        let built = build.executor_fails("guest").says("in a build the network gave");
        assert_eq!(standby(&client, &daemon, &built), "none_in_stock", "{built}");
        let recorded = connections(&client, &daemon, &built);
        assert!(matches!(&recorded[..], [one] if one.contains("93.184.215.14:80")), "{recorded:?}");
        let mut seen = lab.seen();
        seen.sort();
        let mut all = expected.repeat(times);
        all.sort_unstable();
        assert_eq!(seen, all, "the machine in stock has reached something");
        if times == 1 {
            daemon.running().wait_for("it asked before there was a build");
        }
    }
    daemon.end().succeeds().says("lost a standby machine");
}

/// A request that sees these paths of the host.
fn sees(paths: &[&str], script: &str) -> Value {
    serde_json::json!({
        "commandArgs": ["/bin/sh", "-c", script],
        "constraints": { "system": SYSTEM, "provideBinSh": true, "availableRoPaths": paths },
    })
}

/// A daemon that may show two files of the host, with a machine in stock for builds that see one.
fn start_with_paths(cofferdam: &Cofferdam) -> Daemon {
    let [one, other] = ["one", "other"].map(|name| cofferdam.file(name, name).display().to_string());
    let config = two_machines();
    let daemon = start(cofferdam, &format!("{config}\n[host_paths]\n'/one' = '{one}'\n'/other' = '{other}'"));
    let first = build(cofferdam, &daemon).request(&sees(&["/one"], "read -r x </one; test \"$x\" = one"));
    assert_eq!(standby(cofferdam, &daemon, &first), "none_in_stock", "{first}");
    wait_until_ready(&daemon, 2);
    daemon
}

#[test]
fn a_build_that_sees_a_path_of_the_host_takes_a_machine_in_stock_and_sees_that_path_alone() {
    let cofferdam = Cofferdam::new();
    let daemon = start_with_paths(&cofferdam);
    // The machine in stock is there already.
    let other = cofferdam.file("newer", "the latest");
    fs::rename(&other, other.with_file_name("other")).expect("a temporary directory can be written");
    let script = "read -r x </other; test \"$x\" = 'the latest' && test ! -e /one";
    let built = build(&cofferdam, &daemon).request(&sees(&["/other"], script)).succeeds();
    assert_eq!(standby(&cofferdam, &daemon, &built), "used", "{built}");
    daemon.end().succeeds();
}

/// A guest that looks at paths in stock gets no answer until it has a build, and then that build's.
#[test]
fn a_hostile_machine_in_stock_sees_no_path_but_those_of_its_build() {
    let images = tempfile::tempdir().expect("a temporary directory can be made");
    guest::hostile_image(images.path(), "look at paths in stock");
    let cofferdam = Cofferdam::with_image(images.path());
    let daemon = start_with_paths(&cofferdam);
    let built = build(&cofferdam, &daemon).request(&sees(&["/other"], "true")).executor_fails("guest");
    assert_eq!(standby(&cofferdam, &daemon, &built), "used", "{built}");
    built.says("answered in stock: false; 0: other; 1: No such file");
    daemon.end().succeeds();
}

#[test]
fn a_changed_image_empties_the_stock() {
    let images = tempfile::tempdir().expect("a temporary directory can be made");
    for entry in fs::read_dir(image().0).expect("the image is there").flatten() {
        fs::copy(entry.path(), images.path().join(entry.file_name())).expect("a temporary directory can be written");
    }
    let cofferdam = Cofferdam::with_image(images.path());
    let daemon = start(&cofferdam, CONFIG);
    wait_until_ready(&daemon, 1);
    let old = machines(&cofferdam);
    // Zeros after the archive mean nothing to the kernel.
    let initramfs = File::options().append(true).open(images.path().join("initramfs"));
    initramfs.expect("it is there").write_all(&[0; 512]).expect("a temporary directory can be written");
    let built = build(&cofferdam, &daemon).shell("true").succeeds();
    assert_eq!(standby(&cofferdam, &daemon, &built), "none_in_stock");
    daemon.running().wait_for("the guest image has changed");
    wait_until_ready(&daemon, 2);
    assert!(machines(&cofferdam).iter().all(|new| old.iter().all(|old| new.pid != old.pid)));
    let built = build(&cofferdam, &daemon).shell("true").succeeds();
    assert_eq!(standby(&cofferdam, &daemon, &built), "used");
    daemon.end().succeeds();
}

#[test]
fn a_standby_machine_gives_way_to_a_build_that_needs_its_room() {
    let cofferdam = Cofferdam::new();
    let daemon = start(&cofferdam, &CONFIG.replace("builds = 2", "builds = 1"));
    wait_until_ready(&daemon, 1);
    let running = build(&cofferdam, &daemon).memory("300M").start_shell("echo begun; sleep 1000");
    running.wait_for("begun");
    assert_eq!(machines(&cofferdam).len(), 1, "the budget has room for one");
    running.signal(Signal::SIGINT);
    let ended = running.end();
    assert_eq!(standby(&cofferdam, &daemon, &ended), "none_in_stock", "{ended}");
    // As soon as there is room a machine boots, of the shape that was in demand last.
    wait_until_ready(&daemon, 2);
    let built = build(&cofferdam, &daemon).memory("300M").shell("true").succeeds();
    assert_eq!(standby(&cofferdam, &daemon, &built), "used");
    daemon.end().succeeds();
}

#[test]
fn a_stock_that_the_budget_has_no_room_for_is_refused_or_reduced() {
    let cofferdam = Cofferdam::new();
    let file = cofferdam.file("daemon.toml", CONFIG.replace("machines = 1", "machines = 1\nmemory = '1M'"));
    let check: [&OsStr; 5] = ["daemon", "--allow-emulation", "--check-config", "--config"]
        .map(OsStr::new)
        .into_iter()
        .chain([file.as_os_str()])
        .collect::<Vec<_>>()
        .try_into()
        .expect("five");
    cofferdam.command(check).exits_with(2).says("standby.memory = '1M': must be from");
    let daemon = start(&cofferdam, &CONFIG.replace("machines = 1", "machines = 9"));
    daemon.running().wait_for("the budget has room for 2 standby machines");
    daemon.end().succeeds();
}
