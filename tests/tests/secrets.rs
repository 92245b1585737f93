//! Secrets: a build's command can read them, and nothing else of it is anywhere.

use std::{
    ffi::OsStr,
    fs,
    io::Read as _,
    net::TcpListener,
    path::{Path, PathBuf},
};

use cofferdam_tests::{Build, Cofferdam, Daemon, telemetry::Collector};
use nix::sys::signal::Signal;
use sha2::{Digest as _, Sha256};

const SECRET: &str = "correcthorsebatterystaple";

/// Shows the secret's digest, its place and its rights.
const LOOK: &str = "sha256sum /run/secrets/token; stat -c '%a %u %g' /run/secrets /run/secrets/token
    grep ' /run/secrets ' /proc/mounts; ls /run/secrets
    touch /run/secrets/new || echo closed; chmod 600 /run/secrets/token || echo unchanged";

/// The files below a directory that hold a text.
fn holding(directory: &Path, text: &str) -> Vec<PathBuf> {
    let (mut open, mut found) = (vec![directory.to_owned()], Vec::new());
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(directory).expect("it can be read").flatten() {
            let kind = entry.file_type().expect("it is there");
            if kind.is_dir() {
                open.push(entry.path());
            } else if kind.is_file() && holds(&entry.path(), text.as_bytes()) {
                found.push(entry.path());
            }
        }
    }
    found
}

/// Reads a file in pieces, since disks are large, each with the end of the one before.
fn holds(path: &Path, text: &[u8]) -> bool {
    let mut file = fs::File::open(path).expect("it can be read");
    let (mut kept, mut piece) = (Vec::new(), vec![0; 1 << 20]);
    loop {
        let length = file.read(&mut piece).expect("it can be read");
        kept.extend_from_slice(&piece[..length]);
        if is_in(&kept, text) {
            return true;
        }
        if length == 0 {
            return false;
        }
        kept.drain(..kept.len().saturating_sub(text.len()));
    }
}

fn is_in(bytes: &[u8], text: &[u8]) -> bool {
    // A whole disk takes long byte by byte.
    let first = text[0];
    let mut from = 0;
    while let Some(at) = bytes[from..].iter().position(|&byte| byte == first) {
        if bytes[from + at..].starts_with(text) {
            return true;
        }
        from += at + 1;
    }
    false
}

/// How a program might print the bytes.
fn printed() -> [String; 2] {
    let list = format!("{:?}", SECRET.as_bytes());
    [SECRET.to_owned(), list.trim_matches(['[', ']']).to_owned()]
}

fn with_secret<'a>(cofferdam: &'a Cofferdam, build: Build<'a>) -> Build<'a> {
    let file = cofferdam.file("secret", SECRET);
    build.flag("--secret", format!("token={}", file.display()))
}

/// Where builds and their store leave what they write. The test's own files are elsewhere.
fn state(cofferdam: &Cofferdam) -> PathBuf {
    cofferdam.run_directory().parent().expect("it is in the state directory").to_owned()
}

#[test]
fn the_command_reads_a_secret_and_no_disk_has_it() {
    let cofferdam = Cofferdam::new();
    let build = with_secret(&cofferdam, cofferdam.build()).host_variable("COFFERDAM_LOG", "trace");
    let build = build.flag("--scratch-size", "64M").flag("--env", "MARK=onthescratchdisk");
    let running = build.start_shell(&format!("{LOOK}; echo $MARK > mark; sync; echo ready; sleep 10000"));
    running.wait_for("ready\n");
    let digest: String = Sha256::digest(SECRET).iter().map(|byte| format!("{byte:02x}")).collect();
    let stderr = running.stderr_so_far();
    for line in [&*format!("{digest}  /run/secrets/token"), "755 0 0\n400 1000 100", "\ntoken\n", "closed", "unchanged"]
    {
        assert!(stderr.contains(line), "no {line:?} in {stderr}");
    }
    let mounted = stderr.lines().find(|line| line.contains(" /run/secrets ")).expect("it is mounted");
    assert!(mounted.starts_with("secrets /run/secrets tmpfs ro,nosuid,nodev,noexec"), "{mounted}");
    // The search finds what a build writes to its disk.
    let disks = holding(&state(&cofferdam), "onthescratchdisk");
    assert!(disks.iter().any(|path| path.starts_with(cofferdam.run_directory())), "{disks:?}");
    assert_eq!(holding(&state(&cofferdam), SECRET), Vec::<PathBuf>::new());
    running.signal(Signal::SIGTERM);
    let ended = running.end().executor_fails("interrupted");
    for text in printed() {
        assert!(!ended.stderr.contains(&text), "{ended}");
    }
}

