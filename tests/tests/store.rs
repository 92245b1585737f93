//! The store from the command line: archives in and out, reading, verifying, garbage collection and copying. Nothing that
//! was acknowledged is lost after a kill at any moment, or on a full disk.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use cofferdam_tests::{
    Cofferdam, Running,
    castore::{self, NodeText},
    program,
};
use nix::sys::signal::Signal;
use serde_json::json;

/// A store that no build uses, so no image is needed.
fn store() -> Cofferdam {
    Cofferdam::with_image("/nonexistent")
}

/// A tree of some files. A third of them are the same in all trees.
fn tree(cofferdam: &Cofferdam, id: usize) -> PathBuf {
    for number in 0..24 {
        let contents = if number % 3 == 0 { format!("shared {number}") } else { format!("{id} {number}") };
        cofferdam.file(&format!("tree-{id}/{}/{number}", number % 4), contents.repeat(1 + number * 40));
    }
    cofferdam.file(&format!("tree-{id}/large"), vec![id as u8; 600_000]);
    std::os::unix::fs::symlink("large", cofferdam.files().join(format!("tree-{id}/link"))).expect("it is new");
    cofferdam.files().join(format!("tree-{id}"))
}

fn tar(directory: &Path, arguments: &[&str]) {
    let done = Command::new("tar").args(arguments).current_dir(directory).output().expect("tar is installed");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// The node that an import has printed.
fn printed(stdout: &str) -> Option<NodeText> {
    stdout.split_whitespace().next().map(NodeText::printed)
}

#[test]
fn archives_are_compatible_with_other_programs() {
    let cofferdam = store();
    let tree = tree(&cofferdam, 1);
    let node = castore::node_of(&tree);
    for (name, flag) in [("a.tar", "--verbose"), ("a.tar.gz", "--gzip"), ("misnamed", "--gzip")] {
        tar(&cofferdam.files(), &["-c", flag, "-f", name, "-C", "tree-1", "."]);
        let imported = cofferdam.command(["import", "--format", "tar", name]).succeeds();
        assert_eq!(imported.stdout, format!("{node}\t{name}\n"));
    }
    for (format, file) in [("tar", "o.tar"), ("tar.gz", "o.tar.gz"), ("tar.zst", "o.tar.zst")] {
        cofferdam.command(["export", "--format", format, node.as_str(), file]).succeeds();
        let imported = cofferdam.command(["import", "--format", "tar", file]).succeeds();
        assert_eq!(printed(&imported.stdout), Some(node.clone()));
        let stdout = cofferdam.files().join("stdout");
        cofferdam.command(["export", "--format", format, node.as_str(), "stdout"]).succeeds();
        assert_eq!(fs::read(&stdout).unwrap(), fs::read(cofferdam.files().join(file)).unwrap(), "not the same bytes");
        fs::remove_file(stdout).unwrap();
    }
    fs::create_dir(cofferdam.files().join("unpacked")).unwrap();
    tar(&cofferdam.files(), &["-x", "-f", "o.tar.gz", "-C", "unpacked"]);
    assert_eq!(castore::node_of(&cofferdam.files().join("unpacked")), node);

    cofferdam.command(["export", "--format", "nar", node.as_str(), "o.nar"]).succeeds();
    let imported = cofferdam.command(["import", "--format", "nar", "o.nar"]).succeeds();
    assert_eq!(printed(&imported.stdout), Some(node.clone()));
    let stat = cofferdam.command(["store", "stat", "--json", node.as_str()]).succeeds().json();
    assert_eq!(stat["nar_bytes"], fs::metadata(cofferdam.files().join("o.nar")).unwrap().len());
    let hash = Command::new("sha256sum").arg(cofferdam.files().join("o.nar")).output().unwrap().stdout;
    let hash = data_encoding::HEXLOWER.decode(&hash[..64]).unwrap();
    assert_eq!(stat["nar_hash"], format!("sha256-{}", data_encoding::BASE64.encode(&hash)));

    let refused = cofferdam.command(["export", "--format", "tar", "link:t", "x.tar"]);
    assert_eq!(refused.exits_with(2).says("--format nar").stdout, "");
    cofferdam.command(["export", "--format", "nar", node.as_str(), "o.nar"]).exits_with(2).says("exists already");
}

#[test]
fn a_bad_archive_is_reported_by_entry_and_leaves_nothing() {
    let cofferdam = store();
    cofferdam.file("d/a", vec![7; 100_000]);
    nix::unistd::mkfifo(&cofferdam.files().join("d/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    tar(&cofferdam.files(), &["-c", "-f", "fifo.tar", "d/a", "d/fifo"]);
    tar(&cofferdam.files(), &["-c", "-P", "-f", "absolute.tar", "--transform", "s,^,/abs/,", "d/a"]);
    tar(&cofferdam.files(), &["-c", "-z", "-f", "whole.tar.gz", "d/a"]);
    let whole = fs::read(cofferdam.files().join("whole.tar.gz")).unwrap();
    cofferdam.file("cut.tar.gz", &whole[..whole.len() / 2]);
    for (name, says) in [
        ("fifo.tar", "d/fifo: is a fifo"),
        ("absolute.tar", "/abs/d/a: its path is absolute"),
        ("cut.tar.gz", "cut short"),
        ("d/a", "not a tar archive"),
        ("nothing", "can't be opened"),
    ] {
        let refused = cofferdam.command(["import", "--json", "--format", "tar", name]);
        refused.is_refused("command_line").says(says).says(name);
    }
    let refused = cofferdam.command(["import", "--format", "tar", "--archive-limit", "99999", "whole.tar.gz"]);
    refused.exits_with(2).says("limit of 99999 bytes").says("--archive-limit");
    assert!(cofferdam.verified_blobs().is_empty() && cofferdam.leftovers().is_empty());
}

#[test]
fn the_store_can_be_looked_into() {
    let cofferdam = store();
    cofferdam.file("t/d/f", "contents");
    cofferdam.file("t/a\nb", "");
    let node = cofferdam.import(&cofferdam.files().join("t"));
    let (f, d) = (NodeText::file(b"contents", false), castore::node_of(&cofferdam.files().join("t/d")));
    let run = |arguments: &[&str]| cofferdam.command([&["store"], arguments].concat());
    let nothing = NodeText::file(b"", false);
    assert_eq!(run(&["ls", node.as_str()]).succeeds().stdout, format!("{nothing}\t\"a\\nb\"\n{d}\td\n"));
    let all = run(&["ls", "-R", node.as_str()]).succeeds().stdout;
    assert_eq!(all, format!("{nothing}\t\"a\\nb\"\n{d}\td\n{f}\td/f\n"));
    assert_eq!(run(&["cat", node.as_str(), "d/f"]).succeeds().stdout, "contents");
    run(&["cat", node.as_str(), "d"]).exits_with(2).says("is no file");
    run(&["cat", node.as_str(), "d/f/g"]).exits_with(2).says("there is no \"g\"");
    let stat = run(&["stat", "--json", node.as_str(), "d/f"]).succeeds().json();
    assert_eq!((&stat["kind"], &stat["bytes"], &stat["node"]), (&json!("file"), &json!(8), &json!(f.as_str())));
}

#[test]
fn damage_is_named_and_changes_the_exit_code() {
    let cofferdam = store();
    let tree = tree(&cofferdam, 1);
    let node = cofferdam.import(&tree);
    let sound = cofferdam.command(["store", "verify", "--json"]).succeeds().json();
    assert_eq!(sound["faults"], json!([]));
    let name = cofferdam.verified_blobs().pop().unwrap();
    let path = cofferdam.blob(&name);
    fs::remove_file(&path).unwrap();
    let missing = cofferdam.command(["store", "verify", "--json"]).exits_with(3);
    assert_eq!(missing.json()["faults"][0]["kind"], "missing", "{missing}");
    fs::write(&path, "something else").unwrap();
    let damaged = cofferdam.command(["store", "verify"]).exits_with(3);
    assert!(damaged.stdout.starts_with("damaged_blob\t") && damaged.stdout.contains(&name), "{damaged}");
    let told = cofferdam.command(["store", "verify", node.as_str()]).exits_with(3).says("the store is damaged");
    told.says("has the digest").says("import or build the contents again, which replaces this file");
    cofferdam.import(&tree);
    cofferdam.command(["store", "verify"]).succeeds();
}

#[test]
fn garbage_goes_and_roots_stay() {
    let cofferdam = store();
    let [kept, garbage] = [1, 2].map(|id| cofferdam.import(&tree(&cofferdam, id)));
    let run = |arguments: &[&str]| cofferdam.command([&["store"], arguments].concat());
    run(&["root", "add", "kept", kept.as_str()]).succeeds();
    assert_eq!(run(&["root", "list"]).succeeds().stdout, format!("{kept}\tkept\n"));
    let young = run(&["gc", "--json"]).succeeds().json();
    assert_eq!(young["removed"], json!({ "blobs": 0, "bytes": 0, "directories": 0 }));
    let dry = run(&["gc", "--keep", "0s", "--dry-run", "--json"]).succeeds().json();
    run(&["verify", garbage.as_str()]).succeeds();
    let collected = run(&["gc", "--keep", "0s", "--json"]).succeeds().json();
    assert_eq!((&collected["removed"], &collected["left"]), (&dry["removed"], &dry["left"]));
    run(&["verify", kept.as_str()]).succeeds();
    run(&["verify"]).succeeds();
    run(&["ls", garbage.digest().unwrap()]).exits_with(2);
    run(&["root", "remove", "kept"]).succeeds();
    run(&["root", "remove", "kept"]).exits_with(2).says("there is no root");
    run(&["root", "add", "gone", garbage.as_str()]).exits_with(2).says("not in the store");
    run(&["gc", "--keep", "0s"]).succeeds();
    assert!(cofferdam.verified_blobs().is_empty());
    run(&["gc", "--blob-service-addr", "memory://"]).exits_with(2).says("not a local one");
}

#[test]
fn a_running_build_keeps_its_inputs() {
    let cofferdam = Cofferdam::new();
    let input = cofferdam.file("input/file", "still here");
    let build = cofferdam.build().input("input", input.parent().unwrap()).output("build/out");
    let mut running = build.start_shell("echo in the middle; sleep 15; cat /inputs/input/file > out");
    running.wait_for("in the middle");
    let collected = cofferdam.command(["store", "gc", "--keep", "0s", "--json"]).succeeds().json();
    assert_eq!(collected["left"], json!({ "blobs": 1, "directories": 1 }));
    assert!(running.is_alive(), "this test can't fail: the build has ended already");
    let built = running.end().succeeds();
    assert_eq!(built.output().node, NodeText::file(b"still here", false));
    // Only the build kept them.
    cofferdam.command(["store", "gc", "--keep", "0s"]).succeeds();
    assert!(cofferdam.verified_blobs().is_empty());
}

#[test]
fn a_copy_has_the_same_contents() {
    let cofferdam = store();
    let [one, other] = [1, 2].map(|id| cofferdam.import(&tree(&cofferdam, id)));
    let run = |arguments: &[&str]| cofferdam.command([&["store"], arguments].concat());
    let copied = run(&["copy", "default", "copy", "--json", one.as_str()]).succeeds().json();
    assert_eq!(copied["blobs"], copied["copied"]["blobs"]);
    let rest = run(&["copy", "default", "copy", "--json"]).succeeds().json();
    assert!(rest["copied"]["blobs"].as_u64() < rest["blobs"].as_u64(), "{rest}");
    let copy = cofferdam.files().join("copy");
    let addresses = [format!("file://{}/blobs", copy.display()), format!("redb://{}/directories.redb", copy.display())];
    let in_copy = ["--blob-service-addr", &addresses[0], "--directory-service-addr", &addresses[1]];
    run(&[&["verify"], &in_copy[..]].concat()).succeeds();
    run(&[&["verify", one.as_str(), other.as_str()], &in_copy[..]].concat()).succeeds();
    run(&["copy", "memory://", "copy"]).exits_with(2).says("can't be listed");
}

#[test]
fn a_copy_goes_to_an_object_store_and_back() {
    let cofferdam = store();
    let node = cofferdam.import(&tree(&cofferdam, 1));
    let objects = format!("objectstore+file://{}", cofferdam.files().join("objects").display());
    let copy = |from: &str, to: &str| {
        cofferdam.command(["store", "copy", from, to, "--json", node.as_str()]).succeeds().json()
    };
    let there = copy("default", &objects);
    assert_eq!(there["blobs"], there["copied"]["blobs"]);
    assert_eq!(copy("default", &objects)["copied"]["blobs"], 0);
    assert_eq!(copy(&objects, "back"), there);
    let back = cofferdam.files().join("back");
    let addresses = [format!("file://{}/blobs", back.display()), format!("redb://{}/directories.redb", back.display())];
    let in_back = ["--blob-service-addr", &addresses[0], "--directory-service-addr", &addresses[1]];
    cofferdam.command([&["store", "verify", node.as_str()], &in_back[..]].concat()).succeeds();
    cofferdam.command([&["store", "verify"], &in_back[..]].concat()).succeeds();
}

#[test]
fn a_full_disk_is_an_error_and_the_store_stays_intact() {
    let cofferdam = store();
    cofferdam.file("small", vec![1; 100_000]);
    cofferdam.file("large", vec![2; 20_000_000]);
    tar(&cofferdam.files(), &["-c", "-f", "large.tar", "large"]);
    fs::create_dir(cofferdam.files().join("disk")).unwrap();
    // The disk is visible only to this script.
    let script = r#"
        mount -t tmpfs -o size=12m none disk || exit 99
        export COFFERDAM_STATE_DIR="$PWD/disk/state"
        small=$("$0" import small | cut -f1) || exit 98
        for arguments in "large" "--format tar large.tar"; do
            "$0" import $arguments; echo "exit code $?"
        done
        "$0" store verify && "$0" export "$small" exported && echo sound
        "$0" export "$small" disk/full || echo "exit code $?"
        head -c 20000000 /dev/zero > disk/filler
        "$0" export "$small" disk/full || echo "exit code $?"
        "$0" store gc --keep 0s || echo "exit code $?"
        rm disk/filler
        "$0" store verify && echo sound
        ls -A disk/state/store/blobs/staging
    "#;
    let run = Command::new("unshare")
        .args(["--mount", "sh", "-c", script])
        .arg(program())
        .current_dir(cofferdam.files())
        .output()
        .unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{stdout}\n{stderr}\nThis test mounts a small disk, for which it must run as root.");
    let told: Vec<_> = stdout.lines().collect();
    assert_eq!(&told[..3], ["exit code 3", "exit code 3", "sound"], "{stdout}\n{stderr}");
    assert!(told.contains(&"sound") && told.last() == Some(&"sound"), "{stdout}\n{stderr}");
    assert!(stderr.matches("No space left on device").count() >= 3, "{stderr}");
    for path in ["large: can't be stored", "disk/state/store/blobs/staging: No space left", "disk/full"] {
        assert!(stderr.contains(path), "{path}: {stderr}");
    }
    assert_eq!(castore::node_of(&cofferdam.files().join("exported")), NodeText::file(&[1; 100_000], false));
}

/// Pseudo-random numbers, the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    fn of<T: Clone>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize].clone()
    }
}

/// An operation on the store, by a process that is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Work {
    ImportPath,
    ImportTar,
    ImportNar,
    Export,
    CollectOld,
    CollectAll,
    AddRoot,
}

