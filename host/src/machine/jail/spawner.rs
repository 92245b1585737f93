//! The thread that forks.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use rustix::process::Resource;
use thiserror::Error;
use tokio::net::unix::pipe;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};

use super::cgroups::{Cgroup, Cgroups};
use super::child::{Child, Job, KeepSpawner};
use super::fork::{self, Executable, Launch};
use super::ids::Ids;
use super::libraries::Libraries;
use super::program::{FIRST_INHERITED, Program};
use super::tail::Tail;
use super::view::c_string;
use super::walls::{Best, Means, Rules, Walls, WallsError};

/// Programs that wait for the thread; further callers wait for room.
const QUEUE_LENGTH: usize = 16;

/// Most processes and threads of one helper. A VMM has some for each CPU and each device.
const MAX_THREADS: u64 = 1024;

/// Most descriptors of one helper. A device has most: some hundreds, of the blobs that its guest reads.
const MAX_DESCRIPTORS: u64 = 1024;

/// Address space of a helper beside its machine's memory, in bytes. The C library reserves 64 MiB for each thread, and KVM maps
/// the guest's memory once more.
const HELPER_BYTES: u64 = 8 << 30;

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
    /// It could not be forked, walled in or executed.
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
    shared: Arc<Shared>,
    /// Nothing for programs that belong to no machine.
    machine: Option<Machine>,
}

/// The machine that helpers belong to.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    /// Nothing where the host delegates none. Dropped before the ids: what is still in it dies before another machine gets them.
    cgroup: Option<Arc<Cgroup>>,
    /// Nothing where there are no walls.
    ids: Option<Ids>,
    memory_bytes: u64,
}

impl Machine {
    pub(super) fn is_out_of_memory(&self) -> bool {
        self.cgroup.as_ref().is_some_and(|cgroup| cgroup.is_out_of_memory())
    }
}

/// What all helpers have in common.
#[derive(Debug)]
struct Shared {
    /// Nothing where there are no walls.
    means: Option<Means>,
    /// Nothing where the host delegates none.
    cgroups: Option<Cgroups>,
    libraries: Libraries,
}

impl Spawner {
    /// Starts the thread; children are watched on the runtime of `handle`, which needs its I/O and time drivers. Helpers get
    /// the best walls that this host has.
    ///
    /// # Errors
    ///
    /// The host's walls are weaker than required, machines can't have the cgroups that the rules ask for, or no thread can be
    /// started.
    pub fn new(handle: Handle, rules: Rules) -> Result<Self, WallsError> {
        let Best { walls, reason, means } = Best::of_this_host();
        if *walls < rules.walls {
            return Err(WallsError::Weaker { required: rules.walls, walls: *walls, reason: reason.clone() });
        }
        match walls {
            Walls::Uids => {}
            Walls::Namespaces => tracing::debug!("helper processes have this user's id: {reason}"),
            Walls::None => tracing::warn!("helper processes have no namespaces of their own: {reason}"),
        }
        let cgroups = match Cgroups::new(rules.shares) {
            Ok(cgroups) => Some(cgroups),
            Err(reason) if rules.cgroups => return Err(WallsError::NoCgroups { reason }),
            Err(reason) => {
                tracing::debug!("machines have no cgroups of their own: {reason}");
                None
            }
        };
        Self::with(handle, means.clone(), cgroups).map_err(WallsError::Thread)
    }

    /// As [`new`](Self::new), for helpers that nobody attacks: they have no walls.
    ///
    /// # Errors
    ///
    /// No thread can be started.
    pub fn without_walls(handle: Handle) -> io::Result<Self> {
        Self::with(handle, None, None)
    }

    fn with(handle: Handle, means: Option<Means>, cgroups: Option<Cgroups>) -> io::Result<Self> {
        heed_children()?;
        let (jobs, mut queue) = mpsc::channel::<Job>(QUEUE_LENGTH);
        let groups = means.as_ref().and_then(|means| means.source.groups());
        thread::Builder::new().name("spawner".to_owned()).spawn(move || {
            let _in_runtime = handle.enter();
            // The helpers of root's daemon have none of root's groups. This call is about this thread alone.
            if let Some(groups) = groups
                && let Err(error) = rustix::thread::set_thread_groups(&groups)
            {
                tracing::warn!("helper processes keep this process's groups: {error}");
            }
            while let Some(job) = queue.blocking_recv() {
                job();
            }
        })?;
        let shared = Shared { means, cgroups, libraries: Libraries::default() };
        Ok(Self { jobs, shared: Arc::new(shared), machine: None })
    }

    /// One that starts the helpers of one new machine with so much memory, in bytes, for a build with so many CPUs. They have
    /// an id and a cgroup of their own where the host has such.
    ///
    /// # Errors
    ///
    /// No id is free, or the cgroup can't be made.
    pub fn for_machine(&self, memory_bytes: u64, cpus: u32) -> Result<Self, WallsError> {
        let Shared { means, cgroups, .. } = &*self.shared;
        let ids = means.as_ref().map(|means| means.source.reserve()).transpose().map_err(WallsError::NoId)?;
        let cgroup = cgroups.as_ref().map(|cgroups| cgroups.machine(memory_bytes, cpus)).transpose();
        let machine = Machine { ids, cgroup: cgroup.map_err(WallsError::Cgroup)?, memory_bytes };
        Ok(Self { machine: Some(machine), ..self.clone() })
    }

