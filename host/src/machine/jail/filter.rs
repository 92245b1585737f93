//! The system calls that no helper needs, and the kinds of files that none creates.
//!
//! A VMM has filters of its own for each of its threads, and our devices allow a short list. This one is for all helpers and
//! all their threads from the first instruction on: it holds where theirs are late, wide or off.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use landlock::{
    Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError, Scope,
};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::confine::LANDLOCK;

/// Refused with any arguments.
const REFUSED: &[libc::c_long] = &[
    // Other processes, their memory and their descriptors.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_process_mrelease,
    libc::SYS_kcmp,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    // New processes: a thread is made by clone.
    libc::SYS_fork,
    libc::SYS_vfork,
    // Namespaces and mounts.
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_fsconfig,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    // The kernel itself.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_syslog,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_vhangup,
    libc::SYS_personality,
    libc::SYS_fanotify_init,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    // Users and rights.
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    // Names in directories: the run directory has what a machine needs.
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_rmdir,
    libc::SYS_mknod,
    libc::SYS_mknodat,
    libc::SYS_symlink,
    libc::SYS_symlinkat,
    libc::SYS_link,
    libc::SYS_linkat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    // Memory that outlives its process.
    libc::SYS_shmget,
    libc::SYS_msgget,
    libc::SYS_semget,
    libc::SYS_mq_open,
];

/// Commands of `fcntl` that make the kernel send signals to any process, see fcntl(2).
const REFUSED_FCNTL: [libc::c_int; 3] = [libc::F_SETOWN, 10 /* F_SETSIG */, 15 /* F_SETOWN_EX */];

/// Commands of `ioctl` that do the same (`FIOSETOWN`, `SIOCSPGRP`), or put input into a terminal.
const REFUSED_IOCTL: [u64; 4] = [0x8901, 0x8902, libc::TIOCSTI, libc::TIOCLINUX];

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub(super) enum FilterError {
    /// Of system calls.
    #[error("can't make the filter of system calls")]
    Calls(#[from] BackendError),
    /// Of files.
    #[error("can't make the Landlock rules")]
    Files(#[from] RulesetError),
}

/// The filter of system calls. Refused calls fail with `EPERM`. Newer calls with an older equivalent fail with `ENOSYS`, so that a C
/// library falls back to it.
pub(super) fn calls() -> Result<[BpfProgram; 2], FilterError> {
    let when = |argument, operator, value: u64| {
        let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
        SeccompRule::new(vec![condition])
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    let number = |value: libc::c_int| u64::from(value.cast_unsigned());
    let thread = number(libc::CLONE_THREAD);
    rules.insert(libc::SYS_clone, vec![when(0, SeccompCmpOp::MaskedEq(thread), 0)?]);
    rules.insert(libc::SYS_socket, vec![when(0, SeccompCmpOp::Ne, number(libc::AF_UNIX))?]);
    let fcntl = REFUSED_FCNTL.iter().map(|command| when(1, SeccompCmpOp::Eq, number(*command)));
    rules.insert(libc::SYS_fcntl, fcntl.collect::<Result<_, _>>()?);
    let ioctl = REFUSED_IOCTL.iter().map(|command| when(1, SeccompCmpOp::Eq, *command));
    rules.insert(libc::SYS_ioctl, ioctl.collect::<Result<_, _>>()?);
    // Nobody outlives the daemon.
    rules.insert(libc::SYS_prctl, vec![when(0, SeccompCmpOp::Eq, number(libc::PR_SET_PDEATHSIG))?]);
    let absent = [libc::SYS_clone3, libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register];
    let refused = program(rules, libc::EPERM)?;
    let absent = program(absent.into_iter().map(|call| (call, Vec::new())).collect(), libc::ENOSYS)?;
    Ok([refused, absent])
}

fn program(rules: BTreeMap<i64, Vec<SeccompRule>>, errno: libc::c_int) -> Result<BpfProgram, BackendError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno.cast_unsigned()), arch)?.try_into()
}

/// Landlock's rules: no new file but a socket in the run directory, no TCP, no signal and no abstract socket to anybody outside.
/// Nothing where the kernel has no Landlock.
pub(super) fn files(run_dir: Option<&Path>) -> Result<Option<OwnedFd>, FilterError> {
    let making = AccessFs::MakeChar
        | AccessFs::MakeDir
        | AccessFs::MakeReg
        | AccessFs::MakeSock
        | AccessFs::MakeFifo
        | AccessFs::MakeBlock
        | AccessFs::MakeSym
        | AccessFs::RemoveDir
        | AccessFs::RemoveFile;
    let sockets = AccessFs::MakeSock | AccessFs::RemoveFile;
    let run_dir = run_dir.and_then(|run_dir| File::open(run_dir).ok());
    let rules = run_dir.map(|directory| Ok::<_, RulesetError>(PathBeneath::new(directory, sockets)));
    let created = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(making)?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?
        .add_rules(rules)?;
    Ok(created.into())
}
