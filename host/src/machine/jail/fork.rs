//! The moment between fork and exec, in which a helper gets its namespaces, its root and its user, and loses its rights.
//!
//! ```text
//!   parent: clone3(namespaces) ─────▶ map ids ─▶ go ──────────────────────────▶ read: nothing is success
//!   child:                   └▶ ready ─┘          └▶ mounts ─▶ user ─▶ root ─▶ no capability ─▶ filter ─▶ exec
//! ```
//!
//! The child is a copy of a process with many threads, of which it has one: it may use nothing that another thread can have
//! locked, so it makes plain system calls and allocates nothing. Everything that it needs is made before the fork.

use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change, move_mount,
    open_tree, unmount,
};
use rustix::process::{
    Gid, Resource, Rlimit, Signal, Uid, chdir, pivot_root, set_parent_process_death_signal, setrlimit, setsid, umask,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_no_new_privs, set_thread_res_gid, set_thread_res_uid,
};

use seccompiler::{BpfProgram, sock_filter};

use super::cgroups::Cgroup;
use super::ids::Ids;
use super::program::FIRST_INHERITED;
use super::view::Plan;

/// Where the child mounts its new root, over a directory that holds nothing to be mounted in it.
const NEW_ROOT: &CStr = c"/proc";

/// The new process begins in the cgroup that the arguments name. See clone(2).
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// All namespaces except that of time, whose offsets are never set.
const NAMESPACES: i32 = libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP;

/// Everything that walls a helper in.
#[derive(Debug)]
pub(super) struct Enclosure {
    pub(super) plan: Plan,
    pub(super) ids: Ids,
    /// Landlock's rule set, where the kernel has it.
    pub(super) rules: Option<OwnedFd>,
    /// Of system calls.
    pub(super) filters: Arc<[BpfProgram; 2]>,
    /// Of resources.
    pub(super) limits: Vec<(Resource, u64)>,
}

/// Everything that a child needs, made before the fork.
#[derive(Debug)]
pub(super) struct Launch {
    /// Without one the child ends with success once its walls stand and it has opened the first device behind them.
    pub(super) program: Option<Executable>,
    pub(super) working_dir: CString,
    /// Standard input, output and error.
    pub(super) standard: [OwnedFd; 3],
    /// All with numbers above those that the child is to see.
    pub(super) descriptors: Vec<OwnedFd>,
    pub(super) walls: Option<Enclosure>,
    /// Where there is none, the child has its parent's.
    pub(super) cgroup: Option<Arc<Cgroup>>,
}

/// What a child executes.
#[derive(Debug)]
pub(super) struct Executable {
    /// Used where there are no walls, which lets the program be a script.
    pub(super) path: CString,
    /// Used behind walls, where the path leads nowhere.
    pub(super) file: OwnedFd,
    pub(super) arguments: Vec<CString>,
}

/// A process that has been started.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) pid: u32,
    pub(super) pidfd: OwnedFd,
}

/// The step at which a child failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Step {
    Session,
    Namespaces,
    Mount,
    User,
    Root,
    Limits,
    Capabilities,
    Filter,
    Descriptors,
    WorkingDirectory,
    Device,
    Execute,
}

impl Step {
    const ALL: [Self; 12] = [
        Self::Session,
        Self::Namespaces,
        Self::Mount,
        Self::User,
        Self::Root,
        Self::Limits,
        Self::Capabilities,
        Self::Filter,
        Self::Descriptors,
        Self::WorkingDirectory,
        Self::Device,
        Self::Execute,
    ];

    fn describe(self, launch: &Launch, index: u32) -> String {
        match self {
            Self::Session => "can't make a session for it".to_owned(),
            Self::Namespaces => "can't make its namespaces".to_owned(),
            Self::Mount => {
                let mounts = launch.walls.iter().flat_map(|walls| &walls.plan.mounts);
                let source = mounts.map(|mount| mount.source.to_string_lossy()).nth(index as usize);
                format!("can't show it {}", source.unwrap_or_default())
            }
            Self::User => "can't become its user".to_owned(),
            Self::Root => "can't make its root".to_owned(),
            Self::Limits => "can't limit it".to_owned(),
            Self::Capabilities => "can't drop its capabilities".to_owned(),
            Self::Filter => "can't filter its system calls".to_owned(),
            Self::Descriptors => "can't hand its descriptors down".to_owned(),
            Self::WorkingDirectory => {
                format!("can't change to its working directory {}", launch.working_dir.to_string_lossy())
            }
            Self::Device => "can't open the device".to_owned(),
            Self::Execute => "can't execute it".to_owned(),
        }
    }
}

