//! The helpers of a machine have a cgroup of their own, which bounds what they use of the host together.
//!
//! Where this host has no cgroup v2 with the controllers, the tests run in the outer machine, whose kernel has them.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    process::{self, Command},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use cofferdam::machine::jail::{Program, Rules, Shares, Spawner, View, Walls};
use cofferdam_tests::{Cofferdam, nested::Outer, program, slots, stretched, vmm};
use tokio::runtime::{Handle, Runtime};

const ATTACKER: &str = env!("CARGO_BIN_EXE_attacker");

/// Memory of a machine, in bytes.
const MEMORY_BYTES: u64 = 128 << 20;

/// Set in the outer machine where its processor emulates, so that no machine can run in it in time.
const EMULATED: &str = "COFFERDAM_TEST_CGROUPS_EMULATED";

/// Set in a process that runs this test alone, since it moves to a cgroup of its own, or serves this host's files to the outer
/// machine and so has an umask of 0.
const ALONE: &str = "COFFERDAM_TEST_CGROUPS_ALONE";

/// The arguments for that.
const ALONE_ARGUMENTS: [&str; 3] =
    ["--exact", "cgroups::the_helpers_of_each_machine_have_a_cgroup_that_bounds_them_together", "--nocapture"];

/// Time limit for the outer machine's command.
const OUTER_LIMIT: Duration = Duration::from_secs(300);

/// The root of this host's cgroups, if a test may divide it.
fn root() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("/proc is mounted");
    let mut mounts = mounts.lines().filter_map(|line| line.split_once(" cgroup2 ")?.0.split(' ').nth(1));
    let root = PathBuf::from(mounts.next()?);
    let controllers = fs::read_to_string(root.join("cgroup.controllers")).ok()?;
    let has = |name: &str| controllers.split_whitespace().any(|controller| controller == name);
    let enabled = ["memory", "pids", "cpu"].into_iter().all(has);
    let divided = enabled.then(|| fs::write(root.join("cgroup.subtree_control"), "+memory +pids +cpu"));
    divided.is_some_and(|divided| divided.is_ok()).then_some(root)
}

/// A cgroup for one process that is to divide it. It is removed with all below it.
struct Delegated(PathBuf);

impl Delegated {
    fn new(root: &Path, name: &str) -> Self {
        let path = root.join(format!("cofferdam-{name}-{}", process::id()));
        fs::create_dir(&path).expect("root may make cgroups");
        Self(path)
    }

    /// A command that runs in it.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", "echo 0 > \"$0/cgroup.procs\" && exec \"$@\""]).arg(&self.0).arg(program);
        command
    }

    fn machines(&self) -> Vec<PathBuf> {
        let there = fs::read_dir(&self.0).into_iter().flatten().flatten().map(|entry| entry.path());
        there
            .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("machine-")))
            .collect()
    }
}

impl Drop for Delegated {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        let below = fs::read_dir(&self.0).into_iter().flatten().flatten().map(|entry| entry.path());
        let _ = below.filter(|path| path.is_dir()).try_for_each(fs::remove_dir).and_then(|()| fs::remove_dir(&self.0));
    }
}

#[test]
fn the_helpers_of_each_machine_have_a_cgroup_that_bounds_them_together() {
    if env::var_os(ALONE).is_none() {
        let own = env::current_exe().expect("/proc is mounted");
        let ended = Command::new(own).args(ALONE_ARGUMENTS).env(ALONE, "1").output().expect("it can run");
        let [said, errors] = [&ended.stdout, &ended.stderr].map(|bytes| String::from_utf8_lossy(bytes));
        println!("{said}\n{errors}");
        assert!(ended.status.success() && said.contains("cgroups were tried"), "{}", ended.status);
        return;
    }
    match root() {
        Some(root) => {
            // First, since a process that has divided its cgroup isn't in the root's any more.
            build(&root);
            take_over(&root);
            println!("cgroups were tried");
        }
        None => in_the_outer_machine(),
    }
}

