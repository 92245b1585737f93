//! A daemon whose disk fills up.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use cofferdam_proto::cofferdam::v1::{self as ours, build_service_client::BuildServiceClient, event::Event};
use cofferdam_tests::{
    Cofferdam, Daemon, Outcome, SmallDisk, castore,
    request::{encoded, shell},
    stretched,
};

const MIB: u64 = 1 << 20;

/// A state directory on a small disk.
fn on_a_small_disk(mib: u32) -> (Cofferdam, SmallDisk) {
    let cofferdam = Cofferdam::new();
    let disk = SmallDisk::at(&cofferdam.state_directory(), mib);
    (cofferdam, disk)
}

fn import(cofferdam: &Cofferdam, daemon: &Daemon, path: &Path) -> Outcome {
    cofferdam.command([OsStr::new("import"), "--daemon".as_ref(), daemon.addr().as_ref(), path.as_os_str()])
}

#[test]
fn nothing_is_put_below_the_watermark() {
    let (cofferdam, disk) = on_a_small_disk(64);
    let small = cofferdam.file("tree/small", "a few bytes");
    let tree = cofferdam.files().join("tree");
    disk.fill(20 * MIB);
    for (min_free, refused) in [("0", false), ("16M", false), ("32M", true)] {
        let daemon = Daemon::start(&cofferdam, &format!("[disk]\nmin_free = '{min_free}'"));
        for path in [&small, &tree] {
            let imported = import(&cofferdam, &daemon, path);
            if refused {
                let told =
                    imported.exits_with(3).says("are free on the file system of").says("[disk] min_free = 32.00 MiB");
                told.says("store gc");
            } else {
                imported.succeeds();
            }
        }
        // What is there can be read all the same.
        let node = castore::node_of(&tree);
        let addr = daemon.addr();
        let listed = cofferdam.command(["store", "ls", "--daemon", &addr, node.as_str()]).succeeds();
        assert!(listed.stdout.contains("small"), "{listed}");
        if refused {
            daemon.running().wait_for("the disk is too full: ");
            disk.relieve();
            let deadline = Instant::now() + stretched(Duration::from_secs(30));
            while import(&cofferdam, &daemon, &tree).stdout.is_empty() {
                assert!(Instant::now() < deadline, "nothing is stored though there is space");
            }
        }
        daemon.end().succeeds();
    }
    assert_eq!(cofferdam.leftovers(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn below_the_watermark_running_builds_end_and_waiting_ones_wait() {
    let (cofferdam, disk) = on_a_small_disk(512);
    let daemon = Daemon::start(&cofferdam, "[disk]\nmin_free = '128M'\n[budget]\nbuilds = 2");
    let first = cofferdam.build().on(&daemon).output("build/out").switch("-it").switch("--bin-sh");
    let running = first.on_terminal((30, 100)).start(["/bin/sh"]);
    running.wait_for("$ ");
    disk.fill(64 * MIB);

    let mut client = BuildServiceClient::new(daemon.peer().raw_channel());
    let waiting = ours::BuildRequest { request: Some(encoded(shell("echo at last", &[]))), ..Default::default() };
    let mut events = client.build(waiting).await.unwrap().into_inner();
    let mut id = String::new();
    while let Some(event) = events.message().await.unwrap().and_then(|event| event.event) {
        match event {
            Event::Accepted(accepted) => id = accepted.id,
            Event::Queued(queued) if queued.waiting_for == "disk" => break,
            Event::Queued(_) => {}
            event => panic!("it begins although the disk is full: {event:?}"),
        }
    }
    let say = |command: &[&str], text: &str| {
        let addr = daemon.addr();
        let said = cofferdam.command(["builds", "--daemon", &addr].iter().chain(command)).succeeds();
        assert!(said.stdout.contains(text), "{said}");
    };
    say(&["show", &id], "for disk, behind 0 builds");
    say(&["list"], "queued: disk");

    // The running build's outputs are stored.
    running.types("head -c 1000000 /dev/urandom > out; exit\n");
    let output = running.end().succeeds().output();
    cofferdam.command(["store", "verify", output.node.as_str()]).succeeds();
    say(&["list"], "queued: disk");

    disk.relieve();
    while let Some(event) = events.message().await.unwrap().and_then(|event| event.event) {
        if let Event::Done(done) = event {
            assert!(matches!(done.outcome, Some(ours::done::Outcome::Success(_))), "{done:?}");
        }
    }
    daemon.end().succeeds();
    assert_eq!(cofferdam.leftovers(), Vec::<PathBuf>::new());
}
