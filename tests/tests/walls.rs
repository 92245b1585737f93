//! A helper process that its guest has taken over holds one build, and nothing else of the host.
//!
//! The same program makes the same attempts twice: without walls, which shows that they work here, and behind those of a
//! helper.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsStr,
    fs::{self, Permissions},
    net::TcpListener,
    os::{
        linux::net::SocketAddrExt,
        unix::{
            fs::PermissionsExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
    path::{Path, PathBuf},
    process::{self, Command},
    thread,
    time::Duration,
};

use cofferdam::machine::jail::{Program, Rules, Spawner, View, Walls};
use cofferdam_tests::{Cofferdam, Daemon, Running, copy_program, processes::Process, program, stretched, vmm};
use nix::{sys::signal::Signal, unistd::geteuid};
use tokio::runtime::{Handle, Runtime};

const ATTACKER: &str = env!("CARGO_BIN_EXE_attacker");

/// Longest file of an attacker, in bytes.
const LONGEST_FILE: u64 = 64 << 20;

/// Memory of an attacker's machine, in bytes.
const MEMORY_BYTES: u64 = 256 << 20;

/// Attempts without a target.
const ALONE: &[&str] = &[
    "choose-signal",
    "become-root",
    "become-another",
    "change-group",
    "change-groups",
    "raise-capability",
    "new-user-namespace",
    "new-network",
    "new-mounts",
    "mount",
    "mount-new",
    "clone-mount",
    "change-root",
    "outlive-daemon",
    "raise-limit",
    "raise-priority",
    "lock-memory",
    "packet-socket",
    "internet-socket",
    "internet6-socket",
    "list-sockets",
    "crypto-socket",
    "guest-socket",
    "bpf",
    "performance-counters",
    "page-faults",
    "keyring",
    "key",
    "io-uring",
    "shared-memory",
    "message-queue",
    "personality",
    "kernel-log",
    "host-name",
    "fork",
    "fork-as-clone",
    "grow-memory-file",
    "reserve-memory",
    "run=/bin/true",
    "read=/etc/passwd",
    "list=/proc",
    "list=/sys",
    "list=/home",
    "make-directory=.",
    "make-file=.",
    "make-symlink=.",
    "make-pipe=.",
    "rename=.",
    "link=.",
    "grow=.",
    "threads",
];

/// Attempts on another process.
const ON_PROCESSES: &[&str] = &[
    "memory",
    "descriptors",
    "root-of",
    "signal",
    "signal-thread",
    "queue-signal",
    "own-signals",
    "own-signals-ex",
    "own-signals-ioctl",
    "trace",
    "write-memory",
    "compare",
    "open-process",
    "limit-process",
    "schedule-process",
    "enter-network",
    "enter-files",
];

/// What kernels may lack, so that a control proves nothing.
const OPTIONAL: &[&str] = &[
    "compare",
    "crypto-socket",
    "guest-socket",
    "io-uring",
    "key",
    "keyring",
    "page-faults",
    "performance-counters",
    "raise-limit",
];

/// A daemon, and another tenant's machine.
struct Victims {
    cofferdam: Cofferdam,
    daemon: Daemon,
    build: Running,
}

impl Victims {
    fn start() -> Self {
        let cofferdam = Cofferdam::new();
        let daemon = Daemon::start(&cofferdam, "");
        let build = cofferdam.build().on(&daemon).start_shell("echo begun; sleep 1000");
        build.wait_for("begun");
        Self { cofferdam, daemon, build }
    }

    fn helper(&self) -> Process {
        self.cofferdam.helper(&vmm::processes()[0].0, self.daemon.running())
    }

    /// Attempts on its sockets, its files and its processes.
    fn attempts(&self) -> Vec<String> {
        let run_dir = self.run_dir();
        let socket = self.daemon.addr();
        let connect = [socket.trim_start_matches("grpc+unix://").to_owned(), path(&run_dir.join("vsock/s"))];
        let files = [run_dir.join("scratch.ext4"), run_dir.join("lock")];
        let files = files.iter().flat_map(|file| ["read", "write"].map(|how| format!("{how}={}", path(file))));
        let pids = [self.daemon.running().pid(), self.helper().pid, process::id().cast_signed()];
        let processes = pids.iter().flat_map(|pid| ON_PROCESSES.iter().map(move |attempt| format!("{attempt}={pid}")));
        let lists = [format!("list={}", path(&run_dir)), format!("list={}", path(&self.cofferdam.run_directory()))];
        connect.into_iter().map(|path| format!("connect={path}")).chain(files).chain(lists).chain(processes).collect()
    }

    fn end(self) {
        self.build.signal(Signal::SIGINT);
        self.build.end().executor_fails("interrupted");
        self.daemon.end().succeeds();
    }

    fn run_dir(&self) -> PathBuf {
        let runs =
            fs::read_dir(self.cofferdam.run_directory()).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut runs = runs.filter(|path| path.is_dir());
        runs.next().expect("a machine runs")
    }
}

fn path(path: &Path) -> String {
    path.to_str().expect("temporary directories are UTF-8").to_owned()
}

/// A run directory of the attacker's own.
fn run_dir() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("temporary files can be made");
    fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).expect("temporary files can be written");
    let disk = directory.path().join("disk");
    fs::write(&disk, [0; 1 << 20]).expect("temporary files can be written");
    fs::set_permissions(disk, Permissions::from_mode(0o666)).expect("temporary files can be written");
    directory
}