impl Work {
    const ALL: [Self; 7] = [
        Self::ImportPath,
        Self::ImportTar,
        Self::ImportNar,
        Self::Export,
        Self::CollectOld,
        Self::CollectAll,
        Self::AddRoot,
    ];

    fn is_import(self) -> bool {
        matches!(self, Self::ImportPath | Self::ImportTar | Self::ImportNar)
    }

    fn start(self, cofferdam: &Cofferdam, id: usize, node: &NodeText) -> Running {
        let path = format!("tree-{id}");
        let (tar, nar) = (format!("{path}.tar"), format!("{path}.nar"));
        let export = format!("export-{id}");
        cofferdam.start_command(match self {
            Self::ImportPath => vec!["import", &path],
            Self::ImportTar => vec!["import", "--format", "tar", &tar],
            Self::ImportNar => vec!["import", "--format", "nar", &nar],
            Self::Export => vec!["export", node.as_str(), &export],
            Self::CollectOld => vec!["store", "gc", "--keep", "1h"],
            Self::CollectAll => vec!["store", "gc", "--keep", "0s"],
            Self::AddRoot => vec!["store", "root", "add", &path, node.as_str()],
        })
    }
}

/// The required contents of the store.
struct Acknowledged {
    /// Nodes imported since the last collection of unrooted ones.
    imported: Vec<usize>,
    rooted: BTreeMap<String, NodeText>,
}

