//! With real processes.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::{Program, SpawnError, Spawner};

fn spawner() -> Spawner {
    Spawner::without_walls(tokio::runtime::Handle::current()).unwrap()
}

fn shell(script: &str) -> Program {
    Program::new("shell", "/bin/sh", "/").args(["-c", script])
}

/// Neither there nor a zombie that nobody has collected yet.
fn runs(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

fn assert_ends(pid: u32) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while runs(pid) {
        assert!(Instant::now() < deadline, "process {pid} still runs");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[tokio::test]
async fn a_child_says_and_returns_what_it_should() {
    let mut child = spawner().spawn(shell("echo out; echo err >&2; exit 7")).await.unwrap();
    assert_eq!(child.name(), "shell");
    assert_eq!(child.wait().await.code(), Some(7));
    assert_eq!(child.wait().await.code(), Some(7));
    assert_eq!(child.kill().await.code(), Some(7));
    assert_eq!(child.said(), "out\nerr");
}

#[tokio::test]
async fn a_child_is_confined() {
    let script =
        "env; pwd; ulimit -c; grep NoNewPrivs /proc/$$/status; cut -d' ' -f1,5,6 /proc/$$/stat; read x || echo eof";
    let directory = tempfile::tempdir().unwrap();
    let program = Program::new("shell", "/bin/sh", directory.path()).args(["-c", script]);
    let mut child = spawner().spawn(program).await.unwrap();
    child.wait().await;
    let (pid, directory) = (child.pid(), directory.path().display());
    assert_eq!(child.said(), format!("PWD={directory}\n{directory}\n0\nNoNewPrivs:\t1\n{pid} {pid} {pid}\neof"));
}

#[tokio::test]
async fn only_the_descriptors_handed_down_arrive_and_in_order() {
    let leaked = File::open("/dev/zero").unwrap();
    fcntl(&leaked, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let pipe_with = |text: &str| {
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(text.as_bytes()).unwrap();
        OwnedFd::from(reader)
    };
    let spawner = spawner();
    for count in [0, 1, 2, 5, 9] {
        // Numbers as low as they come: most of these are the number of another one in the child.
        let mut pipes: Vec<_> = (0..count).map(|index| pipe_with(&format!("{index}"))).collect();
        pipes.sort_by_key(|pipe| std::cmp::Reverse(pipe.as_raw_fd()));
        let expected = pipes.iter().map(|pipe| fs::read_link(format!("/proc/self/fd/{}", pipe.as_raw_fd())).unwrap());
        let expected: Vec<_> = expected.map(|path| path.display().to_string()).collect();
        let program = pipes.into_iter().fold(
            shell("for f in 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25; do readlink /proc/$$/fd/$f; done"),
            Program::descriptor,
        );
        let mut child = spawner.spawn(program).await.unwrap();
        assert!(child.wait().await.code().is_some());
        assert_eq!(child.said(), expected.join("\n"));
    }
    drop(leaked);
}

#[tokio::test]
async fn a_program_that_cannot_run_is_an_error_at_once() {
    let spawner = spawner();
    let error = spawner.spawn(Program::new("nothing", "/does/not/exist", "/")).await.unwrap_err();
    assert_eq!(error.to_string(), "cannot start nothing (/does/not/exist)");
    assert!(matches!(error, SpawnError::Start { source, .. } if source.kind() == io::ErrorKind::NotFound));
    let (reader, writer) = io::pipe().unwrap();
    let program = Program::new("nowhere", "/bin/true", "/does/not/exist").descriptor(writer);
    assert!(matches!(spawner.spawn(program).await.unwrap_err(), SpawnError::Start { .. }));
    let mut rest = String::new();
    BufReader::new(reader).read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "", "the reason for the failure went to a descriptor handed down");
}

#[tokio::test]
async fn endless_output_is_read_and_bounded() {
    let mut child = spawner().spawn(shell("head -c 3000000 /dev/zero | tr '\\0' x; echo end")).await.unwrap();
    assert!(child.wait().await.success());
    let said = child.said();
    assert!(said.starts_with("…xxx") && said.ends_with("xend"));
    assert!(said.chars().count() <= super::tail::TAIL_BYTES + 1);
}

#[tokio::test]
async fn killing_or_dropping_ends_the_whole_group() {
    let spawner = spawner();
    let mut killed = spawner.spawn(shell("sleep 1000 & echo $!; wait")).await.unwrap();
    let mut dropped = spawner.spawn(shell("sleep 1000 & echo $!; wait")).await.unwrap();
    let mut pids = vec![];
    for child in [&mut killed, &mut dropped] {
        while child.said().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        pids.extend([child.pid(), child.said().parse().unwrap()]);
    }
    assert!(pids.iter().all(|&pid| runs(pid)));
    assert_eq!(killed.kill().await.signal(), Some(libc::SIGKILL));
    drop(dropped);
    pids.into_iter().for_each(assert_ends);
}

#[tokio::test]
async fn a_dropped_child_is_dead_at_once() {
    for _ in 0..50 {
        // Memory to give back keeps a killed process dying for a while.
        let child = spawner().spawn(shell("x=$(head -c 16000000 /dev/zero | tr '\\0' x); sleep 1000")).await.unwrap();
        let pid = child.pid();
        drop(child);
        assert!(!runs(pid));
    }
}

#[tokio::test]
async fn waiting_can_be_given_up_and_taken_up() {
    let directory = tempfile::tempdir().unwrap();
    let end = directory.path().join("end");
    let script = format!("until [ -e {} ]; do sleep 0.01; done; exit 3", end.display());
    let mut child = spawner().spawn(shell(&script)).await.unwrap();
    for _ in 0..5 {
        assert!(tokio::time::timeout(Duration::from_millis(10), child.wait()).await.is_err());
    }
    fs::write(&end, "").unwrap();
    assert_eq!(child.wait().await.code(), Some(3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn children_outlive_the_task_and_the_spawner_that_started_them() {
    // Asked for from a thread that ends at once, as a worker thread of a runtime may.
    let spawner = spawner();
    let handle = tokio::runtime::Handle::current();
    let asking = std::thread::spawn(move || handle.block_on(spawner.spawn(shell("sleep 1000"))).unwrap());
    let mut child = tokio::task::spawn_blocking(move || asking.join().unwrap()).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(200), child.wait()).await.is_err());
    assert!(runs(child.pid()));
    child.kill().await;
}

/// Set for this test program where it is to do one thing alone.
const ALONE: &str = "COFFERDAM_TEST_ALONE";

/// This test program again, with one test alone in it.
fn alone(test: &str) -> Command {
    let module = module_path!().split_once("::").unwrap().1;
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([&format!("{module}::{test}"), "--exact", "--nocapture"]).env(ALONE, "");
    command
}

/// The `/proc/PID/stat` of this process's children.
fn children() -> Vec<String> {
    let stats =
        fs::read_dir("/proc").unwrap().filter_map(|one| fs::read_to_string(one.unwrap().path().join("stat")).ok());
    let parent = |stat: &str| Some(stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse());
    stats.filter(|stat| parent(stat) == Some(Ok(std::process::id()))).collect()
}

#[tokio::test]
async fn a_start_that_is_given_up_leaves_nobody() {
    if std::env::var_os(ALONE).is_none() {
        // Since other tests have children, too.
        let output = alone("a_start_that_is_given_up_leaves_nobody").output().unwrap();
        assert!(output.status.success(), "{output:?}");
        return;
    }
    let spawner = spawner();
    let mut started = 0;
    for round in 0..400 {
        let start = spawner.spawn(shell("sleep 1000"));
        // An error is a start that was given up.
        started += u32::from(tokio::time::timeout(Duration::from_micros(round * 10), start).await.is_ok());
        assert_eq!(children(), Vec::<String>::new(), "in round {round}");
    }
    assert!(started < 400, "none was given up");
}

/// Is the host process in [`children_die_with_a_killed_parent`], which runs this test program again with a variable
/// set; without it there is nothing to do.
#[tokio::test]
async fn host_process() {
    if std::env::var_os(ALONE).is_some() {
        let child = spawner().spawn(shell("sleep 1000 & wait")).await.unwrap();
        println!("child {}", child.pid());
        std::future::pending::<()>().await;
    }
}

#[test]
fn children_die_with_a_killed_parent() {
    let mut parent = alone("host_process").stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(parent.stdout.take().unwrap()).lines();
    let mut pids = lines.filter_map(|line| line.unwrap().rsplit_once("child ").map(|(_, pid)| pid.parse().unwrap()));
    let pid = pids.next().unwrap();
    assert!(runs(pid));
    parent.kill().unwrap();
    parent.wait().unwrap();
    assert_ends(pid);
}
