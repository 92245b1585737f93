//! The system calls that a device still needs once its VMM is connected; all others fail with `EPERM`.
//!
//! The others fail instead of killing the process, so that a C library can try a new call and fall back to an old one. The
//! allowed calls work on descriptors that are open already and on the process's own memory. They can't make memory
//! executable, and can't open, connect, start, signal or inspect anything.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter_all_threads,
};

/// Allowed with any arguments.
const ALLOWED: &[libc::c_long] = &[
    // Blobs into guest memory; eventfds; messages of the VMM and the host process; the log.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    // Descriptors that come and go with memory regions, queues and blobs.
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_lseek,
    libc::SYS_eventfd2,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_poll,
    libc::SYS_ppoll,
    // Memory, beside mmap and mprotect below.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Existing threads, also if one is still starting: registration, locks, time, signals, end.
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_sched_getaffinity,
    libc::SYS_futex,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_sched_yield,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getrandom,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Allowed as long as their third argument, the protection, doesn't ask for execution.
const ALLOWED_WITHOUT_EXECUTION: &[libc::c_long] = &[libc::SYS_mmap, libc::SYS_mprotect];

/// The one `prctl` that is allowed: a thread gives itself a name when it starts.
const ALLOWED_PRCTL: i32 = libc::PR_SET_NAME;

/// Why the filter is not in force.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// It can't be expressed for this machine.
    #[error("can't make the filter")]
    Make(#[from] BackendError),
    /// The kernel did not take it.
    #[error("can't put the filter in force")]
    Apply(#[from] seccompiler::Error),
}

/// Puts the filter in force for all threads of the process; allows some calls more.
pub(super) fn allow_only_what_serving_needs(also: &[libc::c_long]) -> Result<(), FilterError> {
    Ok(apply_filter_all_threads(&filter(also)?)?)
}

pub(super) fn filter(also: &[libc::c_long]) -> Result<BpfProgram, BackendError> {
    let only_if = |argument, operator, value: i32| {
        let value = value.cast_unsigned().into();
        let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
        SeccompRule::new(vec![condition]).map(|rule| vec![rule])
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().chain(also).map(|call| (*call, Vec::new())).collect();
    for call in ALLOWED_WITHOUT_EXECUTION {
        let mask = SeccompCmpOp::MaskedEq(libc::PROT_EXEC.cast_unsigned().into());
        rules.insert(*call, only_if(2, mask, 0)?);
    }
    rules.insert(libc::SYS_prctl, only_if(0, SeccompCmpOp::Eq, ALLOWED_PRCTL)?);
    let refused = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, refused, SeccompAction::Allow, arch)?.try_into()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{self, Read as _};
    use std::os::unix::net::UnixStream;

    use seccompiler::apply_filter;

    use super::*;

    /// In a thread of its own, which is all that this way of applying it covers.
    #[test]
    fn open_files_can_be_read_and_nothing_new_can_be_had() {
        std::thread::spawn(|| {
            let mut open = File::open("/proc/thread-self/status").unwrap();
            let (mut a, b) = UnixStream::pair().unwrap();
            apply_filter(&filter(&[]).unwrap()).unwrap();

            let mut status = String::new();
            open.read_to_string(&mut status).unwrap();
            assert!(status.contains("Seccomp:\t2"));
            let refused = |error: io::Error| assert_eq!(error.raw_os_error(), Some(libc::EPERM));
            refused(File::open("/").unwrap_err());
            refused(UnixStream::connect("/nonexistent").unwrap_err());
            refused(UnixStream::pair().unwrap_err());
            refused(std::process::Command::new("/bin/true").status().unwrap_err());
            refused(nix::sys::prctl::set_dumpable(true).unwrap_err().into());
            refused(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER).unwrap_err().into());
            refused(nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap_err().into());
            nix::sys::prctl::set_name(c"named").unwrap();
            refused(std::thread::Builder::new().spawn(|| ()).unwrap_err());
            refused(nix::sys::signal::kill(nix::unistd::Pid::from_raw(1), None).unwrap_err().into());
            // SAFETY: the call is refused; were it not, it would make unused anonymous memory.
            let executable = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    4096,
                    libc::PROT_READ | libc::PROT_EXEC,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                )
            };
            assert_eq!(executable, libc::MAP_FAILED);
            drop(b);
            assert_eq!(a.read(&mut [0]).unwrap(), 0);
            assert_eq!(vec![1_u8; 64 << 20].iter().map(|byte| usize::from(*byte)).sum::<usize>(), 64 << 20);
        })
        .join()
        .unwrap();
    }
}
