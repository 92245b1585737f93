//! The command's processes: an init inside of new namespaces, and under it the command, confined.
//!
//! ```text
//!   guest-init                     init of the build                 the command
//!     │ unshare(pid), fork ───────▶ │ mount, net, ipc, uts
//!     │                             │ pivot_root, /proc, lo, host name
//!     │                             │ fork ─────────────────────────▶ │ cgroup, user, capabilities, filter, chdir
//!     │ ◀────────────────── Word ───┼─────────────────────────────────│ (only if that or execve fails)
//!     │                             │ reaps everything                │ execve
//!     │ ◀────────────────── Word ───│ ◀────────────────────── status ─┘
//!     │                             └ exits, and the kernel kills all that is left in the namespace
//! ```
//!
//! The first [`Word`] on the pipe is how the build ended.

use std::{
    convert::Infallible,
    ffi::{CStr, CString},
    fs::File,
    io::{self, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::process::ExitStatusExt as _,
    },
    path::Path,
    process::{ExitStatus, exit},
    time::Instant,
};

use cofferdam_protocol::{End, Specification, Step, frame::FrameWriter};
use nix::{
    errno::Errno,
    fcntl::OFlag,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::{
        prctl,
        resource::{RLIM_INFINITY, Resource, setrlimit},
        stat::{Mode, umask},
    },
    unistd::{
        ForkResult, Gid, Pid, Uid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, execve, fchown, fexecve, pipe2,
        pivot_root, setgroups, sethostname, setresgid, setresuid, setsid,
    },
};
use serde::{Deserialize, Serialize};

use crate::{
    BUILD_GID, BUILD_UID, ROOT, SHELL,
    cgroup::Cgroup,
    confine,
    error::{Context as _, SetupError},
    sys,
};

/// Largest message on the pipe between the build's init and guest-init; the kernel never tears one of this size.
pub(crate) const MAX_WORD_BYTES: usize = libc::PIPE_BUF;

/// Open files of one process: what programs expect by default, and what they may raise it to.
const OPEN_FILES: (u64, u64) = (1024, 524_288);

/// Where a program is looked for when the request sets no `PATH`.
const DEFAULT_PATH: &[u8] = b"/bin:/usr/bin";

/// How the build ended.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Word {
    /// The command could not be started for a reason that is not the request's.
    Failed { action: String, errno: i32 },
    /// The command ended.
    Ended(End),
}

/// What [`start`] starts.
#[derive(Debug)]
pub(crate) struct Command {
    arguments: Vec<CString>,
    environment: Vec<CString>,
    /// Where the program is looked for.
    path: Vec<u8>,
    working_dir: CString,
    /// Where `/proc` is, as the build sees it.
    processes: CString,
    /// For somebody who looks around in a failed build: the shell that is executed where the build has none.
    shell: Option<File>,
}

/// A build on its way.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) init: Pid,
    pub(crate) stdout: File,
    pub(crate) stderr: File,
    pub(crate) words: File,
    pub(crate) started: Instant,
}

/// What the build's init holds of guest-init.
struct Doors {
    stdin: File,
    /// It is a terminal, and the command's own.
    is_terminal: bool,
    stdout: OwnedFd,
    stderr: OwnedFd,
    cgroup: File,
    words: File,
}

impl Command {
    /// Takes the command out of the specification; `processes` is where `/proc` is, relative to the build's root.
    pub(crate) fn new(specification: &Specification, processes: &Path) -> Result<Self, SetupError> {
        let string = |bytes: &[u8]| CString::new(bytes).context(Step::Start, || "pass on a string that holds a NUL");
        let mut path = DEFAULT_PATH.to_vec();
        let mut environment = Vec::new();
        for (key, value) in &specification.environment {
            if key == "PATH" {
                path = value.to_vec();
            }
            environment.push(string(&[key.as_bytes(), b"=", value].concat())?);
        }
        Ok(Self {
            arguments: specification
                .command_args
                .iter()
                .map(|argument| string(argument.as_bytes()))
                .collect::<Result<_, _>>()?,
            environment,
            path,
            working_dir: string(format!("/{}", specification.working_dir).as_bytes())?,
            processes: string(Path::new("/").join(processes).as_os_str().as_encoded_bytes())?,
            shell: None,
        })
    }