    /// Starts `program`. Returns once it is executing, so a missing file or directory is an error here. Given up, it leaves no
    /// process behind.
    ///
    /// # Errors
    ///
    /// See [`SpawnError`].
    pub async fn spawn(&self, program: Program) -> Result<Child, SpawnError> {
        let name = program.name.clone();
        let (reply, answer) = oneshot::channel();
        let mut waiting = Waiting { answer, starting: Arc::default() };
        let (keep, shared, machine) = (self.jobs.clone(), Arc::clone(&self.shared), self.machine.clone());
        let starting = Arc::clone(&waiting.starting);
        let job = Box::new(move || {
            let _starting = starting.lock();
            if !reply.is_closed() {
                // The caller may have gone by then; the child is dropped here, and so killed.
                let _ = reply.send(start(program, (&shared, machine), keep));
            }
        });
        if self.jobs.send(job).await.is_err() {
            return Err(SpawnError::ThreadEnded { name });
        }
        (&mut waiting.answer).await.unwrap_or(Err(SpawnError::ThreadEnded { name }))
    }
}

/// Waits for a child. Dropped before there is one, it waits a moment until there will be none.
struct Waiting {
    answer: oneshot::Receiver<Result<Child, SpawnError>>,
    /// Locked while the child starts.
    starting: Arc<Mutex<()>>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.answer.close();
        drop(self.starting.lock());
    }
}

fn prepare(name: &str, source: io::Error) -> SpawnError {
    SpawnError::Prepare { name: name.to_owned(), source }
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

fn start(
    program: Program,
    (shared, machine): (&Shared, Option<Machine>),
    keep: KeepSpawner,
) -> Result<Child, SpawnError> {
    let Program { name, path, title, args, working_dir, descriptors, view, file_bytes } = program;
    let failed = |source| SpawnError::Start { name: name.clone(), path: path.clone(), source };
    let prepared = Prepared::new(&descriptors).map_err(|source| prepare(&name, source))?;
    let Prepared { descriptors, output, standard } = prepared;
    let file = File::open(&path).map_err(failed)?;
    let walls = match (view, &machine, &shared.means) {
        (Some(view), Some(Machine { ids: Some(ids), memory_bytes, .. }), Some(means)) => {
            let libraries = shared.libraries.of(&file).map_err(failed)?;
            let address_space = (Resource::As, memory_bytes.saturating_add(HELPER_BYTES));
            let limits =
                [(Resource::Nproc, MAX_THREADS), (Resource::Nofile, MAX_DESCRIPTORS), address_space].into_iter();
            let limits = limits.chain(file_bytes.map(|bytes| (Resource::Fsize, bytes))).collect();
            Some(means.enclose(ids.clone(), &view, (&libraries, &working_dir), limits).map_err(failed)?)
        }
        _ => None,
    };
    let title = title.as_deref().unwrap_or(path.as_os_str());
    let arguments = [title].into_iter().chain(args.iter().map(|argument| &**argument));
    let arguments: Result<_, _> = arguments.map(|argument| CString::new(argument.as_bytes())).collect();
    let arguments = arguments.map_err(|error| failed(error.into()))?;
    let executable = Executable { path: c_string(&path).map_err(failed)?, file: file.into(), arguments };
    let working_dir = c_string(&working_dir).map_err(failed)?;
    let cgroup = machine.as_ref().and_then(|machine| machine.cgroup.clone());
    let launch = Launch { program: Some(executable), working_dir, standard, descriptors, walls, cgroup };
    let started = fork::start(&launch).map_err(failed)?;
    let tail = Tail::default();
    let reader = tokio::spawn(tail.clone().follow(output));
    Child::new(name.clone(), started, (tail, reader), keep, machine).map_err(|source| prepare(&name, source))
}

/// Descriptors for one child, all of them numbered above those that the child is to see. So the child can copy them
/// down one after the other, and none is overwritten before its turn.
struct Prepared {
    descriptors: Vec<OwnedFd>,
    output: pipe::Receiver,
    standard: [OwnedFd; 3],
}

impl Prepared {
    fn new(inherited: &[OwnedFd]) -> io::Result<Self> {
        let end = FIRST_INHERITED + RawFd::try_from(inherited.len()).map_err(io::Error::other)?;
        let descriptors = inherited.iter().map(|one| duplicate(one, end)).collect::<io::Result<_>>()?;
        let (output, stdout) = io::pipe()?;
        let output = pipe::Receiver::from_owned_fd(output.into())?;
        let stdout = OwnedFd::from(stdout);
        let null = OwnedFd::from(File::open("/dev/null")?);
        let standard = [duplicate(&null, end)?, duplicate(&stdout, end)?, duplicate(&stdout, end)?];
        Ok(Self { descriptors, output, standard })
    }
}

/// A copy of `descriptor` with a number of at least `least`, closed on exec.
fn duplicate(descriptor: &OwnedFd, least: RawFd) -> io::Result<OwnedFd> {
    let raw = fcntl(descriptor, FcntlArg::F_DUPFD_CLOEXEC(least))?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(raw) })
}