/// A child's failure.
struct Failure {
    step: Step,
    index: u32,
    errno: Errno,
}

/// Bytes of a failure on its way to the parent.
const FAILURE_BYTES: usize = 9;

impl Failure {
    fn at(step: Step) -> impl Fn(Errno) -> Self {
        move |errno| Self { step, index: 0, errno }
    }

    fn encode(&self) -> [u8; FAILURE_BYTES] {
        let mut bytes = [0; FAILURE_BYTES];
        bytes[0] = self.step as u8;
        bytes[1..5].copy_from_slice(&self.index.to_le_bytes());
        bytes[5..9].copy_from_slice(&self.errno.raw_os_error().to_le_bytes());
        bytes
    }

    fn decode(bytes: [u8; FAILURE_BYTES], launch: &Launch) -> io::Error {
        let [step, index @ .., _, _, _, _] = bytes;
        let errno = i32::from_le_bytes([bytes[5], bytes[6], bytes[7], bytes[8]]);
        let cause = io::Error::from_raw_os_error(errno);
        match Step::ALL.into_iter().find(|known| *known as u8 == step) {
            // The caller's message names the program.
            Some(Step::Execute | Step::WorkingDirectory | Step::Device) | None => cause,
            Some(step) => {
                let what = step.describe(launch, u32::from_le_bytes(index));
                io::Error::new(cause.kind(), format!("{what}: {cause}"))
            }
        }
    }
}

/// Forks and executes.
///
/// # Errors
///
/// The first thing that failed, in the parent or in the child, which is gone then.
pub(super) fn start(launch: &Launch) -> io::Result<Started> {
    let (mut failure, failed) = io::pipe()?;
    let (gone, mut go) = io::pipe()?;
    let mut mounts = Vec::with_capacity(launch.walls.as_ref().map_or(0, |walls| walls.plan.mounts.len()));
    let arguments = launch.program.iter().flat_map(|program| &program.arguments);
    let arguments: Vec<_> = arguments.map(|argument| argument.as_ptr()).chain([ptr::null()]).collect();
    let namespaces = if launch.walls.is_some() { NAMESPACES } else { 0 };
    let Some((pid, pidfd)) = fork(namespaces, launch.cgroup.as_deref())? else {
        // The parent's ends: if the child kept them, it would not notice the parent's death.
        drop((failure, go));
        let Err(error) = become_program(launch, &arguments, &mut mounts, (&gone, &failed));
        let _ = rustix::io::write(&failed, &error.encode());
        // SAFETY: ends this process at once, without running anything of the one it is a copy of.
        unsafe { libc::_exit(127) }
    };
    let started = Started { pid, pidfd };
    drop((failed, gone));
    let prepared = match &launch.walls {
        Some(walls) => failure.read_exact(&mut [0]).and_then(|()| walls.ids.map(pid)),
        None => Ok(()),
    };
    let prepared = prepared.and_then(|()| go.write_all(&[1]));
    drop(go);
    let mut bytes = [0; FAILURE_BYTES];
    let outcome = match (prepared, failure.read_exact(&mut bytes)) {
        // The exec has closed the other end.
        (Ok(()), Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(started),
        (Err(error), _) | (Ok(()), Err(error)) => error,
        (Ok(()), Ok(())) => Failure::decode(bytes, launch),
    };
    let _ = rustix::process::pidfd_send_signal(&started.pidfd, Signal::KILL);
    let _ = rustix::process::waitid(
        rustix::process::WaitId::PidFd(started.pidfd.as_fd()),
        rustix::process::WaitIdOptions::EXITED,
    );
    Err(outcome)
}

/// Nothing in the child, its id and a descriptor of it in the parent. All signals are blocked in the child.
fn fork(namespaces: i32, cgroup: Option<&Cgroup>) -> io::Result<Option<(u32, OwnedFd)>> {
    let mut pidfd: RawFd = -1;
    let flags = u64::from(namespaces.cast_unsigned() | libc::CLONE_PIDFD.cast_unsigned());
    let flags = if cgroup.is_some() { flags | CLONE_INTO_CGROUP } else { flags };
    let arguments = libc::clone_args {
        flags,
        pidfd: ptr::from_mut(&mut pidfd) as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD.cast_unsigned().into(),
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: cgroup.map_or(0, |cgroup| cgroup.as_fd().as_raw_fd().cast_unsigned().into()),
    };
    let all = nix::sys::signal::SigSet::all();
    let before = all.thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_SETMASK)?;
    // SAFETY: without CLONE_VM this is a fork. The structure is valid, and so is the place for the descriptor; the child goes
    // on to make system calls only.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) };
    let error = io::Error::last_os_error();
    if pid == 0 {
        return Ok(None);
    }
    before.thread_set_mask()?;
    match u32::try_from(pid) {
        Err(_) => Err(error),
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(pid) => Ok(Some((pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))),
    }
}

