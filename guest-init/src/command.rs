//! The command's processes: a small init in namespaces of its own, and the confined command as its child.
//!
//! ```text
//!   guest-init                     init of the build                 the command
//!     │ unshare(pid), fork ───────▶ │ mount, net, ipc, uts
//!     │                             │ pivot_root, /proc, lo, host name
//!     │                             │ fork ─────────────────────────▶ │ cgroup, user, capabilities, filter, chdir
//!     │ ◀─────────────── Outcome ───┼─────────────────────────────────│ (only if that or execve fails)
//!     │                             │ reaps children                  │ execve
//!     │ ◀─────────────── Outcome ───│ ◀────────────────────── status ─┘
//!     │                             └ exits, and the kernel kills every process left in the namespace
//! ```
//!
//! Only the first [`Outcome`] in the pipe counts.

use std::{
    convert::Infallible,
    ffi::{CStr, CString, OsStr, c_int},
    fs::File,
    io::{self, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, process::ExitStatusExt as _},
    },
    path::Path,
    process::{ExitStatus, exit},
    time::Instant,
};

use cofferdam_protocol::{BUILD_GID, BUILD_UID, End, Specification, Step, frame::FrameWriter};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
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
    cgroup::Cgroup,
    confine,
    error::{Context as _, SetupError},
    interpreter::missing_interpreter,
    layout::{ROOT, SHELL},
    network,
    root::Root,
    sys,
    terminal::Terminal,
};

/// Largest [`Outcome`] in bytes, with its frame. Writes of this size to a pipe are atomic.
pub(crate) const MAX_OUTCOME_BYTES: usize = libc::PIPE_BUF;

/// Soft and hard limit on the open files of one process: systemd's default for services, and nix-daemon's.
const OPEN_FILES: (u64, u64) = (1024, 1_048_576);

/// Room for what the command writes while guest-init gathers a frame, in bytes.
const LOG_BYTES: c_int = 1 << 20;

/// `PATH` of a request that sets none.
const DEFAULT_PATH: &[u8] = b"/bin:/usr/bin";

/// A report of the build's processes to guest-init.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Outcome {
    /// A system call failed before the command ran or while waiting for it. `action` follows "can't".
    Failed { action: String, errno: i32 },
    /// The command ended.
    Ended(End),
}

/// A command, ready to be started.
#[derive(Debug)]
pub(crate) struct Command {
    arguments: Vec<CString>,
    environment: Vec<CString>,
    /// The build's `PATH`.
    path: Vec<u8>,
    working_dir: CString,
    /// Mount points of procfs and sysfs, as the build sees them.
    proc: CString,
    sys: CString,
    /// Whether it keeps the machine's own network namespace, which has the network device.
    network: bool,
    /// For an interactive shell: executed if the build has no `/bin/sh`.
    fallback_shell: Option<File>,
}

/// A running build.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) init: Pid,
    pub(crate) screen: Screen,
    /// Receives the [`Outcome`].
    pub(crate) outcome: File,
    pub(crate) started: Instant,
}

/// Receives what the command writes.
#[derive(Debug)]
pub(crate) enum Screen {
    /// stdout and stderr. Two pipes would lose the order between them.
    Log(File),
    /// The terminal of an interactive command.
    Terminal(Terminal),
}

/// The descriptors that the build's init gets.
struct InitFiles {
    stdin: File,
    /// Whether the standard streams are the command's controlling terminal.
    is_terminal: bool,
    stdout: OwnedFd,
    stderr: OwnedFd,
    /// `cgroup.procs` of the build's cgroup.
    cgroup: File,
    outcome: File,
}

