//! From the kernel's hand-over to a machine that can dial the host.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::fd::{AsRawFd as _, IntoRawFd as _},
    path::Path,
};

use nix::{
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        stat::{Mode, umask},
    },
    unistd::{chdir, chroot, pause},
};

use crate::{INPUTS, PATHS, ROOT, SCRATCH, SKELETON};

/// Modules to load, one file name of [`MODULES`] a line, in this order; absent when the kernel has all built in.
const MODULES_ORDER: &str = "/modules.order";
const MODULES: &str = "/lib";

/// The same for KVM, of which each processor has its own module; absent when the kernel has it built in, or not at all.
const KVM_MODULES_ORDER: &str = "/kvm.order";

/// What they make.
const KVM: &str = "/dev/kvm";

/// Where the initramfs is mounted a second time, see [`leave_rootfs`].
const BASE: &str = "/base";

/// Mount point and type.
const FILE_SYSTEMS: [(&str, &str); 4] =
    [("/dev", "devtmpfs"), ("/proc", "proc"), ("/sys", "sysfs"), ("/sys/fs/cgroup", "cgroup2")];

/// Files to write, where the kernel has them.
const SETTINGS: [(&str, &str); 3] = [
    // guest-init is not killed for want of memory.
    ("/proc/self/oom_score_adj", "-1000"),
    // A kernel's namespaces and cgroups wait for RCU many times while a build is set up; each wait takes some ticks.
    ("/sys/kernel/rcu_expedited", "1"),
    // Builds behave alike on kernels with and without user namespaces, which open privileged interfaces to them.
    ("/proc/sys/user/max_user_namespaces", "0"),
];

/// Why the machine can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// A file system is missing.
    #[error("can't mount {kind} at {at}")]
    Mount {
        /// The file system's type.
        kind: &'static str,
        /// The mount point.
        at: &'static str,
        #[source]
        source: io::Error,
    },
    /// A setting is refused.
    #[error("can't write {value:?} to {path}")]
    Setting {
        /// The file.
        path: &'static str,
        /// What was written.
        value: &'static str,
        #[source]
        source: io::Error,
    },
    /// A module is missing or doesn't fit the kernel.
    #[error("can't load the kernel module {name:?}")]
    Module {
        /// Its file's name.
        name: String,
        #[source]
        source: io::Error,
    },
    /// Anything else.
    #[error("can't {action}")]
    Other {
        /// What was tried.
        action: &'static str,
        #[source]
        source: io::Error,
    },
}

/// Mounts what guest-init itself needs, and loads the modules.
pub(crate) fn prepare() -> Result<(), BootError> {
    umask(Mode::empty());
    leave_rootfs().map_err(|source| BootError::Other { action: "leave the initramfs's root", source })?;
    for (at, kind) in FILE_SYSTEMS {
        mount_at(at, kind).map_err(|source| BootError::Mount { kind, at, source })?;
        if kind == "devtmpfs" {
            open_standard_descriptors()
                .map_err(|source| BootError::Other { action: "open the console or /dev/null", source })?;
        }
    }
    for (path, value) in SETTINGS {
        match fs::write(path, value) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other.map_err(|source| BootError::Setting { path, value, source })?,
        }
    }
    for directory in [INPUTS, PATHS, SCRATCH, SKELETON, ROOT] {
        make(directory).map_err(|source| BootError::Other { action: "make a mount point", source })?;
    }
    load_modules()
}

/// Sees to it that there is [`KVM`].
pub(crate) fn load_kvm() -> io::Result<()> {
    let order = match fs::read_to_string(KVM_MODULES_ORDER) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        other => other?,
    };
    for name in order.lines() {
        match load_module(name) {
            // The other processor's.
            Err(error)
                if error.raw_os_error().is_some_and(|errno| [libc::EOPNOTSUPP, libc::ENODEV].contains(&errno)) => {}
            other => other?,
        }
    }
    if fs::exists(KVM)? {
        return Ok(());
    }
    Err(io::Error::other("this kernel has none, or this processor no virtualisation"))
}

/// Ends the machine. Never a reset, which some VMMs answer by starting the guest anew.
pub(crate) fn power_off() -> ! {
    let _ = reboot(RebootMode::RB_POWER_OFF);
    loop {
        pause();
    }
}

/// The kernel's rootfs can't be the old root of `pivot_root`, so everything happens in a bind of it.
fn leave_rootfs() -> io::Result<()> {
    make(BASE)?;
    mount(Some("/"), BASE, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    chdir(BASE)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    chroot(".")?;
    Ok(chdir("/")?)
}

fn mount_at(at: &str, kind: &str) -> io::Result<()> {
    make(at)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    Ok(mount(Some(kind), at, Some(kind), flags, None::<&str>)?)
}

fn make(directory: &str) -> io::Result<()> {
    match fs::create_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Descriptors 0 to 2 may be closed, and must never come to mean a pipe or the host.
fn open_standard_descriptors() -> io::Result<()> {
    loop {
        let open = |path| OpenOptions::new().read(true).write(true).open(path);
        let file = open("/dev/console").or_else(|_| open("/dev/null"))?;
        if file.as_raw_fd() > 2 {
            return Ok(());
        }
        // Stays open for ever.
        let _ = file.into_raw_fd();
    }
}

fn load_modules() -> Result<(), BootError> {
    let order = match fs::read_to_string(MODULES_ORDER) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|source| BootError::Other { action: "read /modules.order", source })?,
    };
    for name in order.lines().filter(|name| !name.is_empty()) {
        load_module(name).map_err(|source| BootError::Module { name: name.to_owned(), source })?;
    }
    Ok(())
}

fn load_module(name: &str) -> io::Result<()> {
    let module = File::open(Path::new(MODULES).join(name))?;
    match finit_module(&module, c"", ModuleInitFlags::empty()) {
        // Built in, or loaded before.
        Err(nix::Error::EEXIST) => Ok(()),
        other => Ok(other?),
    }
}