    /// An interactive shell in the place of the command.
    pub(crate) fn shell(specification: &Specification, processes: &Path, term: &str) -> Result<Self, SetupError> {
        let mut command = Self::new(specification, processes)?;
        command.arguments = vec![c"/bin/sh".to_owned()];
        if !term.is_empty() && !specification.environment.iter().any(|(key, _)| key == "TERM") {
            let term = CString::new(format!("TERM={term}")).context(Step::Start, || "set TERM")?;
            command.environment.push(term);
        }
        command.shell = Some(File::open(SHELL).context(Step::Start, || format!("open {SHELL}"))?);
        Ok(command)
    }
}

/// Starts the build's init, which starts the command.
pub(crate) fn start(command: &Command, cgroup: &Cgroup) -> Result<Running, SetupError> {
    let log_pipe = || {
        let (read, write) = pipe()?;
        // Else the build could not open its own /dev/stdout.
        fchown(&write, Some(Uid::from_raw(BUILD_UID)), Some(Gid::from_raw(BUILD_GID)))?;
        Ok::<_, Errno>((read, write))
    };
    let (stdout, stdout_door) = log_pipe().context(Step::Start, || "make a pipe for stdout")?;
    let (stderr, stderr_door) = log_pipe().context(Step::Start, || "make a pipe for stderr")?;
    let stdin = File::open("/dev/null").context(Step::Start, || "open /dev/null")?;
    let (words, words_door) = pipe().context(Step::Start, || "make a pipe")?;
    let doors = Doors {
        stdin,
        is_terminal: false,
        stdout: stdout_door,
        stderr: stderr_door,
        cgroup: cgroup.door()?,
        words: words_door.into(),
    };
    let started = Instant::now();
    Ok(Running { init: start_init(command, doors)?, stdout, stderr, words, started })
}

/// Starts the build's init, which starts the command on a terminal. Gives the init, and the pipe for its word.
pub(crate) fn start_on(terminal: File, command: &Command, cgroup: &Cgroup) -> Result<(Pid, File), SetupError> {
    let copy = || terminal.try_clone().context(Step::Start, || "copy a descriptor");
    let (words, words_door) = pipe().context(Step::Start, || "make a pipe")?;
    let doors = Doors {
        stdout: copy()?.into(),
        stderr: copy()?.into(),
        stdin: terminal,
        is_terminal: true,
        cgroup: cgroup.door()?,
        words: words_door.into(),
    };
    Ok((start_init(command, doors)?, words))
}

fn pipe() -> nix::Result<(File, OwnedFd)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    Ok((read.into(), write))
}

/// The init has guest-init's ends of the pipes, too; it ends before guest-init does.
fn start_init(command: &Command, doors: Doors) -> Result<Pid, SetupError> {
    // From the namespace of an init before this one, which is dead, no other can be made.
    let own = File::open("/proc/self/ns/pid").context(Step::Start, || "open /proc/self/ns/pid")?;
    setns(own, CloneFlags::CLONE_NEWPID).context(Step::Start, || "return to the PID namespace")?;
    unshare(CloneFlags::CLONE_NEWPID).context(Step::Start, || "make a PID namespace")?;
    match sys::fork().context(Step::Start, || "fork")? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => init(command, doors),
    }
}