/// How each attempt went: nothing where it succeeded, else the reason.
async fn attack(
    program: &Path,
    spawner: &Spawner,
    view: View,
    attempts: &[String],
) -> BTreeMap<String, Option<String>> {
    let mut answers = BTreeMap::new();
    // A process and a directory for each, since some change who the attacker is, or what there is.
    for attempt in attempts {
        let run_dir = run_dir();
        let program = Program::new("attacker", program, run_dir.path()).arg(attempt).longest_file(LONGEST_FILE);
        let mut attacker = spawner.spawn(program.walled(view.clone())).await.expect("the attacker can be started");
        let status = attacker.wait().await;
        let said = attacker.said();
        assert!(status.success(), "{status}: {said}");
        let reason = said.split_once(" refused: ").map(|(_, reason)| reason.to_owned());
        assert!(reason.is_some() || said.ends_with(" done"), "{attempt}: {said}");
        answers.insert(attempt.clone(), reason);
    }
    answers
}

#[test]
fn a_helper_that_was_taken_over_reaches_nobody_else() {
    let victims = Victims::start();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let name = format!("victim-{}", process::id());
    let _abstract = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let mut attempts = victims.attempts();
    attempts.push(format!("connect-tcp={}", tcp.local_addr().unwrap()));
    attempts.push(format!("connect-abstract={name}"));
    attempts.extend(ALONE.iter().map(|attempt| (*attempt).to_owned()));

    let runtime = Runtime::new().unwrap();
    let _guard = runtime.enter();
    let free = Spawner::without_walls(Handle::current()).unwrap();
    let control = runtime.block_on(attack(ATTACKER.as_ref(), &free, View::nothing(), &attempts));
    for (attempt, reason) in control.iter().filter_map(|(attempt, reason)| Some((attempt, reason.as_ref()?))) {
        let kind = attempt.split('=').next().unwrap();
        assert!(OPTIONAL.contains(&kind), "the control {attempt} was refused: {reason}");
        println!("not shown on this host, which refuses it to all: {attempt}: {reason}");
    }
    let count = runtime.block_on(all_are_refused(ATTACKER.as_ref(), &control));
    let shown = control.iter().filter(|(_, refused)| refused.is_none()).map(|(attempt, _)| &**attempt);
    // A VMM may write files as long as the scratch disk.
    let shown: Vec<_> = shown.filter(|attempt| *attempt != "grow-memory-file").collect();
    for (setting, real) in replaceable() {
        let count = attack_in_the_place_of(setting, &real, &shown);
        println!("in the place of {}: {count} attempts were refused", real.display());
    }
    victims.end();
    assert!(count >= 100, "{count}");
}

/// The helpers that an operator can name: their variables, and their files.
fn replaceable() -> Vec<(&'static str, PathBuf)> {
    let device = cofferdam::machine::vmm::survey().qemu.vsock_device.map(|found| found.program);
    let device =
        device.filter(|_| vmm::setting() == "COFFERDAM_QEMU").map(|path| ("COFFERDAM_VHOST_DEVICE_VSOCK", path));
    [(vmm::setting(), vmm::choice().program.clone())].into_iter().chain(device).collect()
}