/// Pairs of processes. Each process is killed.
const PAIRS: usize = 200;

#[test]
fn hundreds_of_kills_lose_and_corrupt_nothing() {
    let cofferdam = store();
    let mut nodes = Vec::new();
    for id in 0..4 {
        let node = cofferdam.import(&tree(&cofferdam, id));
        for format in ["tar", "nar"] {
            let archive = format!("tree-{id}.{format}");
            cofferdam.command(["export", "--format", format, node.as_str(), &archive]).succeeds();
        }
        nodes.push(node);
    }
    // The longest delay of a kill. It adapts to the machine's speed.
    let mut durations: BTreeMap<_, _> =
        Work::ALL.map(|work| (work, work.start(&cofferdam, 0, &nodes[0]).end().took)).into();
    let mut acknowledged = Acknowledged { imported: Vec::new(), rooted: BTreeMap::new() };
    resynchronise(&cofferdam, &mut acknowledged, &[]);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut killed, mut survived) = (0, 0);
    for pair in 0..PAIRS {
        let works = [(); 2].map(|()| (random.of(&Work::ALL), random.below(4) as usize));
        let begun = Instant::now();
        let running = works.map(|(work, id)| {
            let _ = fs::remove_dir_all(cofferdam.files().join(format!("export-{id}")));
            let micros = u64::try_from(durations[&work].as_micros()).unwrap() * 5 / 4;
            let deadline = begun + Duration::from_micros(random.below(micros));
            (work, id, deadline, work.start(&cofferdam, id, &nodes[id]))
        });
        let mut running = Vec::from(running);
        running.sort_by_key(|(_, _, deadline, _)| *deadline);
        let mut done = Vec::new();
        for (work, id, deadline, process) in running {
            thread::sleep(deadline.saturating_duration_since(Instant::now()));
            process.signal(Signal::SIGKILL);
            let ended = process.end();
            let duration = durations.get_mut(&work).unwrap();
            if ended.signal().is_some() {
                killed += 1;
                *duration = *duration * 17 / 16;
            } else {
                survived += 1;
                *duration = *duration * 15 / 16;
            }
            done.push((work, id, ended));
        }
        // If a collection began, everything but roots may be gone.
        let collected_all = works.iter().any(|(work, _)| *work == Work::CollectAll);
        if collected_all {
            acknowledged.imported.clear();
        }
        for (work, id, ended) in done {
            let failed_as_allowed = collected_all || matches!(work, Work::Export | Work::AddRoot);
            let ended_well = ended.signal().is_some() || ended.stderr.is_empty() || failed_as_allowed;
            assert!(ended_well, "{work:?}: {ended}");
            if work.is_import() && !collected_all && !ended.stdout.is_empty() {
                assert_eq!(printed(&ended.stdout).as_ref(), Some(&nodes[id]), "{ended}");
                acknowledged.imported.push(id);
            }
            let exported = cofferdam.files().join(format!("export-{id}"));
            if work == Work::Export && exported.exists() {
                assert_eq!(castore::node_of(&exported), nodes[id], "half an export is there");
            }
        }
        let attempted: Vec<_> =
            works.iter().filter(|(work, _)| *work == Work::AddRoot).map(|(_, id)| (*id, nodes[*id].clone())).collect();
        resynchronise(&cofferdam, &mut acknowledged, &attempted);
        if pair % 8 == 7 || pair + 1 == PAIRS {
            check(&cofferdam, &acknowledged, &nodes);
        }
        if pair % 32 == 31 {
            for name in acknowledged.rooted.keys() {
                cofferdam.command(["store", "root", "remove", name]).succeeds();
            }
            acknowledged.rooted.clear();
        }
    }
    assert!(killed > PAIRS / 2, "this test tests little: {killed} were killed, {survived} were not");
    println!("{killed} processes were killed, {survived} ended before");
    assert!(cofferdam.leftovers().is_empty(), "{:#?}", cofferdam.leftovers());
}