/// The build's init: process 1 of its PID namespace.
fn init(command: &Command, doors: Doors) -> ! {
    // guest-init's own hook speaks to the host and powers off.
    std::panic::set_hook(Box::new(|_| exit(127)));
    let mut words = match doors.words.try_clone() {
        Ok(words) => FrameWriter::new(words, MAX_WORD_BYTES),
        Err(_) => exit(127),
    };
    let word = match isolate(&command.processes).and_then(|()| sys::fork().map_err(tried("fork"))) {
        Err(word) => word,
        Ok(ForkResult::Parent { child }) => {
            drop(doors);
            reap_until(child)
        }
        Ok(ForkResult::Child) => {
            let Err(word) = become_command(command, doors);
            word
        }
    };
    // If guest-init can't be told, it finds the pipe's end, which says as much.
    let _ = words.write(&word);
    exit(127)
}

/// Reaps whatever ends until the command does.
fn reap_until(command: Pid) -> Word {
    loop {
        match sys::wait(None) {
            Ok((pid, status)) if pid == command => return Word::Ended(end(status)),
            Ok(_) => {}
            Err(error) => return tried("wait for the command")(error),
        }
    }
}

fn end(status: ExitStatus) -> End {
    // Statuses and signals are numbers below 256.
    match (status.code(), status.signal()) {
        (Some(code), _) => End::Exited(code as u8),
        (None, signal) => End::Signaled(signal.unwrap_or_default() as u8),
    }
}

/// Leaves the machine's namespaces for new ones in which only the build's root exists.
fn isolate(processes: &CStr) -> Result<(), Word> {
    let new = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWNET;
    unshare(new).map_err(tried("make namespaces"))?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).map_err(tried("make the mounts private"))?;
    chdir(ROOT).map_err(tried("enter the build's root"))?;
    pivot_root(".", ".").map_err(tried("change to the build's root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(tried("leave the machine's root"))?;
    chdir("/").map_err(tried("enter the new root"))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), processes, Some("proc"), flags, None::<&str>).map_err(tried("mount /proc"))?;
    sethostname("localhost").map_err(tried("set the host name"))?;
    sys::raise_loopback().map_err(tried("bring up the loopback interface"))
}

/// Gives up everything that the command must not have, and executes it.
fn become_command(command: &Command, mut doors: Doors) -> Result<Infallible, Word> {
    doors.cgroup.write_all(b"0").map_err(tried("enter the build's cgroup"))?;
    unshare(CloneFlags::CLONE_NEWCGROUP).map_err(tried("make a cgroup namespace"))?;
    expose_to_oom_killer(&command.processes).map_err(tried("expose the command to the OOM killer"))?;
    setsid().map_err(tried("make a session"))?;
    if doors.is_terminal {
        sys::be_controlled_by(&doors.stdin).map_err(tried("take the terminal"))?;
    }
    dup2_stdin(doors.stdin.as_fd()).map_err(tried("set stdin"))?;
    dup2_stdout(doors.stdout.as_fd()).map_err(tried("set stdout"))?;
    dup2_stderr(doors.stderr.as_fd()).map_err(tried("set stderr"))?;
    sys::close_on_exec_from(3).map_err(tried("close what the command must not have"))?;
    sys::reset_signals().map_err(tried("reset the signals"))?;
    umask(Mode::from_bits_truncate(0o022));
    limit_resources().map_err(tried("set resource limits"))?;
    change_user().map_err(tried("become the build's user"))?;
    prctl::set_no_new_privs().map_err(tried("set no_new_privs"))?;
    sys::install_filter(&confine::filter()).map_err(tried("install the seccomp filter"))?;
    match chdir(command.working_dir.as_c_str()) {
        // Whoever looks around stays in the root.
        Err(_) if command.shell.is_some() => {}
        entered => entered.map_err(|errno| Word::Ended(End::NoWorkingDir(errno as i32)))?,
    }
    Err(Word::Ended(End::NotExecuted(execute(command) as i32)))
}