/// Starts a build with the attacker as one of its helpers, and gives the number of its attempts. None may succeed.
fn attack_in_the_place_of(setting: &str, real: &Path, attempts: &[&str]) -> usize {
    let cofferdam = Cofferdam::new();
    let attacker = cofferdam.files().join("attacker");
    copy_program(ATTACKER.as_ref(), &attacker);
    cofferdam.file("attacker.real", path(real));
    let build = cofferdam.build().without_slot().host_variable(setting, &attacker).start_shell("true");
    let wait = |what: &str, is_there: &dyn Fn() -> bool| {
        while !is_there() {
            assert!(build.age() < stretched(Duration::from_secs(60)), "{what}: {}", build.stderr_so_far());
            thread::sleep(Duration::from_millis(10));
        }
    };
    let runs = || fs::read_dir(cofferdam.run_directory()).into_iter().flatten().flatten().map(|entry| entry.path());
    let run_dir = || runs().find(|path| path.join("vsock").is_dir());
    wait("no machine is started", &|| run_dir().is_some());
    let file = run_dir().expect("it was there just now").join("attempts");
    // Not before it is whole, and may be written.
    let aside = cofferdam.file("attempts", attempts.join("\n") + "\n");
    fs::set_permissions(&aside, Permissions::from_mode(0o666)).expect("the test's own file");
    fs::rename(aside, &file).expect("both are in the test's directory");
    let answers = || fs::read_to_string(&file).unwrap_or_default();
    wait("the attacker does not end", &|| answers().ends_with("\nend\n"));
    let answers = answers();
    let answers: Vec<_> = answers.lines().skip(attempts.len()).filter(|line| *line != "end").collect();
    assert_eq!(answers.len(), attempts.len(), "{answers:#?}");
    let succeeded: Vec<_> = answers.iter().filter(|answer| !answer.contains(" refused: ")).collect();
    assert!(succeeded.is_empty(), "in the place of {}: {succeeded:?}", real.display());
    build.signal(Signal::SIGINT);
    build.end().exits_with(3);
    attempts.len()
}

/// Makes the attempts that succeeded in the control once more from behind the walls of each kind of helper.
async fn all_are_refused(program: &Path, control: &BTreeMap<String, Option<String>>) -> usize {
    let shown: Vec<_> = control.iter().filter(|(_, refused)| refused.is_none()).map(|(name, _)| name.clone()).collect();
    let rules = Rules { walls: Walls::Namespaces, ..Rules::default() };
    let walled = Spawner::new(Handle::current(), rules).expect("this host walls helpers in");
    for (helper, view) in [("device", View::nothing()), ("VMM", View::nothing().run_dir().device("/dev/null"))] {
        let answers =
            attack(program, &walled.for_machine(MEMORY_BYTES, 1).expect("user ids are left"), view, &shown).await;
        let done: Vec<_> = answers.iter().filter(|(_, refused)| refused.is_none()).map(|(name, _)| name).collect();
        assert!(done.is_empty(), "a {helper} that was taken over succeeded in {done:?}");
    }
    println!("2 × {} attempts were refused", shown.len());
    2 * shown.len()
}

/// Names the attacker's file to [`as_an_ordinary_user`].
const AS_AN_ORDINARY_USER: &str = "COFFERDAM_TEST_ATTACKER_OF_AN_ORDINARY_USER";

/// Is the process in [`the_helpers_of_an_ordinary_user_are_walled_in_too`]; without the variable there is nothing to do.
#[test]
fn as_an_ordinary_user() {
    let Some(attacker) = env::var_os(AS_AN_ORDINARY_USER).map(PathBuf::from) else { return };
    let runtime = Runtime::new().unwrap();
    let _guard = runtime.enter();
    runtime.block_on(async {
        let free = Spawner::without_walls(Handle::current()).unwrap();
        let mut victim = free.spawn(Program::new("victim", "/bin/sleep", "/").arg("1000")).await.unwrap();
        let pids = [victim.pid(), process::id()];
        let on_processes = pids.iter().flat_map(|pid| ON_PROCESSES.iter().map(move |name| format!("{name}={pid}")));
        let attempts: Vec<_> = ALONE.iter().map(|attempt| (*attempt).to_owned()).chain(on_processes).collect();
        let control = attack(&attacker, &free, View::nothing(), &attempts).await;
        let count = all_are_refused(&attacker, &control).await;
        assert!(count >= 60, "{count}");
        victim.kill().await;
    });
}

