//! Builds that end because a process dies: the host, the VMM, a device, the guest. Nothing is left behind, and the error
//! names the process.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use cofferdam::machine::vmm::Kind;
use cofferdam_tests::{Build, Cofferdam, Running, guest, slots, stretched, vmm};
use nix::sys::signal::Signal;

/// A build in the middle of its command.
fn running(build: Build<'_>) -> Running {
    let running = build.start_shell("echo in the middle; sleep 1000");
    running.wait_for("in the middle");
    running
}

#[test]
fn an_interrupted_build_leaves_nothing() {
    let cofferdam = Cofferdam::new();
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let running = running(cofferdam.build());
        assert!(cofferdam.processes().len() > 1, "{:#?}", cofferdam.processes());
        let interrupted = Instant::now();
        running.signal(signal);
        let ended = running.end().executor_fails("interrupted").says("interrupted");
        assert!(interrupted.elapsed() < stretched(Duration::from_secs(60)), "{ended}");
        assert!(cofferdam.processes().is_empty() && cofferdam.leftovers().is_empty(), "{:#?}", cofferdam.leftovers());
    }
}

#[test]
fn a_build_can_be_interrupted_while_it_boots() {
    let cofferdam = Cofferdam::new();
    let running = cofferdam.build().start_shell("sleep 1000");
    cofferdam.helper(&vmm::processes()[0].0, &running);
    running.signal(Signal::SIGINT);
    running.end().executor_fails("interrupted");
}

#[test]
fn a_killed_hosts_processes_die_and_the_next_start_removes_its_files() {
    let cofferdam = Cofferdam::new();
    let killed = running(cofferdam.build());
    killed.signal(Signal::SIGKILL);
    let ended = killed.end();
    assert_eq!(ended.signal(), Some(9), "{ended}");
    cofferdam.processes_are_gone_within(Duration::from_secs(5));
    assert!(!cofferdam.leftovers().is_empty(), "this test can't fail: a killed host can't have cleaned up");

    cofferdam.build().output("build/out").shell("echo fine > out").succeeds();
    assert!(cofferdam.leftovers().is_empty(), "{:#?}", cofferdam.leftovers());
}

#[test]
fn a_host_killed_while_it_ingests_leaves_no_half_blob() {
    let cofferdam = Cofferdam::new();
    let killed = cofferdam.build().output("build/large").start_shell("truncate -s 2G large; echo made");
    killed.wait_for("made");
    let staging = cofferdam.staging_directory();
    let begun = || {
        let owners = fs::read_dir(&staging).into_iter().flatten().flatten();
        let mut staged = owners.flat_map(|owner| fs::read_dir(owner.path()).into_iter().flatten().flatten());
        staged.any(|file| file.metadata().is_ok_and(|file| file.len() > 0))
    };
    while !begun() {
        thread::sleep(Duration::from_millis(5));
        assert!(
            killed.age() < stretched(Duration::from_secs(60)),
            "nothing is ever ingested: {}",
            killed.stderr_so_far()
        );
    }
    killed.signal(Signal::SIGKILL);
    killed.end();
    cofferdam.processes_are_gone_within(Duration::from_secs(5));
    assert!(cofferdam.verified_blobs().is_empty(), "an output that was never complete is in the store");

    cofferdam.build().output("build/out").shell("echo fine > out").succeeds();
    assert_eq!(cofferdam.verified_blobs().len(), 1);
    assert!(cofferdam.leftovers().is_empty(), "{:#?}", cofferdam.leftovers());
}

#[test]
fn a_killed_host_does_not_disturb_the_builds_beside_it() {
    let cofferdam = Cofferdam::new();
    let _all = slots::take_all();
    let build = cofferdam.build().without_slot().output("build/out").exported();
    let mut survivor = build.start_shell("echo survivor runs; sleep 5; echo fine > out");
    // It is stopped, so that it lives as long as this test needs it.
    survivor.wait_for("survivor runs").signal(Signal::SIGSTOP);
    let its_own = cofferdam.leftovers();
    let killed = running(cofferdam.build().without_slot());
    killed.signal(Signal::SIGKILL);
    killed.end();
    let others = cofferdam.leftovers().into_iter().filter(|path| !its_own.contains(path));
    assert_ne!(others.count(), 0, "this test can't fail: a killed host can't have cleaned up");
    // The next build cleans up after the killed one, but must not touch the living one.
    cofferdam.build().without_slot().shell("true").succeeds();
    assert!(survivor.is_alive(), "it has ended before the others: {}", survivor.stderr_so_far());
    assert_eq!(cofferdam.leftovers(), its_own, "a living build's files are gone, or a killed one's are not");
    survivor.signal(Signal::SIGCONT);
    assert_eq!(survivor.end().succeeds().read("build/out"), "fine\n");
}