fn expose_to_oom_killer(processes: &CStr) -> io::Result<()> {
    let path = Path::new(std::ffi::OsStr::new(processes.to_str().unwrap_or("/proc"))).join("self/oom_score_adj");
    std::fs::write(path, "0")
}

fn limit_resources() -> Result<(), Errno> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES.0, OPEN_FILES.1)?;
    // The cgroup bounds the number of processes.
    setrlimit(Resource::RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY)
}

fn change_user() -> io::Result<()> {
    let (user, group) = (Uid::from_raw(BUILD_UID), Gid::from_raw(BUILD_GID));
    sys::drop_bounding_set()?;
    setgroups(&[])?;
    setresgid(group, group, group)?;
    setresuid(user, user, user)?;
    sys::drop_capabilities()
}

/// Tries each program as `execvp` does; returns why none was executed.
fn execute(command: &Command) -> Errno {
    let mut denied = None;
    let Some(program) = command.arguments.first() else { return Errno::ENOENT };
    for program in programs(program.as_bytes(), &command.path) {
        let Ok(program) = CString::new(program) else { continue };
        let Err(error) = execve(&program, &command.arguments, &command.environment);
        match error {
            Errno::EACCES => denied = Some(Errno::EACCES),
            Errno::ENOENT | Errno::ENOTDIR => {}
            error => return error,
        }
    }
    if let Some(shell) = &command.shell {
        let Err(error) = fexecve(shell, &command.arguments, &command.environment);
        return error;
    }
    denied.unwrap_or(Errno::ENOENT)
}

/// The paths at which a program may be, one at a time: together they can be as long as `program` times `path`.
fn programs(program: &[u8], path: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    let is_searched = !program.contains(&b'/');
    // An empty entry is the working directory.
    let directories = path.split(|byte| *byte == b':').take(if is_searched { usize::MAX } else { 1 });
    let at = move |directory: &[u8]| match directory {
        directory if is_searched && !directory.is_empty() => [directory, b"/", program].concat(),
        _ => program.to_vec(),
    };
    directories.take_while(|_| !program.is_empty()).map(at)
}

fn tried<E: Into<io::Error>>(action: &'static str) -> impl Fn(E) -> Word {
    move |error| {
        let error = error.into();
        Word::Failed { action: action.to_owned(), errno: error.raw_os_error().unwrap_or(libc::EIO) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(program: &str, path: &str) -> Vec<String> {
        let bytes = programs(program.as_bytes(), path.as_bytes());
        bytes.map(|path| String::from_utf8(path).unwrap()).collect()
    }

    #[test]
    fn a_program_with_a_slash_is_not_searched() {
        assert_eq!(paths("./configure", "/bin"), ["./configure"]);
        assert_eq!(paths("/bin/sh", "/usr/bin"), ["/bin/sh"]);
    }

    #[test]
    fn a_program_without_a_slash_is_searched_in_the_requests_path() {
        assert_eq!(paths("cc", "/a:/b/c"), ["/a/cc", "/b/c/cc"]);
        assert_eq!(paths("cc", "/a::b"), ["/a/cc", "cc", "b/cc"]);
        assert_eq!(paths("cc", ""), ["cc"]);
    }

    #[test]
    fn a_long_search_is_never_whole_in_memory() {
        let (program, path) = ("p".repeat(128 << 10), ":".repeat(128 << 10));
        assert_eq!(programs(program.as_bytes(), path.as_bytes()).count(), (128 << 10) + 1);
    }

    #[test]
    fn no_program_is_nowhere() {
        assert!(paths("", "/bin").is_empty());
    }

    #[test]
    fn statuses_and_signals_are_told_apart() {
        assert_eq!(end(ExitStatus::from_raw(3 << 8)), End::Exited(3));
        assert_eq!(end(ExitStatus::from_raw(9)), End::Signaled(9));
        assert_eq!(end(ExitStatus::from_raw(libc::SIGRTMIN() | 0x80)), End::Signaled(34));
    }
}