fn become_program(
    launch: &Launch,
    arguments: &[*const libc::c_char],
    mounts: &mut Vec<OwnedFd>,
    (gone, failed): (&PipeReader, &PipeWriter),
) -> Result<Infallible, Failure> {
    setsid().map_err(Failure::at(Step::Session))?;
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(Failure::at(Step::Session))?;
    if launch.walls.is_some() {
        // A process that isn't dumpable, as the daemon isn't, belongs to root in /proc, where its ids are mapped.
        set_dumpable(true).map_err(Failure::at(Step::Namespaces))?;
        rustix::io::write(failed, &[0]).map_err(Failure::at(Step::Namespaces))?;
    }
    let mut go = [0];
    match rustix::io::read(gone, &mut go) {
        Ok(1) => {}
        Ok(_) => return Err(Failure::at(Step::Session)(Errno::SRCH)),
        Err(errno) => return Err(Failure::at(Step::Session)(errno)),
    }
    if let Some(walls) = &launch.walls {
        set_dumpable(false).map_err(Failure::at(Step::Namespaces))?;
        wall_in(walls, mounts)?;
    } else {
        chdir(launch.working_dir.as_c_str()).map_err(Failure::at(Step::WorkingDirectory))?;
    }
    // Again, since the change of user has reset it.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(Failure::at(Step::Session))?;
    // A parent that has died before that has closed the other end.
    let mut ends = [PollFd::new(failed, PollFlags::empty())];
    poll(&mut ends, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).map_err(Failure::at(Step::Session))?;
    if ends[0].revents().contains(PollFlags::ERR) {
        return Err(Failure::at(Step::Session)(Errno::SRCH));
    }
    set_no_new_privs(true).map_err(Failure::at(Step::Capabilities))?;
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Core, none).map_err(Failure::at(Step::Limits))?;
    hand_down(launch).map_err(Failure::at(Step::Descriptors))?;
    if let Some(walls) = &launch.walls {
        restrict(walls)?;
    }
    restore_signals().map_err(Failure::at(Step::Session))?;
    if let Some(walls) = &launch.walls {
        for program in walls.filters.iter() {
            filter(program).map_err(Failure::at(Step::Filter))?;
        }
    }
    let Some(program) = &launch.program else {
        if let Some(device) = launch.walls.as_ref().and_then(|walls| walls.plan.device.as_deref()) {
            rustix::fs::open(device, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
                .map_err(Failure::at(Step::Device))?;
        }
        // SAFETY: ends this process at once, without running anything of the one it is a copy of.
        unsafe { libc::_exit(0) }
    };
    Err(Failure::at(Step::Execute)(execute(program, launch.walls.is_some(), arguments)))
}

