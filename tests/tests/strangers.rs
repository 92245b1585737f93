//! Processes of the daemon's own user that aren't its helpers: they stand in for nobody, and see nothing.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    os::unix::{fs::MetadataExt as _, net::UnixStream, process::CommandExt as _},
    path::Path,
    process::{self, Command},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use cofferdam_castore::B3Digest;
use cofferdam_protocol::{
    FromGuest, PORT, VERSION,
    frame::{FrameWriter, MAX_FROM_GUEST_BYTES},
};
use cofferdam_tests::{Cofferdam, Daemon, Outcome};
use nix::{
    libc,
    sched::{CloneFlags, unshare},
    sys::signal::Signal,
    unistd::{fchdir, geteuid},
};

/// Threads that attack at the same time: enough that the queue of connections is seldom empty.
const ATTACKERS: usize = 3;

/// What the attackers have got.
#[derive(Debug, Default)]
struct Loot {
    /// Connections to the host that it closed.
    closed: u64,
    /// What it said before.
    told: Vec<u8>,
}

/// Processes of the same user that pretend to be the guest, as long as this runs.
struct Attack {
    attackers: Vec<JoinHandle<Loot>>,
    is_over: Arc<AtomicBool>,
}

impl Attack {
    /// On every machine below this directory.
    fn on(run_directory: &Path) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let attack = || {
            let (run_directory, is_over) = (run_directory.to_owned(), Arc::clone(&is_over));
            thread::spawn(move || {
                let mut loot = Loot::default();
                while !is_over.load(Ordering::Relaxed) {
                    let mut machines = fs::read_dir(&run_directory).into_iter().flatten().flatten();
                    if !machines.any(|machine| loot.pretend_to_be_the_guest_of(&machine.path())) {
                        thread::sleep(Duration::from_millis(1));
                    }
                }
                loot
            })
        };
        Self { attackers: (0..ATTACKERS).map(|_| attack()).collect(), is_over }
    }

    fn end(self) -> Loot {
        self.is_over.store(true, Ordering::Relaxed);
        let loots = self.attackers.into_iter().map(|attacker| attacker.join().expect("it only looks for sockets"));
        loots.fold(Loot::default(), |all, one| Loot {
            closed: all.closed + one.closed,
            told: [all.told, one.told].concat(),
        })
    }
}

impl Loot {
    /// Whether the host listened.
    fn pretend_to_be_the_guest_of(&mut self, machine: &Path) -> bool {
        let Ok(mut stream) = UnixStream::connect(machine.join(format!("vsock/s_{PORT}"))) else { return false };
        // As soon as it has heard this, the host sends the specification to a guest.
        let hello = FromGuest::Hello { version: VERSION, uptime_us: 1 };
        let _ = FrameWriter::new(&stream, MAX_FROM_GUEST_BYTES).write(&hello);
        // A host that takes it for the guest would wait for more.
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("it is not zero");
        // An error is a connection that was closed before it had been read from.
        let _ = stream.read_to_end(&mut self.told);
        self.closed += 1;
        true
    }
}

#[test]
fn a_process_that_connects_in_place_of_a_guest_learns_nothing_and_the_guest_is_heard() {
    let cofferdam = Cofferdam::new();
    let attack = Attack::on(&cofferdam.run_directory());
    let build = cofferdam.build().output("build/out").exported();
    let built = build.shell("echo secret >/dev/null; echo honest > out").succeeds();
    let Loot { closed, told } = attack.end();
    assert_eq!(built.read("build/out"), "honest\n");
    assert_eq!(told, b"", "the host said something to {closed} connections");
    assert!(closed > 100, "this test tests nothing: only {closed} connections came before the guest's\n{built}");
    let warning = "closed a connection to a machine's socket";
    let built = built.says(&format!("{warning}: only process"));
    let built = built.says(&format!("pid={} uid={}", process::id(), geteuid()));
    // Each machine has its own few lines, and a guest that didn't come in time has had another.
    let machines = 1 + built.stderr.matches("booting another").count();
    assert!(built.stderr.matches(warning).count() < 10 * machines, "{built}");
}