/// Reads the roots. Earlier ones must exist, and new ones only if they were `attempted`.
fn resynchronise(cofferdam: &Cofferdam, acknowledged: &mut Acknowledged, attempted: &[(usize, NodeText)]) {
    let listed = cofferdam.command(["store", "root", "list"]).succeeds().stdout;
    let listed: BTreeMap<_, _> = listed
        .lines()
        .map(|line| line.split_once('\t').expect("a node and a name"))
        .map(|(node, name)| (name.to_owned(), NodeText::printed(node)))
        .collect();
    for (name, node) in &acknowledged.rooted {
        assert_eq!(listed.get(name), Some(node), "a root is lost");
    }
    for (name, node) in &listed {
        let is_new = attempted.iter().any(|(id, new)| *name == format!("tree-{id}") && node == new);
        let was_there = acknowledged.rooted.contains_key(name) || acknowledged.rooted.is_empty();
        assert!(is_new || was_there, "an unknown root: {name}");
    }
    acknowledged.rooted = listed;
}

fn check(cofferdam: &Cofferdam, acknowledged: &Acknowledged, nodes: &[NodeText]) {
    let verified = cofferdam.command(["store", "verify", "--json"]).succeeds().json();
    assert_eq!(verified["faults"], json!([]));
    let imported = acknowledged.imported.iter().map(|id| &nodes[*id]);
    let mut all: Vec<_> = imported.chain(acknowledged.rooted.values()).map(NodeText::as_str).collect();
    all.sort_unstable();
    all.dedup();
    if !all.is_empty() {
        cofferdam.command(["store", "verify"].into_iter().chain(all)).succeeds();
    }
    assert!(cofferdam.leftovers().is_empty(), "{:#?}", cofferdam.leftovers());
}