impl Command {
    /// The specification's command.
    pub(crate) fn new(specification: &Specification, root: &Root) -> Result<Self, SetupError> {
        let string = |bytes: &[u8]| CString::new(bytes).context(Step::Start, || "use a string with a NUL");
        let absolute = |path: &Path| string(Path::new("/").join(path).as_os_str().as_bytes());
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
            proc: absolute(&root.proc)?,
            sys: absolute(&root.sys)?,
            network: specification.network,
            fallback_shell: None,
        })
    }

    /// An interactive shell instead of the specification's command.
    pub(crate) fn shell(specification: &Specification, root: &Root, term: &str) -> Result<Self, SetupError> {
        let mut command = Self::new(specification, root)?;
        command.arguments = vec![c"/bin/sh".to_owned()];
        command.set_term(specification, term)?;
        command.fallback_shell = Some(File::open(SHELL).context(Step::Start, || format!("open {SHELL}"))?);
        Ok(command)
    }

    /// Sets `TERM`, unless the specification does.
    pub(crate) fn set_term(&mut self, specification: &Specification, term: &str) -> Result<(), SetupError> {
        if !term.is_empty() && !specification.environment.iter().any(|(key, _)| key == "TERM") {
            let term = CString::new(format!("TERM={term}")).context(Step::Start, || "set TERM")?;
            self.environment.push(term);
        }
        Ok(())
    }
}

/// Starts the build's init, which starts the command.
pub(crate) fn start(command: &Command, cgroup: &Cgroup) -> Result<Running, SetupError> {
    let (log, stdout) = pipe().context(Step::Start, || "make a pipe for the log")?;
    fcntl(&log, FcntlArg::F_SETPIPE_SZ(LOG_BYTES)).context(Step::Start, || "make room in the log's pipe")?;
    // Without this, the build could not open its own /dev/stdout.
    fchown(&stdout, Some(Uid::from_raw(BUILD_UID)), Some(Gid::from_raw(BUILD_GID)))
        .context(Step::Start, || "change the owner of the log's pipe")?;
    let stderr = stdout.try_clone().context(Step::Start, || "copy a descriptor")?;
    let stdin = File::open("/dev/null").context(Step::Start, || "open /dev/null")?;
    let (outcome, outcome_writer) = pipe().context(Step::Start, || "make a pipe")?;
    let files = InitFiles {
        stdin,
        is_terminal: false,
        stdout,
        stderr,
        cgroup: cgroup.open_procs()?,
        outcome: outcome_writer.into(),
    };
    let started = Instant::now();
    Ok(Running { init: start_init(command, files)?, screen: Screen::Log(log), outcome, started })
}

/// The same, on a terminal.
pub(crate) fn start_interactive(terminal: Terminal, command: &Command, cgroup: &Cgroup) -> Result<Running, SetupError> {
    let started = Instant::now();
    let (init, outcome) = start_on_terminal(terminal.side()?, command, cgroup)?;
    Ok(Running { init, screen: Screen::Terminal(terminal), outcome, started })
}

/// Starts the build's init, which starts the command on a terminal. Returns the init, and the pipe that receives the
/// [`Outcome`].
pub(crate) fn start_on_terminal(terminal: File, command: &Command, cgroup: &Cgroup) -> Result<(Pid, File), SetupError> {
    let copy = || terminal.try_clone().context(Step::Start, || "copy a descriptor");
    let (outcome, outcome_writer) = pipe().context(Step::Start, || "make a pipe")?;
    let files = InitFiles {
        stdout: copy()?.into(),
        stderr: copy()?.into(),
        stdin: terminal,
        is_terminal: true,
        cgroup: cgroup.open_procs()?,
        outcome: outcome_writer.into(),
    };
    Ok((start_init(command, files)?, outcome))
}

fn pipe() -> nix::Result<(File, OwnedFd)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    Ok((read.into(), write))
}

/// The init inherits guest-init's ends of the pipes, too. This is harmless, since it ends before guest-init does.
fn start_init(command: &Command, files: InitFiles) -> Result<Pid, SetupError> {
    // The namespace of an earlier, dead init doesn't allow making a new one.
    let own = File::open("/proc/self/ns/pid").context(Step::Start, || "open /proc/self/ns/pid")?;
    setns(own, CloneFlags::CLONE_NEWPID).context(Step::Start, || "return to the PID namespace")?;
    unshare(CloneFlags::CLONE_NEWPID).context(Step::Start, || "make a PID namespace")?;
    match sys::fork().context(Step::Start, || "fork")? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => init(command, files),
    }
}