/// What a client sees of a build of somebody else.
fn look(cofferdam: &Cofferdam, addr: &str, id: &str) -> (String, [Outcome; 2]) {
    let ask = |arguments: &[&str]| cofferdam.command([&["builds", "--daemon", addr], arguments].concat());
    (ask(&["list"]).succeeds().stdout, [ask(&["show", id]), ask(&["cancel", id])])
}

/// Every helper once had the daemon's user, and could ask the daemon for everybody's builds.
#[test]
fn the_daemons_own_user_sees_the_builds_of_others_only_if_the_configuration_says_so() {
    let cofferdam = Cofferdam::unprivileged();
    let config = "listen = ['127.0.0.1:0']\n";
    let daemon = Daemon::start(&cofferdam, config);
    let [own, theirs] = daemon.addrs(2).try_into().unwrap();
    // It fails without a VM: whose build it is doesn't depend on how it ends. Over TCP it is another client's.
    let missing = format!("x=file:{}:7", B3Digest::of(b"missing"));
    let run = ["run", "--daemon", &theirs, "--json", "--input", &missing, "--", "/bin/true"];
    let id = cofferdam.command(run).is_refused("missing").build_id().unwrap();
    let (list, refused) = look(&cofferdam, &own, &id);
    assert_eq!(list, "ID\tSTATE\tAGE\tRAN\tCOMMAND\n");
    for refused in refused {
        refused.exits_with(2).says("you have no build with this id").says("`[operators]`");
    }
    daemon.end().succeeds();

    let user = fs::metadata(cofferdam.files()).unwrap().uid();
    let daemon = Daemon::start(&cofferdam, &format!("{config}[operators]\nusers = [{user}]"));
    let [own, theirs] = daemon.addrs(2).try_into().unwrap();
    let (list, allowed) = look(&cofferdam, &own, &id);
    assert!(list.contains("CLIENT") && list.contains("address:127.0.0.1") && list.contains(&id), "{list}");
    allowed.into_iter().for_each(|allowed| drop(allowed.succeeds()));
    let (list, _) = look(&cofferdam, &theirs, &id);
    assert!(!list.contains("CLIENT"), "an operator over TCP: {list}");
    daemon.end().succeeds();
}

#[test]
fn where_tenants_are_listed_strangers_are_refused_and_told_what_to_write() {
    let cofferdam = Cofferdam::unprivileged();
    let user = fs::metadata(cofferdam.files()).unwrap().uid();
    let refusal = format!("user:{user} is no tenant of this daemon; to admit it, write [tenants.\"user:{user}\"]");
    let missing = format!("x=file:{}:7", B3Digest::of(b"missing"));
    for (table, is_tenant) in [
        (String::new(), true),
        ("[tenants]".to_owned(), false),
        ("[tenants.'address:*']".to_owned(), false),
        (format!("[tenants.'user:{user}']\nshare = 2"), true),
        ("[tenants.'user:*']".to_owned(), true),
        (format!("[operators]\nusers = [{user}]\n[tenants]"), true),
    ] {
        let daemon = Daemon::start(&cofferdam, &table);
        let [addr] = daemon.addrs(1).try_into().unwrap();
        let list = cofferdam.command(["builds", "--daemon", &addr, "list"]);
        let read = cofferdam.command(["store", "--daemon", &addr, "verify", &missing[2..]]);
        let run = cofferdam.command(["run", "--daemon", &addr, "--json", "--input", &missing, "--", "/bin/true"]);
        if is_tenant {
            list.succeeds();
            run.is_refused("missing");
        } else {
            list.exits_with(3).says(&refusal);
            run.exits_with(3).says(&refusal);
            read.exits_with(3).says(&refusal);
        }
        daemon.end().succeeds();
    }
}

/// So many connections of a user to the daemon's socket in this directory, each with the first bytes of HTTP/2.
fn silent(directory: &Path, user: u32, connections: usize) -> Vec<UnixStream> {
    let directory = File::open(directory).expect("the daemon has made it");
    let connect = move || {
        // The thread gets its own working directory, since that user may not enter the directories above the socket.
        unshare(CloneFlags::CLONE_FS).expect("root may have one");
        fchdir(&directory).expect("it is a directory");
        // SAFETY: it changes the user of this thread alone, which ends soon, and takes no pointer.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, -1, user, -1) };
        assert_eq!(changed, 0, "{}", std::io::Error::last_os_error());
        let connect = |_| {
            let mut connection = UnixStream::connect("daemon.sock").expect("the daemon listens");
            // It may have been closed already.
            let _ = connection.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0");
            connection
        };
        (0..connections).map(connect).collect()
    };
    thread::spawn(connect).join().expect("it only connects")
}

