//! Guests that have been taken over, or were never ours: whatever they do with the devices that they have, the build
//! ends soon, is told apart from a failed command, and leaves nothing.

use std::time::Duration;

use cofferdam::vmm::Kind;
use cofferdam_tests::{Cofferdam, Outcome, guest, stretched, vmm};

/// How long a guest that says nothing is waited for.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a build may take: longer than two guests that say nothing.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The outcome of a build whose guest does this job, see `guest/hostile.rs`.
fn outcome_of(job: &str) -> Outcome {
    let images = tempfile::tempdir().expect("a temporary directory can be made");
    guest::hostile_image(images.path(), job);
    let cofferdam = Cofferdam::with_image(images.path());
    let seconds = |limit: Duration| format!("{}s", stretched(limit).as_secs());
    let build = cofferdam.build().flag("--connect-timeout", seconds(CONNECT_TIMEOUT));
    let ended = build.flag("--timeout", seconds(TIMEOUT)).run(["a"]);
    assert!(ended.took < stretched(TIMEOUT) + stretched(Duration::from_secs(20)), "{ended}");
    ended
}

#[test]
fn a_guest_that_resets_its_machine_ends_it() {
    let reason = match vmm::choice().kind {
        Kind::CloudHypervisor => "guest_reset",
        // QEMU is told to end then, and nothing more is known.
        Kind::Qemu => "process_died",
    };
    outcome_of("reset").executor_fails(reason).says("while the guest booted");
    outcome_of("reset when begun").executor_fails(reason).says("while the command ran");
}

#[test]
fn a_guest_that_hangs_up_is_not_waited_for() {
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
    if vmm::choice().kind == Kind::Qemu && ended.json()["reason"] == "timeout" {
        // vhost-device-vsock 0.3.0 stalls for ever where the guest's kernel uses several descriptors for a packet, as
        // 6.12 does and 6.1 doesn't; that harms nobody else.
        ended.build_fails("timeout");
    } else {
        ended.executor_fails("guest").says("wrote much at a time");
    }
}

#[test]
fn a_guest_that_floods_its_console_is_given_up() {
    let ended = outcome_of("flood the console").executor_fails("never_connected").says("####");
    assert!(ended.peak_bytes < 200 << 20, "it filled {} bytes of the host's memory", ended.peak_bytes);
    assert!(ended.stderr.len() < 64 << 10, "all of it is repeated: {} bytes", ended.stderr.len());
}
