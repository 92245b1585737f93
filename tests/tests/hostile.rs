//! Guests that have been taken over, or that run another image. They may misuse their devices in any way: the build ends
//! soon, its error differs from that of a failed command, and nothing is left behind.

use std::time::Duration;

use cofferdam::machine::vmm::Kind;
use cofferdam_tests::{Cofferdam, Outcome, guest, stretched, vmm};

/// The time limit for a silent guest.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// The time limit for a build: longer than two silent guests.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The outcome of a build whose guest does this job, see `guest/hostile.rs`.
fn outcome_of(job: &str) -> Outcome {
    outcome_with(job, &[])
}

/// Like `outcome_of`, with these flags.
fn outcome_with(job: &str, flags: &[&str]) -> Outcome {
    let images = tempfile::tempdir().expect("a temporary directory can be made");
    guest::hostile_image(images.path(), job);
    let cofferdam = Cofferdam::with_image(images.path());
    let log = "cofferdam::build=debug";
    let seconds = |limit: Duration| format!("{}s", stretched(limit).as_secs());
    let build = cofferdam.build().host_variable("COFFERDAM_LOG", log);
    let build = build.flag("--connect-timeout", seconds(CONNECT_TIMEOUT));
    let build = flags.iter().fold(build.flag("--timeout", seconds(TIMEOUT)), |build, flag| build.switch(flag));
    let ended = build.run(["a"]);
    assert!(ended.took < stretched(TIMEOUT) + stretched(Duration::from_secs(20)), "{ended}");
    ended
}

#[test]
fn a_guest_that_resets_its_machine_ends_it() {
    let reason = match vmm::choice().kind {
        Kind::CloudHypervisor => "guest_reset",
        // QEMU ends at a reset, and doesn't report more.
        Kind::Qemu => "process_died",
    };
    outcome_of("reset").executor_fails(reason).says("while the guest booted");
    outcome_of("reset when begun").executor_fails(reason).says("while the command ran");
}

#[test]
fn a_guest_that_hangs_up_ends_its_build_at_once() {
    for job in ["hang up", "hang up when begun"] {
        outcome_of(job).executor_fails("protocol").says("the vsock connection failed");
    }
}

#[test]
fn a_guest_reaches_nothing_but_its_own_connection() {
    outcome_of("trespass").executor_fails("guest").says("reached beside the host: []");
}

#[test]
fn a_guest_may_write_much_at_a_time() {
    let ended = outcome_of("write much");
    let choice = vmm::choice();
    let older_than_51 = || choice.version.split('.').next().is_some_and(|major| major.parse::<u32>().unwrap() < 51);
    if (choice.kind == Kind::Qemu || older_than_51()) && ended.json()["reason"] == "timeout" {
        // vhost-device-vsock 0.3.0 and cloud-hypervisor before v51 stall for ever if the guest's kernel uses several
        // descriptors for a packet. Linux 6.12 does, and 6.1 doesn't. This harms no other build.
        ended.build_fails("timeout");
    } else {
        ended.executor_fails("guest").says("wrote much at a time");
    }
}

#[test]
fn a_flooded_console_needs_bounded_memory() {
    let ended = outcome_of("flood the console").executor_fails("never_connected").says("####");
    assert!(ended.peak_bytes < 200 << 20, "it filled {} bytes of the host's memory", ended.peak_bytes);
    assert!(ended.stderr.len() < 64 << 10, "too much of it is on stderr: {} bytes", ended.stderr.len());
}

#[test]
fn a_flood_of_samples_is_dropped() {
    let ended = outcome_of("flood samples").executor_fails("guest").says("half a million samples later");
    let seen = ended.stderr.matches("sample=Sample").count() as u64;
    assert!(seen <= 2 + 2 * ended.took.as_secs(), "{seen} samples were looked at");
    assert!(ended.peak_bytes < 200 << 20, "they filled {} bytes of the host's memory", ended.peak_bytes);
}

#[test]
fn messages_out_of_place_end_the_build() {
    for (job, complaint) in [
        ("sample at once", "a sample instead of its hello"),
        ("keep at once", "the end of the remains while the command ran"),
        ("output at once", "a shell's output while the command ran"),
        ("end a shell at once", "a shell's end while the command ran"),
    ] {
        outcome_of(job).executor_fails("protocol").says(complaint);
    }
    // After a failure, a guest may send nothing else.
    outcome_of("fail and output").build_fails("exit_code");
}

/// With `--keep-failed` the host waits for the guest to stop its command, but not for ever.
#[test]
fn a_guest_that_ignores_stop_is_killed() {
    let ended = outcome_with("never stop", &["--keep-failed", "--silence=2s"]).build_fails("silence");
    assert_eq!(ended.json()["fields"]["kept"], serde_json::Value::Null, "{ended}");
}
