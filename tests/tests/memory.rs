//! The memory of the host that one build takes, against what the daemon's budget counts for it.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    thread,
    time::Duration,
};

use cofferdam_castore::{Directory, Node, PathComponent, Store, SymlinkTarget};
use cofferdam_tests::{
    Cofferdam, Daemon, Running,
    castore::NodeText,
    processes::{self, Memory},
};
use data_encoding::BASE64;
use nix::sys::signal::Signal;

const MIB: u64 = 1 << 20;

/// The machine of a build that is promised 256 MiB. Once it was all that was counted.
const MACHINE_BYTES: u64 = 256 * MIB + 256 * MIB / 16 + 160 * MIB;

/// Room in a daemon's heap for all but inputs.
const SLACK_BYTES: u64 = 64 * MIB;

const METRICS: &str = "[metrics]\nlisten = '127.0.0.1:0'\n[build]\ninputs_memory = '384M'\n";

/// The `at`th of the shortest names.
fn short_name(mut at: usize) -> String {
    let letters = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut name = String::new();
    loop {
        name.push(letters[at % letters.len()].into());
        at /= letters.len();
        if at == 0 {
            return name;
        }
    }
}

/// Puts a directory into the store of a state directory that no daemon uses yet. It has so many directories of so many
/// symlinks, as small as they can be, which take many times their encoded size when they are decoded.
async fn hostile_tree(cofferdam: &Cofferdam, directories: usize, entries: usize) -> NodeText {
    let store = cofferdam.files().with_file_name("state/store");
    let (blobs, redb) = (store.join("blobs"), store.join("directories.redb"));
    let store = Store::from_addrs(&format!("file://{}", blobs.display()), &format!("redb://{}", redb.display()));
    let store = store.expect("a new store can be made");
    let name = |at| PathComponent::try_from(short_name(at).as_str()).expect("it is a name");
    let mut root = Directory::new();
    let mut putter = store.directories.put_multiple_start();
    for at in 0..directories {
        let target = SymlinkTarget::try_from(short_name(at).as_str()).expect("it is a target");
        let nodes = (0..entries).map(|at| (name(at), Node::Symlink { target: target.clone() }));
        let directory = Directory::try_from_iter(nodes).expect("the names differ");
        root.add(name(at), directory.to_node()).expect("the names differ");
        putter.put(directory).await.expect("the store can be written");
    }
    let size = root.size();
    putter.put(root).await.expect("the store can be written");
    let digest = putter.close().await.expect("the store can be written");
    NodeText::printed(&format!("dir:blake3-{}:{size}", BASE64.encode(digest.as_slice())))
}

/// The memory that a daemon counts for its builds.
fn counted_bytes(metrics: &str) -> u64 {
    let (host, path) = metrics.trim_start_matches("http://").split_once('/').unwrap_or((metrics, ""));
    let mut connection = TcpStream::connect(host).expect("the daemon serves its metrics");
    write!(connection, "GET /{path} HTTP/1.1\r\nHost: {host}\r\n\r\n").expect("the daemon reads");
    let mut answer = String::new();
    connection.read_to_string(&mut answer).expect("the daemon answers");
    let line = answer.lines().find_map(|line| line.strip_prefix("cofferdam_budget_used{resource=\"memory_bytes\"} "));
    line.and_then(|bytes| bytes.parse().ok()).unwrap_or_else(|| panic!("no memory in {answer}"))
}

/// The memory of the daemon and of its helpers, without their machines'.
fn own_bytes(cofferdam: &Cofferdam, daemon: &Running) -> u64 {
    let helpers = cofferdam.processes().into_iter().filter(|process| process.parent == daemon.pid());
    let pids: Vec<_> = helpers.map(|helper| helper.pid).chain([daemon.pid()]).collect();
    assert!(pids.len() > 2, "there are no helpers");
    pids.into_iter().filter_map(Memory::of).map(|memory| memory.own).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_budget_counts_at_least_what_a_build_with_hostile_inputs_takes() {
    const DIRECTORIES: usize = 12;
    const ENTRIES: usize = 50_000;
    let cofferdam = Cofferdam::new();
    let tree = hostile_tree(&cofferdam, DIRECTORIES, ENTRIES).await;
    tokio::task::block_in_place(|| {
        let daemon = Daemon::start(&cofferdam, METRICS);
        let metrics = daemon.addrs(2).remove(1);
        let of_daemon = || Memory::of(daemon.running().pid()).expect("the daemon runs").own;
        let idle = of_daemon();
        let held = |inputs: Option<&NodeText>| {
            let build = cofferdam.build().on(&daemon);
            let build = inputs.into_iter().fold(build, |build, node| build.input_node("t", node));
            // The device decodes a directory when a name is looked up in it.
            let script = "for d in /inputs/*/*; do test -e $d/absent; done; echo ready; sleep 1000";
            let build = build.start_shell(script);
            build.wait_for("ready");
            let own = own_bytes(&cofferdam, daemon.running()) - idle;
            let counted = counted_bytes(&metrics);
            build.signal(Signal::SIGINT);
            build.end();
            while counted_bytes(&metrics) > 0 {
                thread::sleep(Duration::from_millis(10));
            }
            println!("own {} MiB, machine {} MiB, counted {} MiB", own / MIB, MACHINE_BYTES / MIB, counted / MIB);
            (own, counted)
        };
        let (own_without, counted_without) = held(None);
        let (own_with, counted_with) = held(Some(&tree));
        assert!(own_with + MACHINE_BYTES <= counted_with && own_without + MACHINE_BYTES <= counted_without);
        // The control: the tree is large enough to make a difference, and the old count would not have held it.
        let of_tree = counted_with - counted_without;
        assert!(of_tree > 100 * MIB && of_tree < 384 * MIB, "{of_tree}");
        assert!(own_with > own_without + 50 * MIB && own_with > 100 * MIB, "{own_with}, {own_without}");
        let left = of_daemon();
        println!("the daemon: {} MiB before, {} MiB after", idle / MIB, left / MIB);
        assert!(left < idle + 2 * SLACK_BYTES, "the daemon keeps {} MiB", (left - idle) / MIB);
        daemon.end().succeeds();
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn inputs_that_take_too_much_memory_are_refused_before_they_take_it() {
    let cofferdam = Cofferdam::new();
    let tree = hostile_tree(&cofferdam, 1, 500_000).await;
    tokio::task::block_in_place(|| {
        let daemon = Daemon::start(&cofferdam, METRICS);
        let peak = || processes::peak_resident_bytes(daemon.running().pid().unsigned_abs()).expect("the daemon runs");
        let build = || cofferdam.build().on(&daemon).input_node("t", &tree);
        let idle = peak();
        let refused = build().flag("--inputs-memory", "64M").shell("true").is_refused("unsupported");
        assert!(refused.stderr.contains("inputs_memory, which is 67108864 bytes"), "{refused}");
        let after_refusal = peak();
        // The control: the same tree does take that much.
        build().shell("true").succeeds();
        let after_build = peak();
        println!("peak: {} MiB, {} MiB, {} MiB", idle / MIB, after_refusal / MIB, after_build / MIB);
        assert!(after_refusal < idle + SLACK_BYTES && after_build > idle + SLACK_BYTES);
        daemon.end().succeeds();
    });
}