/// The build's init: process 1 of its PID namespace.
fn init(command: &Command, files: InitFiles) -> ! {
    // Replaces guest-init's own hook, which would power off.
    std::panic::set_hook(Box::new(|_| exit(127)));
    let mut writer = match files.outcome.try_clone() {
        Ok(pipe) => FrameWriter::new(pipe, MAX_OUTCOME_BYTES),
        Err(_) => exit(127),
    };
    let outcome = match isolate(command).and_then(|()| sys::fork().map_err(failed("fork"))) {
        Err(outcome) => outcome,
        Ok(ForkResult::Parent { child }) => {
            drop(files);
            reap_until(child)
        }
        Ok(ForkResult::Child) => {
            let Err(outcome) = become_command(command, files);
            outcome
        }
    };
    // If this fails, guest-init finds the pipe closed, and reports that.
    let _ = writer.write(&outcome);
    exit(127)
}

/// Reaps children until the command ends.
fn reap_until(command: Pid) -> Outcome {
    loop {
        match sys::wait(None) {
            Ok((pid, status)) if pid == command => return Outcome::Ended(end(status)),
            Ok(_) => {}
            Err(error) => return failed("wait for the command")(error),
        }
    }
}

fn end(status: ExitStatus) -> End {
    // Statuses and signal numbers are below 256.
    match (status.code(), status.signal()) {
        (Some(code), _) => End::Exited(code as u8),
        (None, signal) => End::Signaled(signal.unwrap_or_default() as u8),
    }
}

/// Moves the calling process to new namespaces whose only file system tree is the build's root.
fn isolate(command: &Command) -> Result<(), Outcome> {
    let new = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    unshare(new).map_err(failed("make namespaces"))?;
    if !command.network {
        unshare(CloneFlags::CLONE_NEWNET).map_err(failed("make a network namespace"))?;
    }
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).map_err(failed("make the mounts private"))?;
    chdir(ROOT).map_err(failed("enter the build's root"))?;
    pivot_root(".", ".").map_err(failed("change to the build's root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(failed("leave guest-init's root"))?;
    chdir("/").map_err(failed("enter the new root"))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), command.proc.as_c_str(), Some("proc"), flags, None::<&str>).map_err(failed("mount /proc"))?;
    let read_only = flags | MsFlags::MS_RDONLY;
    mount(Some("sysfs"), command.sys.as_c_str(), Some("sysfs"), read_only, None::<&str>)
        .map_err(failed("mount /sys"))?;
    sethostname("localhost").map_err(failed("set the host name"))?;
    sys::raise_loopback().map_err(failed("bring up the loopback interface"))?;
    if command.network { network::configure().map_err(failed("configure the network")) } else { Ok(()) }
}

/// Drops every privilege, and executes the command.
fn become_command(command: &Command, mut files: InitFiles) -> Result<Infallible, Outcome> {
    files.cgroup.write_all(b"0").map_err(failed("enter the build's cgroup"))?;
    unshare(CloneFlags::CLONE_NEWCGROUP).map_err(failed("make a cgroup namespace"))?;
    expose_to_oom_killer(&command.proc).map_err(failed("expose the command to the OOM killer"))?;
    setsid().map_err(failed("make a session"))?;
    if files.is_terminal {
        sys::set_controlling_terminal(&files.stdin).map_err(failed("set the controlling terminal"))?;
    }
    dup2_stdin(files.stdin.as_fd()).map_err(failed("set stdin"))?;
    dup2_stdout(files.stdout.as_fd()).map_err(failed("set stdout"))?;
    dup2_stderr(files.stderr.as_fd()).map_err(failed("set stderr"))?;
    sys::close_on_exec_from(3).map_err(failed("set close-on-exec"))?;
    sys::reset_signals().map_err(failed("reset the signals"))?;
    umask(Mode::from_bits_truncate(0o022));
    limit_resources().map_err(failed("set resource limits"))?;
    change_user().map_err(failed("become the build's user"))?;
    prctl::set_no_new_privs().map_err(failed("set no_new_privs"))?;
    sys::install_filter(&confine::filter()).map_err(failed("install the seccomp filter"))?;
    match chdir(command.working_dir.as_c_str()) {
        // An interactive shell starts in the root, then.
        Err(_) if command.fallback_shell.is_some() => {}
        entered => entered.map_err(|errno| Outcome::Ended(End::NoWorkingDir(errno as i32)))?,
    }
    Err(Outcome::Ended(execute(command)))
}