#[test]
fn silent_connections_of_others_keep_nobody_out() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "socket_mode = 0o666");
    let [addr] = daemon.addrs(1).try_into().unwrap();
    let mut held = [(1001, 300), (1002, 300)].map(|(user, count)| silent(&cofferdam.files(), user, count));
    // It ends, by an error or not: all places are taken, and the two share them.
    drop(held[0][0].read_to_end(&mut Vec::new()));
    let third = silent(&cofferdam.files(), 1003, 1).remove(0).read(&mut [0]).unwrap();
    assert_ne!(third, 0, "the daemon's settings");
    cofferdam.command(["builds", "--daemon", &addr, "list"]).succeeds();
    // Some are still open. The daemon waits for none.
    daemon.end().succeeds();
    drop(held);
}

/// How a process of this user gets at the memory or the descriptors of another one.
fn intrusions(user: u32, victim: i32) -> Vec<&'static str> {
    let intrude = move || {
        if geteuid().as_raw() != user {
            // SAFETY: it changes the user of this thread alone, which ends soon, and takes no pointer.
            let changed = unsafe { libc::syscall(libc::SYS_setresuid, user, user, user) };
            assert_eq!(changed, 0, "{}", std::io::Error::last_os_error());
        }
        let place = Path::new("/proc").join(victim.to_string());
        let files = [("memory", "mem"), ("environment", "environ"), ("map", "maps")];
        let opened = files.into_iter().filter(|(_, file)| File::open(place.join(file)).is_ok()).map(|(what, _)| what);
        let descriptors = fs::read_dir(place.join("fd")).is_ok().then_some("descriptors");
        // SAFETY: it takes no pointer. The victim isn't stopped, and is let go when this thread ends.
        let traced = unsafe { libc::ptrace(libc::PTRACE_SEIZE, victim, 0, 0) } == 0;
        opened.chain(descriptors).chain(traced.then_some("trace")).collect()
    };
    thread::spawn(intrude).join().expect("it only looks")
}

#[test]
fn no_process_of_the_daemons_user_gets_at_the_memory_of_the_daemon_or_its_devices() {
    let cofferdam = Cofferdam::unprivileged();
    let user = fs::metadata(cofferdam.files()).unwrap().uid();
    let mut open = Command::new("/bin/sleep");
    open.arg("1000").uid(user);
    let mut open = open.spawn().unwrap();
    let all = ["memory", "environment", "map", "descriptors", "trace"];
    assert_eq!(intrusions(user, open.id().cast_signed()), all, "this test tests nothing");
    open.kill().unwrap();
    open.wait().unwrap();

    let daemon = Daemon::start(&cofferdam, "");
    let build = cofferdam.build().on(&daemon).start_shell("echo begun; sleep 1000");
    build.wait_for("begun");
    let own: Vec<_> = cofferdam.processes().into_iter().filter(|process| process.name == "cofferdam").collect();
    for kind in [" daemon ", " device ", " run "] {
        assert!(own.iter().any(|process| process.command_line.contains(kind)), "no{kind}among {own:#?}");
    }
    for process in own {
        // A user owns the namespaces that it makes, and with them the right to trace what is in them, unless yama forbids that.
        let owned = if process.is_walled { &["map", "trace"][..] } else { &[] };
        let succeeded = intrusions(user, process.pid).into_iter().filter(|intrusion| !owned.contains(intrusion));
        assert_eq!(succeeded.collect::<Vec<_>>(), [""; 0], "{process:?}");
        let limits = fs::read_to_string(format!("/proc/{}/limits", process.pid)).unwrap();
        let core = limits.lines().find_map(|line| line.strip_prefix("Max core file size")).unwrap();
        assert!(core.split_whitespace().eq(["0", "0", "bytes"]), "{limits}");
    }
    build.signal(Signal::SIGINT);
    build.end().executor_fails("interrupted");
    daemon.end().succeeds();
}