/// The steps that need the child's capabilities in its own namespaces.
fn wall_in(walls: &Enclosure, mounts: &mut Vec<OwnedFd>) -> Result<(), Failure> {
    let Enclosure { plan, ids, .. } = walls;
    let root = Failure::at(Step::Root);
    mount_change(c"/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE).map_err(&root)?;
    // As the daemon's user, who can reach these paths.
    for (index, one) in (0..).zip(&plan.mounts) {
        let failed = |errno| Failure { step: Step::Mount, index, errno };
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(CWD, one.source.as_c_str(), flags).map_err(failed)?;
        set_attributes(&tree, c"", libc::AT_EMPTY_PATH, one.attributes).map_err(failed)?;
        mounts.push(tree);
    }
    let (uid, gid) = (Uid::from_raw(ids.uid), Gid::from_raw(ids.gid));
    set_thread_res_gid(gid, gid, gid).map_err(Failure::at(Step::User))?;
    set_thread_res_uid(uid, uid, uid).map_err(Failure::at(Step::User))?;
    umask(Mode::empty());
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount(c"root", NEW_ROOT, c"tmpfs", flags, c"mode=0755,size=1m,nr_inodes=4096").map_err(&root)?;
    chdir(NEW_ROOT).map_err(&root)?;
    for directory in &plan.directories {
        rustix::fs::mkdirat(CWD, directory.as_c_str(), Mode::from_raw_mode(0o755)).map_err(&root)?;
    }
    for file in &plan.files {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rustix::fs::openat(CWD, file.as_c_str(), flags, Mode::from_raw_mode(0o444)).map_err(&root)?;
        drop(file);
    }
    for (index, (one, tree)) in (0..).zip(plan.mounts.iter().zip(mounts)) {
        move_mount(tree, c"", CWD, one.target.as_c_str(), MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(|errno| Failure { step: Step::Mount, index, errno })?;
    }
    pivot_root(c".", c".").map_err(&root)?;
    unmount(c".", UnmountFlags::DETACH).map_err(&root)?;
    set_attributes(CWD, c"/", 0, libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOEXEC).map_err(&root)?;
    chdir(plan.working_dir.as_c_str()).map_err(Failure::at(Step::WorkingDirectory))
}

fn set_dumpable(dumpable: bool) -> Result<(), Errno> {
    nix::sys::prctl::set_dumpable(dumpable).map_err(|error| Errno::from_raw_os_error(error as i32))
}

fn set_attributes(tree: impl AsFd, path: &CStr, flags: i32, attributes: u64) -> Result<(), Errno> {
    let attributes = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the path and the structure are valid, and the kernel only reads them.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_fd().as_raw_fd(),
            path.as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    errno(done)
}

/// Standard streams and descriptors get their numbers, and all others close with the exec.
fn hand_down(launch: &Launch) -> Result<(), Errno> {
    for (descriptor, number) in launch.standard.iter().zip(0..).chain(launch.descriptors.iter().zip(FIRST_INHERITED..))
    {
        // SAFETY: after the fork this process is a copy with one thread, and what its low numbers meant before is used no
        // more. The originals all have higher numbers.
        errno(unsafe { libc::dup2(descriptor.as_raw_fd(), number) }.into())?;
    }
    let first = FIRST_INHERITED + RawFd::try_from(launch.descriptors.len()).map_err(|_| Errno::INVAL)?;
    // SAFETY: sets a flag on descriptors and touches no memory. Not closed at once, since a failed exec is still to be
    // reported through one of them.
    let marked = unsafe { libc::close_range(first.cast_unsigned(), u32::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed()) };
    errno(marked.into())
}

/// Limits, capabilities and Landlock.
fn restrict(walls: &Enclosure) -> Result<(), Failure> {
    for (resource, most) in &walls.limits {
        let limit = Rlimit { current: Some(*most), maximum: Some(*most) };
        setrlimit(*resource, limit).map_err(Failure::at(Step::Limits))?;
    }
    let failed = Failure::at(Step::Capabilities);
    clear_ambient_capability_set().map_err(&failed)?;
    for number in 0..64 {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            // A number beyond the kernel's last.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(errno) => return Err(failed(errno)),
        }
    }
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).map_err(&failed)?;
    let Some(rules) = &walls.rules else { return Ok(()) };
    // SAFETY: takes a descriptor and a number.
    let restricted = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0) };
    errno(restricted).map_err(Failure::at(Step::Filter))
}

/// The defaults that programs expect: no signal blocked, and SIGPIPE fatal.
fn restore_signals() -> Result<(), Errno> {
    // SAFETY: the default disposition runs no code of ours.
    if unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) } == libc::SIG_ERR {
        return Err(Errno::INVAL);
    }
    let none = nix::sys::signal::SigSet::empty();
    none.thread_set_mask().map_err(|error| Errno::from_raw_os_error(error as i32))
}

fn filter(program: &[sock_filter]) -> Result<(), Errno> {
    let length = u16::try_from(program.len()).map_err(|_| Errno::INVAL)?;
    // The crate's structure is the kernel's, as libc's is.
    let program = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut().cast() };
    // SAFETY: the kernel only reads the program, whose length is right.
    errno(unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) }.into())
}

fn execute(program: &Executable, is_walled: bool, arguments: &[*const libc::c_char]) -> Errno {
    let environment: [*const libc::c_char; 1] = [ptr::null()];
    if is_walled {
        // SAFETY: all strings are terminated, and so are both lists. The call returns only when it fails.
        let _ = unsafe {
            libc::syscall(
                libc::SYS_execveat,
                program.file.as_raw_fd(),
                c"".as_ptr(),
                arguments.as_ptr(),
                environment.as_ptr(),
                libc::AT_EMPTY_PATH,
            )
        };
    } else {
        // SAFETY: as above.
        let _ = unsafe { libc::execve(program.path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    }
    last_errno()
}

fn errno(returned: libc::c_long) -> Result<(), Errno> {
    if returned == -1 { Err(last_errno()) } else { Ok(()) }
}

fn last_errno() -> Errno {
    Errno::from_raw_os_error(nix::errno::Errno::last_raw())
}