#[test]
fn each_dead_process_is_named() {
    let cofferdam = Cofferdam::new();
    for (program, name) in vmm::processes() {
        let running = running(cofferdam.build());
        cofferdam.helper(&program, &running).kill();
        let ended = running.end().executor_fails("process_died");
        ended.says(&format!("{name} died")).says("SIGKILL").says("while the command ran");
    }
}

#[test]
fn a_dead_inputs_device_is_named() {
    let cofferdam = Cofferdam::new();
    let running = running(cofferdam.build());
    cofferdam.helper("cofferdam", &running).kill();
    running.end().executor_fails("process_died").says("inputs' device died").says("SIGKILL");
}

#[test]
fn a_vmm_that_dies_while_it_boots_is_named() {
    let cofferdam = Cofferdam::new();
    let (program, name) = &vmm::processes()[0];
    let running = cofferdam.build().start_shell("true");
    cofferdam.helper(program, &running).kill();
    let ended = running.end().exits_with(3).says(&format!("{name} died")).says("SIGKILL");
    // A VMM with an API can be found before it has got its configuration.
    let phases = ["while the guest booted", "while it was started"];
    assert!(phases.iter().any(|phase| ended.stderr.contains(phase)), "{ended}");
}

#[test]
fn a_guest_that_never_connects_times_out() {
    let images = tempfile::tempdir().unwrap();
    guest::hostile_image(images.path(), "never dial");
    let cofferdam = Cofferdam::with_image(images.path());
    let ended = cofferdam.build().flag("--connect-timeout", "10s").run(["a"]).executor_fails("never_connected");
    let ended = ended.says("did not connect within 10 seconds");
    assert!(ended.took < stretched(Duration::from_secs(40)), "{ended}");
}

#[test]
fn a_guest_without_init_is_explained() {
    let images = tempfile::tempdir().unwrap();
    guest::hostile_image(images.path(), "never dial");
    fs::write(images.path().join("initramfs"), "").unwrap();
    let cofferdam = Cofferdam::with_image(images.path());
    let limit = format!("{}s", stretched(Duration::from_secs(20)).as_secs());
    let ended = cofferdam.build().flag("--connect-timeout", limit).run(["a"]);
    // Under cloud-hypervisor a kernel whose console is a module has no console yet when it panics, but its reset is reported.
    let told = ["init", "panic", "the guest reset itself"].iter().any(|words| ended.stderr.contains(words));
    assert!(told, "nothing tells why: {ended}");
    assert_eq!(ended.json()["kind"], "executor_failed", "{ended}");
}

#[test]
fn panics_and_resets_are_reported_at_once() {
    const DRIVERS: &str =
        "#!/sh\nmkdir -p /proc /dev; ln -s sh /mount; /mount -t proc proc /proc; mount -t devtmpfs dev /dev
        test ! -e /modules.order || while read -r module; do insmod /lib/$module; done < /modules.order
        echo '<3>out of luck' > /dev/kmsg\n";
    // A kernel without init panics. QEMU ends after a panic and after a reset, and doesn't report which it was.
    for (end, reason) in [("exit 0", "guest_panicked"), ("reboot -f", "guest_reset")] {
        let images = tempfile::tempdir().unwrap();
        let init = images.path().join("script");
        fs::write(&init, format!("{DRIVERS}{end}\n")).unwrap();
        guest::image_with_init(images.path(), &init);
        let cofferdam = Cofferdam::with_image(images.path());
        let reason = match vmm::choice().kind {
            Kind::CloudHypervisor => reason,
            Kind::Qemu => "process_died",
        };
        cofferdam.build().run(["a"]).executor_fails(reason).says("out of luck").says("while the guest booted");
    }
}
