//! A helper process that has been taken over: it tries what its walls must refuse, and says how each attempt went.
//!
//! Arguments are attempts, `NAME` or `NAME=TARGET`. For each it prints `NAME=TARGET done` or `NAME=TARGET refused: REASON`.
//!
//! With a helper's own arguments it is in the place of that helper. The file beside its own, of the same name and `.real`, names
//! the helper that answers for its version. Behind the walls, where that file isn't, it waits for the file `attempts` in the run
//! directory, with an attempt a line, and appends the answers and `end`.

use std::{
    env,
    ffi::{CString, c_long},
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    net::TcpStream,
    os::{
        fd::AsRawFd,
        linux::net::SocketAddrExt,
        unix::{
            fs::{PermissionsExt, symlink},
            net::{SocketAddr, UnixDatagram, UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    process::Command,
    ptr,
    thread::sleep,
    time::{Duration, Instant},
};

/// What an attempt needs to have done for success.
type Attempt = fn(&str) -> io::Result<()>;

const ATTEMPTS: &[(&str, Attempt)] = &[
    // Others' sockets, files and processes; the target is a path, an address or a process.
    ("connect", |path| UnixStream::connect(path).map(drop)),
    ("connect-abstract", |name| {
        let address = SocketAddr::from_abstract_name(name)?;
        UnixDatagram::unbound()?.connect_addr(&address)
    }),
    ("connect-tcp", |address| TcpStream::connect(address).map(drop)),
    ("read", |path| File::open(path)?.read(&mut [0; 1]).map(drop)),
    ("write", |path| OpenOptions::new().write(true).open(path).map(drop)),
    ("list", |path| match fs::read_dir(path)?.next() {
        Some(entry) => entry.map(drop),
        None => Err(io::ErrorKind::NotFound.into()),
    }),
    ("memory", |pid| OpenOptions::new().write(true).open(format!("/proc/{pid}/mem")).map(drop)),
    ("descriptors", |pid| fs::read_dir(format!("/proc/{pid}/fd")).map(drop)),
    ("root-of", |pid| fs::read_dir(format!("/proc/{pid}/root")).map(drop)),
    ("signal", |pid| call(libc::SYS_kill, [number(pid)?, 0, 0, 0, 0])),
    ("signal-thread", |pid| call(libc::SYS_tgkill, [number(pid)?, number(pid)?, 0, 0, 0])),
    ("queue-signal", |pid| {
        // SAFETY: all zeros are a valid structure of integers.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        info.si_code = libc::SI_QUEUE;
        call(libc::SYS_rt_sigqueueinfo, [number(pid)?, 0, (&raw const info) as c_long, 0, 0])
    }),
    ("own-signals", |pid| {
        let (a, _b) = UnixStream::pair()?;
        call(libc::SYS_fcntl, [a.as_raw_fd().into(), libc::F_SETOWN.into(), number(pid)?, 0, 0])
    }),
    ("own-signals-ex", |pid| {
        let (a, _b) = UnixStream::pair()?;
        let owner = [1_i32, i32::try_from(number(pid)?).map_err(io::Error::other)?];
        call(libc::SYS_fcntl, [a.as_raw_fd().into(), 15, owner.as_ptr() as c_long, 0, 0])
    }),
    ("own-signals-ioctl", |pid| {
        let (a, _b) = UnixStream::pair()?;
        let pid = i32::try_from(number(pid)?).map_err(io::Error::other)?;
        call(libc::SYS_ioctl, [a.as_raw_fd().into(), 0x8901, (&raw const pid) as c_long, 0, 0])
    }),
    ("choose-signal", |_| {
        let (a, _b) = UnixStream::pair()?;
        call(libc::SYS_fcntl, [a.as_raw_fd().into(), 10, libc::SIGKILL.into(), 0, 0])
    }),
    ("trace", |pid| call(libc::SYS_ptrace, [libc::PTRACE_SEIZE.into(), number(pid)?, 0, 0, 0])),
    ("write-memory", |pid| write_memory(number(pid)?)),
    ("compare", |pid| call(libc::SYS_kcmp, [number(pid)?, number(pid)?, 0, 0, 1])),
    ("open-process", |pid| call(libc::SYS_pidfd_open, [number(pid)?, 0, 0, 0, 0])),
    ("limit-process", |pid| {
        let mut limits = [0_u64; 2];
        call(libc::SYS_prlimit64, [number(pid)?, 7, 0, limits.as_mut_ptr() as c_long, 0])
    }),
    ("schedule-process", |pid| {
        let mut processors = [0_u64; 128];
        call(libc::SYS_sched_getaffinity, [number(pid)?, 1024, processors.as_mut_ptr() as c_long, 0, 0])
    }),
    ("enter-network", |pid| enter(pid, "net")),
    ("enter-files", |pid| enter(pid, "mnt")),
    // More rights.
    ("become-root", |_| call(libc::SYS_setresuid, [0, 0, 0, 0, 0])),
    ("become-another", |_| call(libc::SYS_setresuid, [12_345, 12_345, 12_345, 0, 0])),
    ("change-group", |_| call(libc::SYS_setresgid, [12_345, 12_345, 12_345, 0, 0])),
    ("change-groups", |_| call(libc::SYS_setgroups, [0, 0, 0, 0, 0])),
    ("raise-capability", |_| {
        let header = [0x2008_0522_u32, 0];
        let sets = [1_u32, 1, 0, 0, 0, 0];
        call(libc::SYS_capset, [header.as_ptr() as c_long, sets.as_ptr() as c_long, 0, 0, 0])
    }),
    ("new-user-namespace", |_| call(libc::SYS_unshare, [libc::CLONE_NEWUSER.into(), 0, 0, 0, 0])),
    ("new-network", |_| call(libc::SYS_unshare, [libc::CLONE_NEWNET.into(), 0, 0, 0, 0])),
    ("new-mounts", |_| call(libc::SYS_unshare, [libc::CLONE_NEWNS.into(), 0, 0, 0, 0])),
    ("mount", |_| mount()),
    ("mount-new", |_| call(libc::SYS_fsopen, [c"tmpfs".as_ptr() as c_long, 0, 0, 0, 0])),
    ("clone-mount", |_| call(libc::SYS_open_tree, [libc::AT_FDCWD.into(), c"/".as_ptr() as c_long, 1, 0, 0])),
    ("change-root", |_| call(libc::SYS_chroot, [c"/".as_ptr() as c_long, 0, 0, 0, 0])),
    ("outlive-daemon", |_| call(libc::SYS_prctl, [libc::PR_SET_PDEATHSIG.into(), 0, 0, 0, 0])),
    ("raise-limit", |_| {
        let most = [u64::MAX, u64::MAX];
        call(libc::SYS_prlimit64, [0, 4 /* RLIMIT_CORE */, most.as_ptr() as c_long, 0, 0])
    }),
    ("raise-priority", |_| call(libc::SYS_setpriority, [0, 0, -20, 0, 0])),
    ("lock-memory", |_| {
        let memory = vec![1_u8; 64 << 20];
        call(libc::SYS_mlock, [memory.as_ptr() as c_long, 64 << 20, 0, 0, 0])
    }),
    // The kernel.
    ("packet-socket", |_| call(libc::SYS_socket, [libc::AF_PACKET.into(), libc::SOCK_RAW.into(), 0, 0, 0])),
    ("internet-socket", |_| call(libc::SYS_socket, [libc::AF_INET.into(), libc::SOCK_STREAM.into(), 0, 0, 0])),
    ("internet6-socket", |_| call(libc::SYS_socket, [libc::AF_INET6.into(), libc::SOCK_DGRAM.into(), 0, 0, 0])),
    ("list-sockets", |_| call(libc::SYS_socket, [libc::AF_NETLINK.into(), libc::SOCK_RAW.into(), 4, 0, 0])),
    ("crypto-socket", |_| call(libc::SYS_socket, [libc::AF_ALG.into(), libc::SOCK_SEQPACKET.into(), 0, 0, 0])),
    ("guest-socket", |_| call(libc::SYS_socket, [libc::AF_VSOCK.into(), libc::SOCK_STREAM.into(), 0, 0, 0])),
    ("bpf", |_| {
        let map = [2_u32, 4, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0];
        call(libc::SYS_bpf, [0, map.as_ptr() as c_long, 48, 0, 0])
    }),
    ("performance-counters", |_| {
        let attributes =
            [1_u32, 128, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        call(libc::SYS_perf_event_open, [attributes.as_ptr() as c_long, 0, -1, -1, 0])
    }),
    ("page-faults", |_| call(libc::SYS_userfaultfd, [0, 0, 0, 0, 0])),
    ("keyring", |_| call(libc::SYS_keyctl, [0, -3, 1, 0, 0])),
    ("key", |_| {
        let (kind, name) = (c"user", c"attacker");
        call(libc::SYS_add_key, [kind.as_ptr() as c_long, name.as_ptr() as c_long, name.as_ptr() as c_long, 1, -2])
    }),
    ("io-uring", |_| {
        let mut parameters = [0_u32; 30];
        call(libc::SYS_io_uring_setup, [4, parameters.as_mut_ptr() as c_long, 0, 0, 0])
    }),
    ("shared-memory", |_| call(libc::SYS_shmget, [0, 4096, 0o1600, 0, 0])),
    ("message-queue", |_| call(libc::SYS_msgget, [0, 0o1600, 0, 0, 0])),
    ("personality", |_| call(libc::SYS_personality, [libc::ADDR_NO_RANDOMIZE.into(), 0, 0, 0, 0])),
    ("kernel-log", |_| call(libc::SYS_syslog, [10, 0, 0, 0, 0])),
    ("host-name", |_| {
        let mut name = [0_u8; 65];
        // SAFETY: the kernel writes at most so many bytes.
        let got = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len()) };
        if got == -1 {
            return Err(io::Error::last_os_error());
        }
        let length = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
        call(
            libc::SYS_sethostname,
            [name.as_ptr() as c_long, c_long::try_from(length).map_err(io::Error::other)?, 0, 0, 0],
        )
    }),
    // Processes and files of its own.
    ("fork", |_| call_and_end(libc::SYS_fork, [0; 5])),
    ("fork-as-clone", |_| call_and_end(libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0, 0, 0])),
    ("run", |program| Command::new(program).status().map(drop)),
    ("threads", |count| {
        let count = if count.is_empty() { 3000 } else { number(count)? };
        let spawn = || std::thread::Builder::new().stack_size(16 << 10).spawn(std::thread::park);
        (0..count).map(|_| spawn()).collect::<io::Result<Vec<_>>>().map(drop)
    }),
    ("fill-memory", |bytes| {
        let fill = |bytes| {
            // SAFETY: the name is terminated.
            let memory = unsafe { libc::memfd_create(c"memory".as_ptr(), libc::MFD_CLOEXEC) };
            call(libc::SYS_fallocate, [memory.into(), 0, 0, bytes, 0]).map(|()| memory)
        };
        // In parts, since files have a limit of their own.
        (0..number(bytes)? / PART).map(|_| fill(PART)).collect::<io::Result<Vec<_>>>().map(drop)
    }),
    ("spin", |millis| {
        let end = Instant::now() + Duration::from_millis(number(millis)?.cast_unsigned());
        while Instant::now() < end {}
        Ok(())
    }),
    ("sleep", |seconds| {
        sleep(Duration::from_secs(number(seconds)?.cast_unsigned()));
        Ok(())
    }),
    ("make-directory", |path| fs::create_dir(format!("{path}/made-directory"))),
    ("make-file", |path| File::create(format!("{path}/made-file")).map(drop)),
    ("make-socket", |path| UnixListener::bind(format!("{path}/made-socket")).map(drop)),
    ("make-symlink", |path| symlink("/etc/passwd", format!("{path}/made-symlink"))),
    ("make-pipe", |path| {
        let path = CString::new(format!("{path}/made-pipe"))?;
        call(libc::SYS_mknod, [path.as_ptr() as c_long, 0o010_666, 0, 0, 0])
    }),
    ("rename", |path| fs::rename(format!("{path}/disk"), format!("{path}/renamed"))),
    ("link", |path| fs::hard_link(format!("{path}/disk"), format!("{path}/linked"))),
    ("change-mode", |path| fs::set_permissions(path, PermissionsExt::from_mode(0o755))),
    ("grow", |path| {
        let mut file = OpenOptions::new().append(true).open(format!("{path}/disk"))?;
        (0..80).try_for_each(|_| file.write_all(&[1; 1 << 20]))
    }),
    ("reserve-memory", |_| {
        let (rights, kind) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: asks for unused memory, at any address.
        let memory = unsafe { libc::mmap(ptr::null_mut(), 64 << 30, rights, kind, -1, 0) };
        if memory == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }),
    ("grow-memory-file", |_| {
        // SAFETY: the name is terminated.
        let memory = unsafe { libc::memfd_create(c"memory".as_ptr(), libc::MFD_CLOEXEC) };
        call(libc::SYS_ftruncate, [memory.into(), 1 << 30, 0, 0, 0])
    }),
];

/// Length of a file in memory, in bytes.
const PART: c_long = 32 << 20;

/// Where attempts are found by an attacker in a helper's place.
const ATTEMPTS_FILE: &str = "attempts";

fn main() {
    // A limit on the size of files is told by a signal, too.
    // SAFETY: ignoring a signal runs no code of ours.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let (own, arguments) = (env::args().next().unwrap_or_default(), env::args().skip(1).collect::<Vec<_>>());
    if !arguments.first().is_some_and(|first| first.starts_with('-')) {
        arguments.iter().for_each(|argument| println!("{}", answer(argument)));
    } else if let Ok(real) = fs::read_to_string(own + ".real") {
        panic!("{real:?} can't be executed: {}", Command::new(&real).args(arguments).exec());
    } else if let Err(error) = attack_from_its_place() {
        println!("the attacker failed: {error}");
    }
}

fn answer(argument: &str) -> String {
    let (name, target) = argument.split_once('=').unwrap_or((argument, ""));
    match ATTEMPTS.iter().find(|(known, _)| *known == name) {
        None => format!("{argument} unknown"),
        Some((_, attempt)) => match attempt(target) {
            Ok(()) => format!("{argument} done"),
            Err(error) => format!("{argument} refused: {error}"),
        },
    }
}

fn attack_from_its_place() -> io::Result<()> {
    let mut file = loop {
        match OpenOptions::new().read(true).append(true).open(ATTEMPTS_FILE) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => sleep(Duration::from_millis(10)),
            opened => break opened?,
        }
    };
    let mut attempts = String::new();
    file.read_to_string(&mut attempts)?;
    for attempt in attempts.lines() {
        writeln!(file, "{}", answer(attempt))?;
    }
    writeln!(file, "end")?;
    loop {
        sleep(Duration::from_secs(1));
    }
}