#[test]
fn the_helpers_of_an_ordinary_user_are_walled_in_too() {
    // Others may not be let into the directories of root's that these are in.
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let copy = |from: &Path, name: &str| {
        let to = directory.path().join(name);
        copy_program(from, &to);
        to
    };
    let (test, attacker) = (copy(&env::current_exe().unwrap(), "test"), copy(ATTACKER.as_ref(), "attacker"));
    let user = ["--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"];
    let mut command = if geteuid().is_root() { Command::new("setpriv") } else { Command::new("env") };
    command.args(user.iter().filter(|_| geteuid().is_root())).arg(test);
    command.args(["--exact", "walls::as_an_ordinary_user", "--nocapture"]).env(AS_AN_ORDINARY_USER, attacker);
    let ended = command.current_dir("/").env("TMPDIR", "/tmp").output().unwrap();
    let said = String::from_utf8_lossy(&ended.stdout);
    assert!(ended.status.success(), "{said}\n{}", String::from_utf8_lossy(&ended.stderr));
    assert!(said.contains("attempts were refused"), "{said}");
    print!("{said}");
}

#[test]
fn a_host_without_user_namespaces_is_told_and_accepted_only_where_the_operator_says_so() {
    let cofferdam = Cofferdam::new();
    let without = |arguments: &[&str]| {
        let script = "echo 0 > /proc/sys/user/max_user_namespaces && exec \"$0\" \"$@\"";
        let before = ["--user", "--map-root-user", "sh", "-c", script, program().to_str().unwrap()];
        let arguments: Vec<_> = before.iter().chain(arguments).map(|argument| OsStr::new(*argument)).collect();
        cofferdam.start_program("unshare".as_ref(), arguments, &[]).end()
    };
    let told = without(&["doctor", "--json"]);
    let checks = told.json()["checks"].as_array().unwrap().clone();
    let row = checks.iter().find(|check| check["name"] == "helper processes").unwrap().clone();
    assert_eq!(row["state"], "absent", "{row}");
    assert!(row["fix"].as_str().unwrap().contains("user.max_user_namespaces"), "{row}");

    for (required, words) in [("", "namespaces are required"), ("require = \"uids\"", "uids are required")] {
        let config = format!("allow_emulation = true\n[jail]\n{required}\n");
        let file = cofferdam.file("daemon.toml", config);
        without(&["daemon", "--check-config", "--config", file.to_str().unwrap()]).exits_with(3).says(words);
    }
    let file = cofferdam.file("daemon.toml", "allow_emulation = true\n[jail]\nrequire = \"none\"\n");
    without(&["daemon", "--check-config", "--config", file.to_str().unwrap()]).succeeds();
    let run = ["run", "--bin-sh", "--memory", "256M", "--", "/bin/sh", "-c", "echo built"];
    without(&run).says("no namespaces of their own").says("built").succeeds();
}

#[test]
fn an_ordinary_user_has_ids_for_machines_by_capabilities_or_by_subordinate_ids() {
    if !geteuid().is_root() {
        println!("not run: only root can become a user with capabilities or subordinate ids");
        return;
    }
    let cofferdam = Cofferdam::new();
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
    let (ours, state) = (directory.path().join("cofferdam"), directory.path().join("state"));
    copy_program(program(), &ours);
    let ids = cofferdam.file("ids", "65534:200000:65536\n");
    let mounts =
        format!("mount --bind {0} /etc/subuid && mount --bind {0} /etc/subgid && exec \"$0\" \"$@\"", ids.display());
    let user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let capabilities = ["--inh-caps=+setuid,+setgid", "--ambient-caps=+setuid,+setgid", "--no-new-privs"];
    let subordinate = ["unshare", "--mount", "sh", "-c", &mounts];
    let own = fs::read_to_string("/proc/self/status").unwrap();
    let with_subordinate = if own.contains("NoNewPrivs:\t1") {
        println!("not shown: newuidmap has no privileges here, since this process has no_new_privs");
        "absent"
    } else {
        "ok"
    };
    for (before, more, expected) in [
        (&[][..], &["--no-new-privs"][..], "absent"),
        (&[][..], &capabilities[..], "ok"),
        (&subordinate[..], &[][..], with_subordinate),
    ] {
        let command: Vec<_> = before.iter().chain(&user).chain(more).map(|word| OsStr::new(*word)).collect();
        let command: Vec<_> =
            command.into_iter().chain([ours.as_os_str(), "doctor".as_ref(), "--json".as_ref()]).collect();
        let variables = [("COFFERDAM_STATE_DIR", state.as_os_str())];
        let told = cofferdam.start_program(command[0].as_ref(), command[1..].iter().copied(), &variables).end();
        let checks = told.json()["checks"].as_array().unwrap().clone();
        let row = checks.iter().find(|check| check["name"] == "helper processes").unwrap();
        assert_eq!(row["state"], expected, "{command:?}: {row}");
    }
}