/// guest-init is exempt from the OOM killer, and its children inherit that.
fn expose_to_oom_killer(proc: &CStr) -> io::Result<()> {
    std::fs::write(Path::new(OsStr::from_bytes(proc.to_bytes())).join("self/oom_score_adj"), "0")
}

fn limit_resources() -> Result<(), Errno> {
    // A build that wants core dumps can raise this.
    setrlimit(Resource::RLIMIT_CORE, 0, RLIM_INFINITY)?;
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES.0, OPEN_FILES.1)?;
    // The cgroup limits the number of processes.
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

/// Searches for the program and executes it, as `execvp` does. Returns the reason if that fails.
fn execute(command: &Command) -> End {
    let mut denied = None;
    let mut interpreter = None;
    let not_executed = |errno: Errno| End::NotExecuted(errno as i32);
    let Some(program) = command.arguments.first() else { return not_executed(Errno::ENOENT) };
    for program in candidates(program.as_bytes(), &command.path) {
        let Ok(program) = CString::new(program) else { continue };
        let Err(error) = execve(&program, &command.arguments, &command.environment);
        match error {
            Errno::EACCES => denied = Some(Errno::EACCES),
            Errno::ENOENT | Errno::ENOTDIR => interpreter = interpreter.or_else(|| missing_interpreter(&program)),
            error => return not_executed(error),
        }
    }
    if let Some(shell) = &command.fallback_shell {
        let Err(error) = fexecve(shell, &command.arguments, &command.environment);
        return not_executed(error);
    }
    interpreter.map_or(not_executed(denied.unwrap_or(Errno::ENOENT)), End::NoInterpreter)
}

/// The paths to try for a program, made one at a time: all of them together could be too large for memory.
fn candidates(program: &[u8], path: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    let is_searched = !program.contains(&b'/');
    // An empty entry stands for the working directory.
    let directories = path.split(|byte| *byte == b':').take(if is_searched { usize::MAX } else { 1 });
    let at = move |directory: &[u8]| match directory {
        directory if is_searched && !directory.is_empty() => [directory, b"/", program].concat(),
        _ => program.to_vec(),
    };
    directories.take_while(|_| !program.is_empty()).map(at)
}

fn failed<E: Into<io::Error>>(action: &'static str) -> impl Fn(E) -> Outcome {
    move |error| {
        let error = error.into();
        Outcome::Failed { action: action.to_owned(), errno: error.raw_os_error().unwrap_or(libc::EIO) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(program: &str, path: &str) -> Vec<String> {
        let bytes = candidates(program.as_bytes(), path.as_bytes());
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
    fn a_long_search_needs_little_memory() {
        let (program, path) = ("p".repeat(128 << 10), ":".repeat(128 << 10));
        assert_eq!(candidates(program.as_bytes(), path.as_bytes()).count(), (128 << 10) + 1);
    }

    #[test]
    fn an_empty_program_is_not_searched() {
        assert!(paths("", "/bin").is_empty());
    }

    #[test]
    fn statuses_and_signals_are_distinguished() {
        assert_eq!(end(ExitStatus::from_raw(3 << 8)), End::Exited(3));
        assert_eq!(end(ExitStatus::from_raw(9)), End::Signaled(9));
        assert_eq!(end(ExitStatus::from_raw(libc::SIGRTMIN() | 0x80)), End::Signaled(34));
    }
}