fn in_the_outer_machine() {
    assert!(env::var_os(EMULATED).is_none(), "the outer machine has no cgroup v2 with controllers");
    println!("this host's cgroup v2 has no controllers for tests: it is tried in an emulated machine");
    let _slot = slots::take_one();
    let mut bin = OsString::from("COFFERDAM_BIN=");
    bin.push(program());
    let mut command = vec![OsString::from("env"), format!("{EMULATED}=1").into(), format!("{ALONE}=1").into(), bin];
    command.push(env::current_exe().expect("/proc is mounted").into());
    command.extend(ALONE_ARGUMENTS.map(OsString::from));
    let said = Said::default();
    let overdue = async {
        tokio::time::sleep(stretched(OUTER_LIMIT)).await;
        "the test takes too long".to_owned()
    };
    let outer = Outer { memory_mib: 1536, xsave: false };
    let runtime = Runtime::new().expect("threads can be started");
    let code = runtime.block_on(outer.run(&command, said.clone(), overdue));
    let said = String::from_utf8_lossy(&said.0.lock().expect("nobody panics with it")).into_owned();
    println!("{said}");
    assert!(matches!(code, Ok(0)) && said.contains("cgroups were tried"), "{code:?}");
}

/// The output of a command in the outer machine.
#[derive(Clone, Default)]
struct Said(Arc<Mutex<Vec<u8>>>);