#[test]
fn no_output_and_no_remains_have_a_secret_unless_the_command_writes_it_there() {
    let cofferdam = Cofferdam::new();
    let build = with_secret(&cofferdam, cofferdam.build()).output("run/secrets/token");
    build.shell("cat /run/secrets/token > /dev/null").build_fails("output_missing");
    let build = with_secret(&cofferdam, cofferdam.build()).flag("--scratch", "run").switch("--keep-failed");
    let failed = build.shell("test -s /run/secrets/token && exit 7").build_fails("exit_code");
    assert_eq!(failed.json()["fields"]["exit_code"], 7, "{failed}");
    assert_eq!(holding(&state(&cofferdam), SECRET), Vec::<PathBuf>::new());
    // What the command writes is its own affair.
    let build = with_secret(&cofferdam, cofferdam.build()).output("build/copy");
    build.shell("cat /run/secrets/token; cp /run/secrets/token copy").succeeds().says(SECRET);
    assert_eq!(holding(&state(&cofferdam), SECRET).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_keeps_names_alone_and_reuses_no_result() {
    let cofferdam = Cofferdam::new();
    let mut collector = Collector::start(TcpListener::bind("127.0.0.1:0").expect("ports are free"));
    let config = format!("[traces]\nendpoint = {:?}", collector.endpoint);
    let trace = [("COFFERDAM_LOG", OsStr::new("trace"))];
    let daemon = Daemon::start_with(&cofferdam, &config, &trace);
    let script = "test $(cat /run/secrets/token | wc -c) = 25 && echo made > out && echo it is read";
    let run = || {
        let build = with_secret(&cofferdam, cofferdam.build().on(&daemon)).output("build/out");
        build.host_variable("COFFERDAM_LOG", "trace").shell(script).succeeds().says("it is read")
    };
    let [first, second] = [run(), run()];
    let [one, other] = [&first, &second].map(|ended| ended.build_id().expect("it has an id"));
    assert_ne!(one, other, "a result was reused");
    let plain = || cofferdam.build().on(&daemon).output("build/out").shell("echo made > out").succeeds().build_id();
    assert_eq!(plain(), plain(), "results are reused otherwise");

    let addr = daemon.addr();
    let show = |arguments: &[&str]| cofferdam.command([&["builds", "--daemon", &addr, "show"], arguments].concat());
    let shown = show(&["--json", &one]).succeeds();
    assert_eq!(shown.json()["secrets"], serde_json::json!(["token"]), "{shown}");
    assert!(show(&[&one]).succeeds().stdout.contains("secret\ttoken\n"));
    let ended = daemon.end().succeeds();
    assert!(ended.stderr.contains(&one), "the log is there");
    let spans = format!("{:?}", collector.spans());
    assert!(spans.contains(&one), "the traces are there");
    for text in printed() {
        for logged in [&ended.stderr, &first.stderr, &spans] {
            assert!(!logged.contains(&text), "{text:?} is in {logged}");
        }
    }
    assert!(!holding(&state(&cofferdam), "/run/secrets/token").is_empty(), "the records have the command");
    assert_eq!(holding(&state(&cofferdam), SECRET), Vec::<PathBuf>::new());
}

#[test]
fn wrong_secrets_are_refused_before_anything_runs() {
    let cofferdam = Cofferdam::new();
    let fine = cofferdam.file("fine", SECRET).display().to_string();
    let large = cofferdam.file("large", vec![0; (1 << 20) + 1]).display().to_string();
    let missing = cofferdam.files().join("missing").display().to_string();
    let refused = |secrets: &[String]| {
        let build = cofferdam.build().without_slot();
        let build = secrets.iter().fold(build, |build, secret| build.flag("--secret", secret));
        let refused = build.shell("true").exits_with(2);
        assert!(!refused.stderr.contains(SECRET), "{refused}");
        refused
    };
    refused(&[format!("a={large}")])
        .says(&format!("--secret a: {large:?} is larger than 1 MiB, the most for a secret"));
    refused(&["a=/dev/zero".to_owned()]).says("is larger than 1 MiB");
    refused(&[format!("a={missing}")]).says(&format!("--secret a: {missing:?} can't be read")).says("No such file");
    refused(&["a=/".to_owned()]).says("can't be read").says("Is a directory");
    refused(&[format!("../a={fine}")]).says("secrets[0].name must be a file name").says("holds a slash");
    refused(&[format!("={fine}")]).says("is empty");
    refused(&[format!("a={fine}"), format!("a={fine}")]).says("secrets[1].name must not be a duplicate (got \"a\")");
    refused(&vec![format!("a={fine}"); 17]).says("secrets must not be more than 16 (got 17)");
    refused(&["a".to_owned()]).says("has no \"=\"");
}
