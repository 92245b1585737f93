//! A guest and a VMM that lie to the device that serves inputs, which runs as the daemon starts it.
//!
//! A hostile guest holds its memory, so that its queues and requests can be anything. A hostile VMM, which a guest has taken over,
//! can also send any message. Each case ends as it says: the device ends by itself with an error, or goes on and answers an
//! honest request. It never panics, hangs, spins or grows.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    panic::AssertUnwindSafe,
    process::ExitStatus,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use cofferdam::{
    devices::inputs::{Server, resolve},
    machine::jail::{Program, Rules, Spawner, View, Walls},
};
use cofferdam_castore::{Directory, Node, PathComponent, Store, directoryservice::DirectoryMemory};
use cofferdam_tests::{
    Cofferdam, Daemon,
    front_end::FrontEnd,
    processes::{Process, peak_resident_bytes},
    program, stretched, vmm,
};
use futures::FutureExt as _;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use tokio::{io::AsyncWriteExt as _, runtime::Handle};

mod messages;
mod queues;
mod requests;

/// How a case ends.
#[derive(Debug, Clone, Copy)]
enum End {
    /// The device ends, and its last words contain these.
    Ends(&'static str),
    /// The device ends without an error, as when a VMM has gone.
    Goes,
    /// The device is killed by this signal.
    Dies(i32),
    /// The device goes on.
    Lives,
}

/// A case: its name, what the front end does, and how it ends.
type Case = (&'static str, fn(&mut FrontEnd), End);

const PATIENCE: Duration = Duration::from_secs(30);

/// Memory of the machine, for the limits of its helpers.
const MACHINE_BYTES: u64 = 256 << 20;

/// Most memory of a device, the guest's included.
const DEVICE_BYTES: u64 = 64 << 20;

/// The contents of the input `file`.
const CONTENTS: &[u8] = b"contents of a file";

/// How much processor time a process has had, in ticks.
fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let fields: Vec<_> = stat.rsplit_once(") ").expect("it is a stat line").1.split(' ').collect();
    [11, 12].iter().map(|at| fields[*at].parse::<u64>().expect("it is a number")).sum()
}

/// The inputs: `directory` with `file`, and `file`.
async fn inputs(store: &Store) -> BTreeMap<PathComponent, Node> {
    let mut blob = store.blobs.open_write().await;
    blob.write_all(CONTENTS).await.expect("memory has room");
    let digest = blob.close().await.expect("memory has room");
    let name = |name| PathComponent::try_from(name).expect("it is a name");
    let file = Node::File { digest, size: CONTENTS.len() as u64, executable: false };
    let directory = Directory::try_from_iter([(name("file"), file.clone())]).expect("it has one name");
    let node = directory.to_node();
    store.directories.put(directory).await.expect("memory has room");
    BTreeMap::from([(name("directory"), node), (name("file"), file)])
}

/// Runs a case on a device of its own, and checks how it ends.
async fn check(spawner: &Spawner, connections: usize, (name, attack, end): &Case) {
    let run_dir = tempfile::tempdir().expect("a temporary directory can be made");
    let socket = run_dir.path().join("fs.sock");
    let store = Store::memory();
    let tree = resolve(&store, &inputs(&store).await, DirectoryMemory::unlimited()).await;
    let tree = Arc::new(tree.expect("everything is in the store"));
    let pair = || socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
    let (ours, theirs): (Vec<OwnedFd>, Vec<_>) = (0..connections).map(|_| pair().expect("sockets can be made")).unzip();
    let (_server, unbound) = Server::start(ours, &store, &Handle::current()).expect("threads can be started");
    unbound.bind(tree);
    // As the daemon does, whose own file the program is.
    let listener = UnixListener::bind(&socket).expect("the directory is new");
    let device = Program::new("inputs' device", program(), run_dir.path()).args(["device", "inputs"]);
    let device = theirs.into_iter().fold(device.walled(View::nothing()).descriptor(listener), Program::descriptor);
    let mut device = spawner.spawn(device).await.expect("it can be started");
    let pid = device.pid();

    let lives = tokio::task::spawn_blocking({
        let (name, attack) = (*name, *attack);
        move || {
            println!("{name}");
            let mut front = FrontEnd::connect(&socket);
            attack(&mut front);
            requests::honest(&mut front).then(|| check_that_it_is_idle(name, pid, front))
        }
    });
    match lives.await.unwrap_or_else(|panic| panic!("{name}: {panic}")) {
        Some(_front) => {
            assert!(matches!(end, End::Lives), "{name}: it goes on, although it {end:?}");
            let peak = peak_resident_bytes(pid).expect("it runs");
            assert!(peak < DEVICE_BYTES, "{name}: it had {peak} bytes");
            device.kill().await;
        }
        None => {
            let ended = tokio::time::timeout(stretched(PATIENCE), device.wait()).await;
            let status = ended.unwrap_or_else(|_| panic!("{name}: it hung up and stays"));
            check_status(name, *end, status, &device.said());
        }
    }
}

fn check_status(name: &str, end: End, status: ExitStatus, said: &str) {
    use std::os::unix::process::ExitStatusExt as _;
    let is_expected = match end {
        // A panic's code is another.
        End::Ends(words) => matches!(status.code(), Some(1 | 3)) && said.contains(words),
        End::Goes => status.success(),
        End::Dies(signal) => status.signal() == Some(signal),
        End::Lives => false,
    };
    assert!(is_expected, "{name}: {end:?}, but it ended with {status}: {said}");
}

/// A device without requests takes no processor time.
fn check_that_it_is_idle(name: &str, pid: u32, front: FrontEnd) -> FrontEnd {
    let deadline = Instant::now() + stretched(PATIENCE);
    loop {
        let before = ticks(pid);
        thread::sleep(Duration::from_millis(50));
        if ticks(pid) == before {
            return front;
        }
        assert!(Instant::now() < deadline, "{name}: it spins");
    }
}

/// Runs all cases, also after one that fails.
fn check_all(connections: usize, cases: &[Case]) {
    let runtime = tokio::runtime::Runtime::new().expect("there are resources for a runtime");
    let failed: Vec<_> = runtime.block_on(async {
        let rules = Rules { walls: Walls::None, ..Rules::default() };
        let spawner = Spawner::new(Handle::current(), rules).expect("threads can be started");
        let mut failed = Vec::new();
        for case in cases {
            let spawner = spawner.for_machine(MACHINE_BYTES, 1).expect("user ids are left");
            if AssertUnwindSafe(check(&spawner, connections, case)).catch_unwind().await.is_err() {
                failed.push(case.0);
            }
        }
        failed
    });
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn lying_messages_end_the_device_or_change_nothing() {
    check_all(1, messages::CASES);
}

#[test]
fn queues_that_make_no_sense_end_the_device_or_change_nothing() {
    check_all(1, queues::CASES);
}

/// With several connections, other threads answer requests than take them off the queue.
#[test]
fn queues_that_make_no_sense_end_a_device_with_threads_too() {
    check_all(4, queues::CASES);
}

#[test]
fn lying_requests_are_refused_or_end_the_device() {
    check_all(1, requests::CASES);
}

/// A system call that gives a descriptor.
fn descriptor(call: libc::c_long, arguments: [libc::c_long; 3]) -> io::Result<OwnedFd> {
    let [a, b, c] = arguments;
    // SAFETY: pidfd_open and pidfd_getfd take numbers only.
    let number = unsafe { libc::syscall(call, a, b, c) };
    let number = i32::try_from(number).expect("it is a descriptor or an error");
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// The connection of a VMM to the device that serves inputs, as a guest has it that took the VMM over.
fn connection_of(vmm: &Process) -> UnixStream {
    let process = descriptor(libc::SYS_pidfd_open, [vmm.pid.into(), 0, 0]).expect("it runs");
    let numbers = fs::read_dir(format!("/proc/{}/fd", vmm.pid)).expect("this needs root").flatten();
    let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let sockets = numbers.map(|number: i32| {
        let of_process = [process.as_raw_fd().into(), number.into(), 0];
        UnixStream::from(descriptor(libc::SYS_pidfd_getfd, of_process).expect("this needs root"))
    });
    let to_inputs = |socket: &UnixStream| {
        socket.peer_addr().is_ok_and(|peer| peer.as_pathname().is_some_and(|path| path.ends_with("fs.sock")))
    };
    sockets.into_iter().find(to_inputs).expect("it is connected to the device")
}

#[test]
fn an_attack_on_a_device_fails_its_own_build_and_no_other() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "[budget]\nbuilds = 2\ncpus = 2\n[build]\ncpus = 1\n");
    let attacked = cofferdam.build().on(&daemon).start_shell("echo it runs; sleep 1000");
    attacked.wait_for("it runs");
    // The other machine isn't there yet.
    let connection = connection_of(&cofferdam.helper(&vmm::processes()[0].0, daemon.running()));
    let input = cofferdam.file("input", "contents\n");
    let beside = cofferdam.build().on(&daemon).input("input", &input).output("build/out").exported();
    let beside = beside.start_shell("echo it runs; sleep 5; cat /inputs/input > out");
    beside.wait_for("it runs");
    (&connection).write_all(&[0xff; 64]).expect("the device reads");
    attacked.end().executor_fails("process_died").says("inputs' device died");
    assert_eq!(beside.end().succeeds().read("build/out"), "contents\n");
    daemon.end().succeeds();
}