/// `Key:` lines of a process's status.
fn status(pid: i32, thread: i32) -> BTreeMap<String, String> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{thread}/status")).expect("the process runs");
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.map(|(key, value)| (key.to_owned(), value.trim().to_owned())).collect()
}

const NAMESPACES: [&str; 7] = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"];

/// A helper's root holds its libraries, its VMM's firmware, an image's two files, devices and the run directory, which
/// alone can be written.
fn check_mounts(helper: &Process) {
    for line in fs::read_to_string(format!("/proc/{}/mountinfo", helper.pid)).expect("the process runs").lines() {
        // See proc_pid_mountinfo(5).
        let fields: Vec<_> = line.split_whitespace().collect();
        let (point, options) = (Path::new(fields[4]), fields[5]);
        let name = point.file_name().unwrap_or_default().to_string_lossy();
        let parts: Vec<_> = point.iter().collect();
        let is_device = ["/dev/null", "/dev/kvm", "/dev/urandom"].contains(&fields[4]);
        let is_expected = ["", "kernel", "initramfs", "qemu-system-x86_64"].contains(&&*name)
            || name.contains(".so")
            || point.starts_with("/usr") && parts.iter().any(|part| *part == "qemu" || *part == "seabios");
        assert!(is_expected || is_device || point == Path::new("/machine"), "{helper:?} sees {line}");
        let is_read_only = options.split(',').any(|option| option == "ro");
        assert!(is_read_only || is_device || point == Path::new("/machine"), "{helper:?} can write {line}");
    }
}

#[test]
fn helpers_share_nothing_with_the_daemon_or_with_each_other() {
    let victims = Victims::start();
    let daemon = victims.daemon.running().pid();
    let helpers: Vec<_> = victims.cofferdam.processes().into_iter().filter(|process| process.is_walled).collect();
    assert_eq!(helpers.len(), vmm::processes().len() + 1, "{helpers:#?}");
    let namespaces = |pid: i32| {
        NAMESPACES.map(|kind| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap().to_string_lossy().into_owned())
    };
    let mut seen = namespaces(daemon).to_vec();
    for helper in &helpers {
        for namespace in namespaces(helper.pid) {
            assert!(!seen.contains(&namespace), "{helper:?} shares {namespace}");
            seen.push(namespace);
        }
        let limits = fs::read_to_string(format!("/proc/{}/limits", helper.pid)).unwrap();
        let limit = |name: &str| limits.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
        assert!(limit("Max core file size").starts_with("0 "), "{helper:?}: {limits}");
        assert!(limit("Max processes").starts_with("1024 "), "{helper:?}: {limits}");
        assert!(limit("Max open files").starts_with("1024 "), "{helper:?}: {limits}");
        assert!(!limit("Max address space").starts_with("unlimited"), "{helper:?}: {limits}");
        for thread in fs::read_dir(format!("/proc/{}/task", helper.pid)).unwrap() {
            let thread = thread.unwrap().file_name().to_str().unwrap().parse().unwrap();
            let (status, of_daemon) = (status(helper.pid, thread), status(daemon, daemon));
            for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                assert_eq!(status[set], "0000000000000000", "{helper:?}: {set}");
            }
            for (line, value) in [("NoNewPrivs", "1"), ("Seccomp", "2")] {
                assert_eq!(status[line], value, "{helper:?}: {line}");
            }
            for ids in ["Uid", "Gid"] {
                assert_ne!(status[ids], of_daemon[ids], "{helper:?}: {ids}");
                assert!(!status[ids].split_whitespace().any(|id| id == "0"), "{helper:?}: {ids}");
            }
        }
        check_mounts(helper);
    }
    let uids = |helpers: &[Process]| -> Vec<_> {
        helpers.iter().map(|helper| status(helper.pid, helper.pid)["Uid"].clone()).collect()
    };
    assert!(uids(&helpers).iter().all(|uid| *uid == uids(&helpers)[0]), "one machine's helpers have one user");
    victims.end();
}
