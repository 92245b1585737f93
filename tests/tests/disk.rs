//! A daemon whose disk fills up.

use std::{
    ffi::OsStr,
    fs::{self, File},
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use cofferdam_castore::{
    B3Digest, Node,
    proto::{Entry, EntryExt as _},
};
use cofferdam_proto::{
    cofferdam::v1::{self as ours, build_service_client::BuildServiceClient, event::Event},
    snix::build::v1 as proto,
};
use cofferdam_tests::{
    Cofferdam, Daemon, Outcome, SmallDisk, castore,
    request::{encoded, shell},
    stretched, telemetry,
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

/// The blob of a file in the store, with a time long ago.
fn aged(cofferdam: &Cofferdam, contents: &[u8]) -> PathBuf {
    let blob = cofferdam.blob(blake3::hash(contents).to_hex().as_str());
    let long_ago = SystemTime::now() - Duration::from_secs(30 * 24 * 60 * 60);
    File::open(&blob).and_then(|blob| blob.set_modified(long_ago)).expect("it is in the store");
    blob
}

/// A request for a script with a file as its input, `/inputs/file`.
fn with_input(script: &str, contents: &[u8]) -> proto::BuildRequest {
    let input = Node::File { digest: B3Digest::of(contents), size: contents.len() as u64, executable: false };
    let input = Entry::named("file".try_into().expect("it is a name"), input);
    proto::BuildRequest { inputs: vec![input], ..shell(script, &[]) }
}

#[tokio::test]
async fn below_the_watermark_running_builds_end_waiting_ones_wait_and_garbage_goes() {
    let (cofferdam, disk) = on_a_small_disk(512);
    let config = "[disk]\nmin_free = '128M'\n[gc]\n[metrics]\nlisten = '127.0.0.1:0'";
    let daemon = Daemon::start_with(&cofferdam, config, &[("COFFERDAM_LOG", OsStr::new("info"))]);
    daemon.running().wait_for("garbage collected cause=\"time\"");
    let files = ["garbage", "a root", "for the running build", "for the waiting build"];
    let paths = files.map(|contents| cofferdam.file(contents, contents));
    for path in &paths {
        import(&cofferdam, &daemon, path).succeeds();
    }
    cofferdam.command(["store", "root", "add", "kept", castore::node_of(&paths[1]).as_str()]).succeeds();

    let first = cofferdam.build().on(&daemon).input("file", &paths[2]).output("build/out");
    let first = first.switch("-it").switch("--bin-sh").on_terminal((30, 100));
    let running = first.start(["/bin/sh"]);
    running.wait_for("$ ");
    let mut client = BuildServiceClient::new(daemon.peer().raw_channel());
    let request = encoded(with_input("cat /inputs/file", files[3].as_bytes()));
    let waiting = ours::BuildRequest { request: Some(request), ..Default::default() };
    let mut events = client.build(waiting).await.unwrap().into_inner();
    let (mut id, mut blobs) = (String::new(), Vec::new());
    while let Some(event) = events.message().await.unwrap().and_then(|event| event.event) {
        match event {
            Event::Accepted(accepted) => {
                id = accepted.id;
                blobs = files.map(|contents| aged(&cofferdam, contents.as_bytes())).into();
                disk.fill(64 * MIB);
            }
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
    say(&["show", &id], "waiting for free disk space on the daemon's host");
    say(&["list"], "queued: disk");
    daemon.running().wait_for("garbage collected cause=\"disk\"");
    assert_eq!(blobs.iter().map(|blob| blob.exists()).collect::<Vec<_>>(), [false, true, true, true]);
    let metrics = telemetry::scrape(&daemon.addrs(2)[1]).unwrap();
    let freed = format!("cofferdam_gc_freed_bytes_total {}", files[0].len());
    for line in ["cofferdam_gc_total{cause=\"disk\",outcome=\"succeeded\"} 1", &freed] {
        assert!(metrics.contains(line), "{metrics}");
    }
    let puts = metrics.lines().find_map(|line| line.strip_prefix("cofferdam_put_seconds_count "));
    let puts: usize = puts.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("{metrics}"));
    assert!(puts >= files.len(), "{metrics}");

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

#[test]
fn on_a_full_disk_each_operation_fails_alone_and_the_next_one_works() {
    let (cofferdam, disk) = on_a_small_disk(256);
    cofferdam.file("tree/large", vec![7; 4 << 20]);
    for number in 0..2000 {
        cofferdam.file(&format!("many/{number}/file"), "the same");
    }
    let before = cofferdam.file("before/file", "before");
    let [large, many, before] = [cofferdam.files().join("tree"), cofferdam.files().join("many"), before];
    let before = before.parent().expect("it has one");
    let daemon = Daemon::start(&cofferdam, "");
    import(&cofferdam, &daemon, before).succeeds();
    let read = || {
        let (addr, node) = (daemon.addr(), castore::node_of(before));
        let listed = cofferdam.command(["store", "ls", "--daemon", &addr, node.as_str()]).succeeds();
        assert!(listed.stdout.contains("file"), "{listed}");
    };
    // The disk ends within the store's database, at once, and within a blob.
    for (but_bytes, path) in [(0, &many), (0, &large), (512 << 10, &large)] {
        disk.fill(but_bytes);
        import(&cofferdam, &daemon, path).exits_with(3).says("No space left on device");
        if but_bytes == 0 {
            let refused = cofferdam.build().on(&daemon).input("file", before).shell("true");
            refused.exits_with(3).says("No space left on device");
        }
        read();
        disk.relieve();
        read();
        cofferdam.command(["store", "gc", "--keep", "0s"]).succeeds();
        import(&cofferdam, &daemon, before).succeeds();
    }
    for path in [&large, &many] {
        import(&cofferdam, &daemon, path).succeeds();
    }
    cofferdam.command(["store", "verify"]).succeeds();
    assert_eq!(fs::read_dir(cofferdam.state_directory().join("store/blobs/leases")).map_or(0, Iterator::count), 0);
    daemon.end().succeeds();
    assert_eq!(cofferdam.leftovers(), Vec::<PathBuf>::new());
}

#[test]
fn a_build_whose_disk_fills_fails_alone() {
    let (cofferdam, disk) = on_a_small_disk(512);
    let daemon = Daemon::start(&cofferdam, "");
    let build = || cofferdam.build().on(&daemon).output("build/out").switch("-it").switch("--bin-sh");
    // Its log, its scratch disk, and its outputs while they are stored.
    let made = "head -c 30000000 /dev/urandom > out; sync; echo al''l made";
    for (before, script) in
        [("", "yes | head -n 1000000"), ("", "head -c 50000000 /dev/urandom > out; sync"), (made, "true")]
    {
        let running = build().on_terminal((30, 100)).start(["/bin/sh"]);
        running.wait_for("$ ");
        if !before.is_empty() {
            running.types(&format!("{before}\n"));
            running.wait_for("all made");
        }
        disk.fill(if before.is_empty() { 0 } else { MIB });
        running.types(&format!("{script}; exit\n"));
        running.end().exits_with(3).says("No space left on device");
        disk.relieve();
        let staging = cofferdam.state_directory().join("store/blobs/staging");
        let staged = fs::read_dir(&staging).map_or(0, |owners| {
            owners.flatten().filter(|owner| fs::read_dir(owner.path()).is_ok_and(|left| left.count() > 0)).count()
        });
        assert_eq!(staged, 0, "{script}");
    }
    let made = cofferdam.build().on(&daemon).output("build/out").shell("echo made > out").succeeds();
    cofferdam.command(["store", "verify", made.output().node.as_str()]).succeeds();
    daemon.end().succeeds();
    assert_eq!(cofferdam.leftovers(), Vec::<PathBuf>::new());
}
