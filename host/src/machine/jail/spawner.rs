//! The thread that forks.

use std::io;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::Stdio;
use std::thread;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{Pid, getppid, setsid};
use thiserror::Error;
use tokio::net::unix::pipe;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};

use super::child::{Child, Job, KeepSpawner};
use super::program::{FIRST_INHERITED, Program};
use super::tail::Tail;

/// Programs that wait for the thread; further callers wait for room.
const QUEUE_LENGTH: usize = 16;

/// Why a program could not be started.
#[derive(Debug, Error)]
pub enum SpawnError {
    /// Descriptors or pipes for it could not be made.
    #[error("cannot prepare the start of {name}")]
    Prepare {
        /// The program's name in messages.
        name: String,
        /// The system's reason.
        source: io::Error,
    },
    /// It could not be forked or executed.
    #[error("cannot start {name} ({})", path.display())]
    Start {
        /// The program's name in messages.
        name: String,
        /// The program's file.
        path: PathBuf,
        /// The system's reason; also when the working directory doesn't exist.
        source: io::Error,
    },
    /// The runtime is shutting down.
    #[error("cannot start {name}: the thread that starts programs has ended")]
    ThreadEnded {
        /// The program's name in messages.
        name: String,
    },
}

/// Starts helper processes, all from one thread. That thread lives until the last [`Spawner`] and the last [`Child`]
/// are dropped, because the kernel kills the children when it ends.
#[derive(Clone, Debug)]
pub struct Spawner {
    jobs: mpsc::Sender<Job>,
}

impl Spawner {
    /// Starts the thread; children are watched on the runtime of `handle`, which needs its I/O and time drivers.
    pub fn new(handle: Handle) -> io::Result<Self> {
        heed_children()?;
        let (jobs, mut queue) = mpsc::channel::<Job>(QUEUE_LENGTH);
        thread::Builder::new().name("spawner".to_owned()).spawn(move || {
            let _in_runtime = handle.enter();
            while let Some(job) = queue.blocking_recv() {
                job();
            }
        })?;
        Ok(Self { jobs })
    }

    /// Starts `program`. Returns once it is executing, so a missing file or directory is an error here.
    pub async fn spawn(&self, program: Program) -> Result<Child, SpawnError> {
        let name = program.name.clone();
        let (reply, answer) = oneshot::channel();
        let keep = self.jobs.clone();
        let job = Box::new(move || {
            // The caller may have gone; then the child is dropped here, and so killed.
            let _ = reply.send(start(program, keep));
        });
        if self.jobs.send(job).await.is_err() {
            return Err(SpawnError::ThreadEnded { name });
        }
        answer.await.unwrap_or(Err(SpawnError::ThreadEnded { name }))
    }
}

/// A process that ignores SIGCHLD never learns how its children ended; and it inherits that from its parent.
fn heed_children() -> io::Result<()> {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: the default disposition runs no code of ours.
    let before = unsafe { sigaction(Signal::SIGCHLD, &default) }?;
    if !matches!(before.handler(), SigHandler::SigIgn) {
        // SAFETY: this puts back what was there, which was valid before.
        unsafe { sigaction(Signal::SIGCHLD, &before) }?;
    }
    Ok(())
}

fn start(program: Program, keep: KeepSpawner) -> Result<Child, SpawnError> {
    let Program { name, path, args, working_dir, descriptors } = program;
    match Prepared::new(&descriptors) {
        Err(source) => Err(SpawnError::Prepare { name, source }),
        Ok(prepared) => {
            let mut command = tokio::process::Command::new(&path);
            command.args(args).current_dir(working_dir).env_clear().kill_on_drop(true);
            match prepared.spawn(command) {
                Err(source) => Err(SpawnError::Start { name, path, source }),
                Ok((process, output)) => {
                    let tail = Tail::default();
                    let reader = tokio::spawn(tail.clone().follow(output));
                    let pid = process.id().expect("a child that was not waited for has its id");
                    Ok(Child::new(name, pid, process, (tail, reader), keep))
                }
            }
        }
    }
}

/// Descriptors for one child, all of them numbered above those that the child is to see. So the child can copy them
/// down one after the other, and none is overwritten before its turn.
struct Prepared {
    descriptors: Vec<OwnedFd>,
    output: pipe::Receiver,
    stdout: OwnedFd,
    stderr: OwnedFd,
    /// The numbers that the child is to see, as far as they were free: kept taken so that the pipe on which a failed
    /// `exec` is reported, and which is made while forking, gets none of them.
    _taken: Vec<OwnedFd>,
}

impl Prepared {
    fn new(inherited: &[OwnedFd]) -> io::Result<Self> {
        let end = FIRST_INHERITED + RawFd::try_from(inherited.len()).map_err(io::Error::other)?;
        let descriptors = inherited.iter().map(|one| duplicate(one, end)).collect::<io::Result<_>>()?;
        let (output, stdout) = io::pipe()?;
        let output = pipe::Receiver::from_owned_fd(output.into())?;
        let stderr = stdout.try_clone()?.into();
        let stdout: OwnedFd = stdout.into();
        let mut taken = vec![];
        loop {
            let next = duplicate(&stdout, FIRST_INHERITED)?;
            if next.as_raw_fd() >= end {
                break;
            }
            taken.push(next);
        }
        Ok(Self { descriptors, output, stdout, stderr, _taken: taken })
    }

    fn spawn(self, mut command: tokio::process::Command) -> io::Result<(tokio::process::Child, pipe::Receiver)> {
        let Self { descriptors, output, stdout, stderr, _taken } = self;
        command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
        let parent = Pid::this();
        // SAFETY: the closure runs in the forked child, where only async-signal-safe functions may be called: it makes
        // plain system calls and allocates nothing. It owns the descriptors that it copies.
        unsafe { command.pre_exec(move || confine(parent, &descriptors)) };
        Ok((command.spawn()?, output))
    }
}

/// A copy of `descriptor` with a number of at least `least`, closed on exec.
fn duplicate(descriptor: &OwnedFd, least: RawFd) -> io::Result<OwnedFd> {
    let raw = fcntl(descriptor, FcntlArg::F_DUPFD_CLOEXEC(least))?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(raw) })
}

/// Runs in the child between fork and exec; see the table in the module above for the reasons.
fn confine(parent: Pid, descriptors: &[OwnedFd]) -> io::Result<()> {
    setsid()?;
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    if getppid() != parent {
        return Err(nix::Error::ESRCH.into());
    }
    prctl::set_no_new_privs()?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    // Marked and not closed at once, since a failed exec is still to be reported through one of them.
    let (first, last) = (FIRST_INHERITED.cast_unsigned(), u32::MAX);
    // SAFETY: sets a flag on descriptors and touches no memory.
    let marked = unsafe { libc::close_range(first, last, libc::CLOSE_RANGE_CLOEXEC.cast_signed()) };
    nix::Error::result(marked)?;
    for (descriptor, number) in descriptors.iter().zip(FIRST_INHERITED..) {
        // SAFETY: after the fork this process is a copy with one thread, and what its numbers from 3 on meant before
        // is used no more.
        let copy = unsafe { nix::unistd::dup2_raw(descriptor, number) }?;
        let _ = copy.into_raw_fd();
    }
    Ok(())
}