impl io::Write for Said {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().map_err(|_| io::ErrorKind::Other)?.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The lines `KEY VALUE` of a cgroup's file.
fn values(file: &Path) -> BTreeMap<String, u64> {
    let text = fs::read_to_string(file).expect("the cgroup is there");
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.map(|(key, value)| (key.to_owned(), value.parse().expect("a number"))).collect()
}

/// What the attacker says of one attempt, or nothing if it was killed.
async fn attempt(spawner: &Spawner, attempt: &str) -> Option<String> {
    let attacker = Program::new("attacker", ATTACKER, "/").arg(attempt).walled(View::nothing());
    let mut attacker = spawner.spawn(attacker).await.expect("the attacker can be started");
    let status = attacker.wait().await;
    assert_eq!(status.success(), !attacker.is_out_of_memory(), "{status}: {}", attacker.said());
    status.success().then(|| attacker.said())
}

/// A helper that was taken over uses no more of the host than its machine may.
fn take_over(root: &Path) {
    let own = fs::read_to_string("/proc/self/cgroup").expect("/proc is mounted");
    let own = root.join(own.lines().find_map(|line| line.strip_prefix("0::/")).expect("it has a cgroup"));
    let delegated = Delegated::new(root, "walls");
    // What a daemon left that was killed.
    let left = delegated.0.join("machine-1-0");
    fs::create_dir(&left).expect("root may make cgroups");
    let mut orphan = Command::new("sleep").arg("1000").spawn().expect("sleep is there");
    let enter = |cgroup: &Path, pid: u32| fs::write(cgroup.join("cgroup.procs"), pid.to_string()).expect("root may");
    enter(&left, orphan.id());
    enter(&delegated.0, process::id());
    let runtime = Runtime::new().expect("threads can be started");
    runtime.block_on(attack(&delegated));
    assert_eq!(delegated.machines(), Vec::<PathBuf>::new());
    assert!(!orphan.wait().expect("it is a child").success());
    enter(&own, process::id());
}

async fn attack(delegated: &Delegated) {
    let shares = Shares { cpu_weight: 50, cpu_percent: 10, processes: 40, ..Shares::default() };
    let rules = Rules { walls: Walls::Namespaces, cgroups: true, shares };
    let spawner = Spawner::new(Handle::current(), rules).expect("this host walls helpers in, and delegates a cgroup");
    assert_eq!(delegated.machines(), Vec::<PathBuf>::new(), "an earlier daemon's machines are gone");
    let free = Spawner::without_walls(Handle::current()).expect("a thread can be started");

    let other = spawner.for_machine(MEMORY_BYTES, 1).expect("a cgroup can be made");
    let sleeper = Program::new("other", ATTACKER, "/").arg("sleep=1000").walled(View::nothing());
    let mut sleeper = other.spawn(sleeper).await.expect("it can be started");
    let [path] = &delegated.machines()[..] else { panic!("one machine has one cgroup") };
    let read = |file: &str| fs::read_to_string(path.join(file)).expect("the cgroup is there").trim_end().to_owned();
    assert_eq!(read("cgroup.procs"), sleeper.pid().to_string());
    for (file, value) in [
        ("memory.max", &*MEMORY_BYTES.to_string()),
        ("memory.oom.group", "1"),
        ("pids.max", "40"),
        ("cpu.weight", "50"),
        ("cpu.max", "10000 100000"),
    ] {
        assert_eq!(read(file), value, "{file}");
    }
    if path.join("memory.swap.max").exists() {
        assert_eq!(read("memory.swap.max"), "0");
    }

    // Each attempt works without the cgroup.
    for (name, refusal) in [("fill-memory=402653184", None), ("threads=100", Some("refused"))] {
        assert!(attempt(&free, name).await.is_some_and(|said| said.ends_with(" done")), "the control: {name}");
        let machine = spawner.for_machine(MEMORY_BYTES, 1).expect("a cgroup can be made");
        let said = attempt(&machine, name).await;
        assert_eq!(said.is_some(), refusal.is_some(), "{name}: {said:?}");
        assert!(said.is_none_or(|said| said.contains(" refused: ")), "{name}");
    }
    let machine = spawner.for_machine(MEMORY_BYTES, 1).expect("a cgroup can be made");
    attempt(&machine, "spin=300").await;
    let busy = delegated.machines().into_iter().find(|one| one != path).expect("its cgroup is there");
    let statistics = values(&busy.join("cpu.stat"));
    assert!(statistics["nr_throttled"] > 0, "{statistics:?}");
    // Nothing of this has touched the other machine.
    assert!(!sleeper.is_out_of_memory());
    assert_eq!(read("cgroup.procs"), sleeper.pid().to_string());
    sleeper.kill().await;
}

/// A build has all its helpers in one cgroup, which is gone after it.
fn build(root: &Path) {
    let delegated = Delegated::new(root, "build");
    let cofferdam = Cofferdam::new();
    let config = cofferdam.file("daemon.toml", "allow_emulation = true\n[cgroups]\nrequire = true\n");
    let check = |mut command: Command| {
        command.args(["daemon", "--check-config", "--config"]).arg(&config);
        let ended = command.env("COFFERDAM_STATE_DIR", cofferdam.files()).output().expect("it can be started");
        (ended.status.code(), String::from_utf8_lossy(&ended.stderr).into_owned())
    };
    let (code, said) = check(Command::new(program()));
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("cgroups.require") && said.contains("Delegate="), "{said}");
    let (code, said) = check(delegated.command(program()));
    assert!(!said.contains("cgroups"), "{code:?}: {said}");
    if env::var_os(EMULATED).is_some() {
        println!("not shown in the emulated machine, which runs no others: the cgroup of a build");
        return;
    }
    let mut command = delegated.command(program());
    command.args(["run", "--memory", "256M", "--bin-sh", "--", "/bin/sh", "-c", "sleep 5"]);
    command.env("COFFERDAM_STATE_DIR", cofferdam.files());
    let _slot = slots::take_one();
    let mut build = command.spawn().expect("it can be started");
    let begun = Instant::now();
    let helpers = vmm::processes().len() + 1;
    let count = || {
        let machines = delegated.machines();
        assert!(machines.len() <= 1, "{machines:?}");
        let there = machines.first().and_then(|machine| fs::read_to_string(machine.join("cgroup.procs")).ok());
        there.map_or(0, |there| there.lines().count())
    };
    while count() < helpers {
        assert!(begun.elapsed() < stretched(Duration::from_secs(60)), "{} of {helpers} helpers", count());
        thread::sleep(Duration::from_millis(10));
    }
    assert!(build.wait().expect("it is a child").success());
    assert_eq!(delegated.machines(), Vec::<PathBuf>::new());
}
