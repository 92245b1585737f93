//! Builds that misuse their network, and processes of theirs that die: the network device stays small, goes on, and disturbs no
//! other build. Nothing is left behind.

use std::{thread, time::Duration};

use cofferdam_tests::{
    Build, Cofferdam, Daemon, Lab, Running, guest, network_devices,
    processes::{memory_bytes, peak_resident_bytes},
    stretched, vmm,
};
use nix::sys::signal::Signal;

const LAB: &str = env!("CARGO_BIN_EXE_network-lab");

/// Most memory of a network device. What it has touched of its guest's is the guest's.
const DEVICE_BYTES: u64 = 80 << 20;

/// Servers of HTTP, and one that never reads.
const HTTP: &str = "93.184.215.14:80";
const MUTE: &str = "93.184.215.14:12";

const CONFIG: &str = "
    [budget]
    builds = 2
    cpus = 2
    [build]
    cpus = 1
    [network]
    allow = [\"good.example\"]
    allow_addresses = [\"93.184.215.14/32:80\", \"93.184.215.14/32:12\", \"93.184.215.14/32:8080\"]
    resolvers = [\"10.0.0.53:53\"]
";

#[track_caller]
fn check_memory(cofferdam: &Cofferdam) {
    let [device] = &network_devices(cofferdam)[..] else { panic!("no single device: {:#?}", cofferdam.processes()) };
    let pid = device.pid.cast_unsigned();
    let peak = peak_resident_bytes(pid).expect("it runs");
    let guests = memory_bytes(pid, "RssShmem").expect("it runs");
    println!("at most {} KiB, and {} KiB of its guest's", (peak - guests) >> 10, guests >> 10);
    assert!(peak - guests < DEVICE_BYTES, "it had {peak} bytes, {guests} of them its guest's");
}

fn networked(build: Build<'_>) -> Build<'_> {
    build.switch("--network").input("client", guest::client())
}

/// A build in the middle of a connection.
fn running(build: Build<'_>) -> Running {
    let running = networked(build)
        .start_shell(&format!("/inputs/client 'http {HTTP} nobody' 'hoard {HTTP} {MUTE} 1'; sleep 1000"));
    running.wait_for("hoarded 2");
    running
}

#[test]
fn a_guest_that_floods_its_device_with_frames_is_answered_afterwards() {
    let images = tempfile::tempdir().expect("a temporary directory can be made");
    guest::framing_image(images.path(), "flood the network");
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam_with_image(images.path());
    let build = cofferdam.build().switch("--network").flag("--resolver", "10.0.0.53:53");
    let build = build.flag("--allow-host", "good.example").flag("--allow-address", "93.184.215.14/32:80");
    let mut running = build.flag("--allow-address", "93.184.215.14/32:8080").start(["a"]);
    while !lab.seen().iter().any(|line| line == "93.184.215.14 8080") {
        assert!(running.is_alive(), "it has ended: {}", running.stderr_so_far());
        assert!(running.age() < stretched(Duration::from_secs(600)), "it is never answered");
        thread::sleep(Duration::from_millis(20));
    }
    check_memory(&cofferdam);
    running.signal(Signal::SIGINT);
    running.end().executor_fails("interrupted");
    let seen = lab.connections();
    assert!(seen.iter().any(|line| line == "93.184.215.14 80"), "no connection of the flood was made");
    assert!(seen.iter().all(|line| line.starts_with("93.184.215.14 ")), "{seen:?}");
}

#[test]
fn connections_that_nobody_reads_keep_their_own_memory_and_no_other_build() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    let daemon = Daemon::start(&cofferdam, CONFIG);
    let client = Cofferdam::new();
    let hoard = format!("hoard {HTTP} {MUTE} 60");
    let hoards = networked(client.build().on(&daemon)).start_shell(&format!("/inputs/client '{hoard}'; sleep 1000"));
    hoards.wait_for("hoarded 120");
    check_memory(&cofferdam);
    let other = networked(client.build().on(&daemon)).shell(&format!("/inputs/client 'count {HTTP} nobody /10000000'"));
    other.succeeds().says(&format!("count {HTTP} nobody /10000000: 10000000"));
    hoards.wait_for(&format!("{hoard}: this is nobody"));
    hoards.signal(Signal::SIGINT);
    hoards.end();
    daemon.end().succeeds();
}

#[test]
fn each_process_of_a_build_with_a_network_may_die() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    let daemon = Daemon::start(&cofferdam, CONFIG);
    let client = Cofferdam::new();
    for (program, name) in vmm::processes() {
        let attacked = running(client.build().on(&daemon));
        cofferdam.helper(&program, daemon.running()).kill();
        attacked.end().executor_fails("process_died").says(&format!("{name} died"));
        assert!(network_devices(&cofferdam).is_empty(), "{:#?}", cofferdam.processes());
    }
    let beside = running(client.build().on(&daemon));
    let its_own = network_devices(&cofferdam);
    let attacked = running(client.build().on(&daemon));
    let device =
        network_devices(&cofferdam).into_iter().find(|device| !its_own.contains(device)).expect("it has one, too");
    device.kill();
    attacked.end().executor_fails("process_died").says("network device died");
    assert_eq!(network_devices(&cofferdam), its_own);
    beside.signal(Signal::SIGINT);
    beside.end();

    let left = running(client.build().on(&daemon));
    daemon.running().signal(Signal::SIGKILL);
    daemon.end_of();
    left.end();
    cofferdam.processes_are_gone_within(Duration::from_secs(5));
    // The next start removes its files.
    cofferdam.build().shell("true").succeeds();
}