fn number(pid: &str) -> io::Result<c_long> {
    pid.parse().map_err(io::Error::other)
}

fn call(call: c_long, arguments: [c_long; 5]) -> io::Result<()> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: every caller passes what this call takes, with pointers to live values of its own.
    match unsafe { libc::syscall(call, a, b, c, d, e) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// For calls that return twice.
fn call_and_end(call: c_long, arguments: [c_long; 5]) -> io::Result<()> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: without shared memory this is a fork, and the child ends at once.
    match unsafe { libc::syscall(call, a, b, c, d, e) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: ends this process and nothing else.
        0 => unsafe { libc::_exit(0) },
        _ => Ok(()),
    }
}

fn enter(pid: &str, kind: &str) -> io::Result<()> {
    let namespace = File::open(format!("/proc/{pid}/ns/{kind}"))?;
    call(libc::SYS_setns, [namespace.as_raw_fd().into(), 0, 0, 0, 0])
}

fn mount() -> io::Result<()> {
    let (kind, place) = (c"tmpfs".as_ptr() as c_long, c"/mnt".as_ptr() as c_long);
    call(libc::SYS_mount, [kind, place, kind, 0, 0])?;
    call(libc::SYS_umount2, [place, 0, 0, 0, 0])
}

/// Writes nothing, to nowhere: only the right to do it is asked for.
fn write_memory(pid: c_long) -> io::Result<()> {
    let nothing = libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 };
    let nothing = (&raw const nothing) as c_long;
    // SAFETY: both lists have one entry, of no bytes.
    match unsafe { libc::syscall(libc::SYS_process_vm_writev, pid, nothing, 1, nothing, 1, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
